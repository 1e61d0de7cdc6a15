"""Models whose residual stream is narrower than their config says: the layers, the record, and how they are loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..base_model.rewritten import apply_when_made, become, check_version
from .stream import STREAMS, Stream, empty, head_of, trunk_of

# The entry of a model's config that says how it was sliced, and its form.
RECORD = "clover_slicing"
VERSION = 1


class ShortcutNorm(nn.Module):
    """An RMSNorm without gains, and the matrix of the shortcut past the block behind it.

    The gains are folded into the block. The matrix has their name on disk, so that a class without shortcuts finds a
    tensor of an unexpected size and stops, instead of computing something else.

    Args:
        weight: (d, d), from the basis of this block to the basis of the next, any floating dtype.
        eps: added to the mean square.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: Tensor) -> Tensor:
        """x / sqrt(mean square + eps), (..., d), at least in float32."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def shortcut(self, x: Tensor) -> Tensor:
        """(..., d), what passes the block, in the next block's basis."""
        return linear(x, self.weight)


def add_shortcuts(layer: Any, stream: Stream, matrices: tuple[Tensor, Tensor]) -> None:
    """Let a layer multiply what passes its attention and its MLP by a matrix.

    Args:
        layer: a layer of a stock class, in place.
        stream: its family's.
        matrices: (d, d) for each of its two blocks.
    """
    for block, matrix in zip(stream.blocks, matrices, strict=True):
        norm = layer.get_submodule(block.norm)
        made = ShortcutNorm(matrix, norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)
        made.weight.requires_grad_(any(parameter.requires_grad for parameter in norm.parameters()))
        setattr(layer, block.norm, made.train(norm.training))
    become(layer, _sliced, stream)


def _sliced(stock: type[nn.Module], stream: Stream) -> tuple[str, dict[str, Any]]:
    """A layer's class with a matrix on its shortcuts; of the same name, by which transformers splits models."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        for block in stream.blocks:
            norm = getattr(self, block.norm)
            hidden_states = norm.shortcut(hidden_states) + block.run(self, norm(hidden_states), **kwargs)
        return hidden_states

    return stock.__name__, {"forward": forward}


def write_record(model: Any, width: int, rotation: str) -> None:
    """Enter in a model's config that its residual stream has another width than the config says."""
    setattr(model.config, RECORD, {"version": VERSION, "width": width, "rotation": rotation})


def read_record(config: Any) -> dict[str, Any] | None:
    """How a model was sliced, from its config; None if it was not, or if its class describes all.

    Raises:
        ValueError: if the entry is none that `slice_hidden_size` writes.
    """
    record = getattr(config, RECORD, None)
    if record is None:
        return None
    record = check_version(record, RECORD, VERSION, "sliced")
    width, rotation = record.get("width"), record.get("rotation")
    if not isinstance(width, int) or width < 1 or rotation not in ("shared", "per_block"):
        raise ValueError(f"{RECORD} in the config: expected a width and a rotation, found {record!r}")
    if config.model_type not in STREAMS:
        raise ValueError(f"{RECORD} in the config: expected one of {', '.join(STREAMS)}, found {config.model_type!r}")
    return record


def apply_record(model: Any) -> None:
    """Give a model the residual stream that its config has an entry for; a part that has it already is left alone."""
    record = read_record(model.config)
    if record is None:
        return
    stream, width, trunk = STREAMS[model.config.model_type], record["width"], trunk_of(model)
    if model.base_model is not model and head_of(model) is None:
        raise ValueError(
            f"{type(model).__name__}: expected a causal language model or its trunk, because a sliced model's config "
            "has another hidden size for other heads; load it with AutoModelForCausalLM"
        )
    empty(model, stream, width)
    if record["rotation"] == "per_block":
        for layer in trunk.layers:
            if not isinstance(layer.get_submodule(stream.attention.norm), ShortcutNorm):
                like = layer.get_submodule(stream.attention.norm).weight
                eye = torch.eye(width, dtype=like.dtype, device=like.device)
                add_shortcuts(layer, stream, (eye, eye.clone()))


def install() -> None:
    """Let transformers load sliced models; once."""
    apply_when_made(RECORD, apply_record)
