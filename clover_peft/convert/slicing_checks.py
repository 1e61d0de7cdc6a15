"""What `slice_hidden_size` refuses, and the width it chooses."""

from __future__ import annotations

import copy
import math
from numbers import Integral, Real
from typing import Any, cast

from torch import nn

from ..base_model.plain import check_plain, check_unquantised
from ..base_model.weight import refuse_computed
from .sliced_models import RECORD
from .stream import REASONS, STREAMS, Stream, head_of, norms, present, strangers, trunk_of

_EXPERTS = ("TopkRouter", "Experts")  # ends of the names of classes whose weights belong to no nn.Linear


def check_sliceable(model: Any) -> Stream:
    """The residual stream of a model that can be sliced.

    Raises:
        ValueError, TypeError: with the reason, if it cannot be.
    """
    check_plain(model)
    kind, config = type(model).__name__, getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in STREAMS or not type(model).__module__.startswith("transformers."):
        reason = REASONS.get(str(model_type), "its residual stream is not in the table")
        raise ValueError(f"{kind}: expected one of {', '.join(sorted(STREAMS))}, found {model_type!r}: {reason}")
    if hasattr(config, RECORD):
        raise ValueError(f"{kind}: expected a model that was not sliced yet, found one; slice the original again")
    check_unquantised(model, kind)
    stream, trunk, head = STREAMS[str(model_type)], trunk_of(model), head_of(model)
    if head is None:
        raise ValueError(f"{kind}: expected a causal language model with lm_head, found none; load it with its head")
    if getattr(config, "do_layer_norm_before", True) is False:
        raise ValueError(f"{kind}: do_layer_norm_before=False: {REASONS['bert']}")
    if getattr(trunk, stream.norm, None) is None or getattr(trunk, "project_in", None) is not None:
        raise ValueError(f"{kind}: expected a norm behind the last layer and no projection of embeddings")
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook") or "forward" in vars(module):
            raise ValueError(
                f"{name or kind}: expected a module whose forward is its class's, found a hook on it; load the model "
                "without device_map"
            )
    if type(head) is not nn.Linear or getattr(head, "bias", None) is not None:
        raise ValueError(f"lm_head: expected nn.Linear without a bias, found {head}")
    for i, layer in enumerate(trunk.layers):
        if unknown := strangers(layer, stream):
            raise ValueError(
                f"layers.{i}.{unknown[0]}: expected no parameters but those of the family, found this one, which may "
                "see the residual stream"
            )
        for block in stream.blocks:
            constant = getattr(layer.get_submodule(block.norm), "bias", None)
            for module, _ in present(layer, (*block.reads, *block.writes)):
                _check_module(f"layers.{i}", module)
            for module, _ in present(layer, block.reads):
                if constant is not None and getattr(module, "bias", None) is None:
                    raise ValueError(
                        f"layers.{i}.{block.norm}: expected projections with biases, into which the norm's bias can "
                        "be folded, found one without"
                    )
    if any(getattr(norm, "weight", None) is None for norm in norms(trunk, stream)):
        raise ValueError(f"{kind}: expected norms with gains, found one without")
    return stream


def _check_module(path: str, module: nn.Module) -> None:
    kind = type(module)
    if kind is not nn.Linear and not (
        kind.__module__.startswith("transformers.") and kind.__name__.endswith(_EXPERTS)
    ):
        raise ValueError(
            f"{path}: expected nn.Linear, found {kind.__name__}; slice before adapters are added or weights quantised"
        )
    refuse_computed(module, path)


def choose_width(model: Any, ratio: float, multiple: int, stock: bool) -> int:
    """The hidden size that is nearest to the one wanted.

    Args:
        model: the model.
        ratio: share to remove.
        multiple: the new size is a multiple of this.
        stock: whether the model's config is to have it, which may demand a multiple of the number of heads.

    Raises:
        ValueError: if an argument is none, or no size but the present one is near.
    """
    if not isinstance(cast(Any, ratio), Real) or not 0 <= ratio < 1:
        raise ValueError(f"ratio: expected a share from 0 to below 1, found {ratio!r}")
    if not isinstance(cast(Any, multiple), Integral) or multiple < 1:
        raise ValueError(f"multiple: expected a positive whole number, found {multiple!r}")
    size, step = model.get_input_embeddings().weight.shape[-1], int(multiple)
    if ratio == 0:
        return int(size)
    wanted = size * (1 - ratio)

    def choose(step: int) -> tuple[int, int]:
        if stock and not _is_valid(model.config, _nearest(wanted, step)):
            step = math.lcm(step, model.config.num_attention_heads)
        return _nearest(wanted, step), step

    width, step = choose(step)
    if not 1 < width < size:
        other = choose(1)[0]
        smaller = f", or multiple=1, with which it is {other}" if 1 < other < size else ""
        raise ValueError(
            f"ratio={ratio}: expected a hidden size below {size}, found {width} as the multiple of {step} that is "
            f"nearest to {wanted:.1f}; pass another ratio{smaller}"
        )
    return width


def _nearest(wanted: float, step: int) -> int:
    return round(wanted / step) * step


def _is_valid(config: Any, width: int) -> bool:
    """Whether a config takes this hidden size."""
    changed = copy.deepcopy(config)
    try:
        changed.hidden_size = width
        changed.validate_architecture()
    except ValueError:
        return False
    return True
