"""The CLOVER layers of a model, and what is done with all of them, such as the checks around a merge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..io.user_warning import warn
from .adapter_tensors import FROZEN
from .layer import CloverLayer
from .merging import check_merge

# Merging warns if rounding changes more than this share of the update.
MUCH_ROUNDED = 0.1


def clover_layers(model: nn.Module, adapter_name: str | None = None) -> list[tuple[str, CloverLayer]]:
    """Every CLOVER layer of a model and its path; with a name, the layers that have this adapter."""
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, CloverLayer)]
    return [(path, layer) for path, layer in layers if adapter_name is None or adapter_name in layer.specs]


def layers_with(model: nn.Module, adapter_name: str) -> list[tuple[str, CloverLayer]]:
    """The layers that have an adapter, and their paths; one at least."""
    if layers := clover_layers(model, adapter_name):
        return layers
    found = sorted({name for _, layer in clover_layers(model) for name in layer.specs})
    raise ValueError(
        f"adapter {adapter_name!r}: expected a model with this CLOVER adapter, found {found or 'none'}; pass "
        "adapter_name=..., or add the adapter first with get_peft_model or load_adapter"
    )


def unwrap_empty_layers(model: nn.Module) -> None:
    """Put the projections of layers without an adapter back in their places."""
    for name, layer in reversed(clover_layers(model)):  # a module inside another one first
        if not layer.specs:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)


def inner_model(model: nn.Module) -> nn.Module:
    """The adapted model inside a `PeftModel` or tuner; partners' paths are relative to it."""
    tuner = model if isinstance(model, BaseTuner) else getattr(model, "base_model", None)
    return tuner.model if isinstance(tuner, BaseTuner) else model


def broadcast_bases(model: nn.Module) -> None:
    """Give all processes the bases of the first one, if machines that differ train together.

    Equal machines compute equal bases, but another linear algebra library may reverse a singular vector. All processes
    must call this, with the model on their devices.

    Args:
        model: a model with CLOVER adapters.
    """
    for _, layer in clover_layers(inner_model(model)):
        layer.forget_maps()
        for name, buffer in layer.named_buffers():
            if name.startswith(FROZEN):
                dist.broadcast(buffer, src=0)


def check_merges(model: nn.Module, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Refuse adapters that cannot be merged, before any is; None stands for the active ones.

    The weights as they are now count as the base's own from here on, unless another tuner has merged around a layer.

    With `safe_merge`, compute every result, as a trial, and refuse those that are not finite. The trial costs one more
    merge, and the memory of one layer's result. The merge itself checks again, because it also reaches layers of other
    tuners, such as trained tokens.
    """
    for path, layer in clover_layers(model):
        if (around := layer_around(model, path)) is not None and around.merged and not layer.merged:
            raise ValueError(
                f"{layer.name}: expected to be merged before the {type(around).__name__} around it, found that one "
                "merged; unmerge it first, and call this again: both are merged then, in order"
            )
        if not layer.merged:
            layer.base_weight.remember_weight()  # no tuner wrote into it: a user who did wants the new weight merged
        wanted = layer.active_adapters if adapter_names is None else adapter_names
        names = list(dict.fromkeys([*layer.merged_adapters, *(name for name in wanted if name in layer.specs)]))
        if not names:
            continue
        check_merge(layer, names)
        if safe_merge:
            with layer.base_weight.whole():
                layer.merged_tensors(names, safe_merge=True)


def layer_around(model: nn.Module, path: str) -> Any:
    """The other tuner's layer that the layer at `path` is inside of; None if there is none."""
    around: Any = model.get_submodule(path.rpartition(".")[0])
    return around if isinstance(around, BaseTunerLayer) and not isinstance(around, CloverLayer) else None


@contextmanager
def warning_of_rounding(model: nn.Module) -> Iterator[None]:
    """Warn once if the merges of this context, into quantised weights, have lost much of the update to rounding."""
    layers = {path: layer for path, layer in clover_layers(model) if layer.quantization_backend is not None}
    for layer in layers.values():
        layer.base_weight.rounding = (0.0, 0.0)
    yield
    roundings = {path: layer.base_weight.rounding for path, layer in layers.items()}
    merged = {path: rounding for path, rounding in roundings.items() if rounding[0] > 0}
    if not merged:
        return
    changes, errors = (sum(column) for column in zip(*merged.values(), strict=True))
    if (lost := (errors / changes) ** 0.5) > MUCH_ROUNDED:
        worst = max(merged, key=lambda path: merged[path][1] / merged[path][0])
        warn(
            f"merged into {layers[worst].base_weight.precision} weights, whose rounding is {lost:.0%} of the "
            f"update (worst: {worst}, {(merged[worst][1] / merged[worst][0]) ** 0.5:.0%}); unmerge, call "
            "clover_peft.dequantize(model) and merge then, to lose nothing",
        )
