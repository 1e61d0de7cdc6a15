"""Replaces the projections of an attention block by narrower ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...base_model.attention import AttentionBlock
from ...base_model.slices import HeadSlice
from ..directions import Directions, through
from ..pairs import Pair
from .modules import narrow, undone_on_error


class Change(NamedTuple):
    """The change to one pair of an attention block.

    Attributes:
        pair: the pair.
        directions: its directions.
        down: (H, d, d) float64, C, from `Directions.factors`.
        back: (G, d, d) or (G, d, G, r) float64, E.
        width: the new width of all its heads.
    """

    pair: Pair
    directions: Directions
    down: Tensor
    back: Tensor
    width: int


def rewrite(changes: Sequence[Change]) -> None:
    """Replace the projections of one attention block that change by narrower ones; computed in float64.

    After an error the block is as it was.

    Args:
        changes: the changes to pairs of the same attention block.
    """
    attention = changes[0].pair.attention
    with undone_on_error(attention):
        _rewrite(attention, changes)


def _rewrite(attention: AttentionBlock, changes: Sequence[Change]) -> None:
    at = changes[0].down.device
    changed = {part for change in changes for part in ("qk" if change.pair.kind == "qk" else "v")}
    parts: dict[str, Tensor] = {}  # (D + 1, heads, d): rows of the heads' features; the last row is the bias
    slices: dict[str, HeadSlice] = {}
    for name in attention.present():
        layout = attention.layout(attention.prefix + name, name)
        slices |= layout
        if changed & set(layout):
            projection = attention.module_of(name)
            rows = _rows(projection).to(at).double()
            if projection.bias is not None:
                rows = torch.cat([rows, projection.bias.to(rows).unsqueeze(0)])
            parts |= {part: heads.blocks(rows, heads.dim) for part, heads in layout.items()}
    output, read = attention.module_of(attention.family.output), None
    bias = None if output.bias is None else output.bias.to(at).double()
    for pair, directions, down, back, width in changes:
        down, back = down[:, :width], back[..., :width]
        if pair.kind == "vo":
            read = pair.partner.heads.blocks(_rows(output).mT.to(at).double(), pair.heads.dim)
            if (constant := directions.constant(down, back)) is not None:
                lost = torch.einsum("ogd,gd->o", read, constant)
                bias = lost if bias is None else bias + lost
            parts["v"] = torch.einsum("nhd,hwd->nhw", parts["v"], down)
            read = through(read, back)
            read = nn.functional.pad(read, (0, width - read.shape[-1]))
            continue
        for part, heads, factor in (("k", pair.heads, down.mT), ("q", pair.partner.heads, back)):
            # Under partial rotation a pair is a part of its heads, and their other features stay.
            start, whole = heads.offset - slices[part].offset, parts[part]
            first, middle, last = whole.split([start, heads.dim, whole.shape[-1] - start - heads.dim], dim=-1)
            parts[part] = torch.cat([first, torch.einsum("nhd,hdw->nhw", middle, factor), last], dim=-1)
    if output.bias is None and bias is not None and not bool(bias.any()):
        bias = None
    dims = {part: heads.dim for part, heads in slices.items()} | {part: rows.shape[-1] for part, rows in parts.items()}
    narrow(attention, dims.get("k", 0), dims["v"], bias is not None)  # no keys, where all of them are rotated
    for name in attention.present():
        layout = attention.layout(attention.prefix + name, name)
        projection = attention.module_of(name)
        if not changed & set(layout):
            continue
        for part, heads in layout.items():
            rows = _rows(projection)
            place = heads.heads(rows)
            place.copy_(parts[part][: len(rows)].reshape(place.shape))
            if projection.bias is not None:
                place = heads.heads(projection.bias)
                place.copy_(parts[part][-1].reshape(place.shape))
    output = attention.module_of(attention.family.output)
    if read is not None:
        _rows(output).copy_(read.flatten(1).mT)
    if bias is not None:
        output.bias.copy_(bias)


def _rows(projection: Any) -> Tensor:
    """The weight as (in, out), a view."""
    return projection.weight if isinstance(projection, Conv1D) else projection.weight.mT
