"""New, narrower projections in place of an attention block's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ...base_model.attention import AttentionBlock
from ...base_model.slices import HeadSlice
from ..directions import Directions
from ..pairs import Pair
from .modules import narrow, undone_on_error


class Change(NamedTuple):
    """What becomes of one pair of a block.

    Attributes:
        pair: the pair.
        directions: its directions.
        down: (H, d, d) float64, C, from `Directions.factors`.
        back: (G, d, d) float64, E.
        width: directions that all heads of the pair are given room for.
    """

    pair: Pair
    directions: Directions
    down: Tensor
    back: Tensor
    width: int


def rewrite(block: AttentionBlock, pairs: Sequence[Change]) -> None:
    """Put narrower projections in place of a block's, those that change; in float64, one block at a time.

    After an error the block is as it was.
    """
    with undone_on_error(block):
        _rewrite(block, pairs)


def _rewrite(block: AttentionBlock, pairs: Sequence[Change]) -> None:
    at = pairs[0].down.device
    changed = {part for change in pairs for part in ("qk" if change.pair.kind == "qk" else "v")}
    parts: dict[str, Tensor] = {}  # rows of a head's features, the bias as the last row: (D + 1, heads, d)
    slices: dict[str, HeadSlice] = {}
    for name in block.present():
        layout = block.layout(block.prefix + name, name)
        slices |= layout
        if changed & set(layout):
            projection = block.module_of(name)
            rows = _rows(projection).to(at).double()
            if projection.bias is not None:
                rows = torch.cat([rows, projection.bias.to(rows).unsqueeze(0)])
            parts |= {part: heads.blocks(rows, heads.dim) for part, heads in layout.items()}
    output, read = block.module_of(block.family.output), None
    bias = None if output.bias is None else output.bias.to(at).double()
    for pair, directions, down, back, width in pairs:
        down, back = down[:, :width], back[..., :width]
        if pair.kind == "vo":
            read = pair.partner.heads.blocks(_rows(output).mT.to(at).double(), pair.heads.dim)
            if (constant := directions.constant(down, back)) is not None:
                lost = torch.einsum("ogd,gd->o", read, constant)
                bias = lost if bias is None else bias + lost
            parts["v"] = torch.einsum("nhd,hwd->nhw", parts["v"], down)
            read = torch.einsum("ogd,gdw->ogw", read, back)
            continue
        for part, heads, factor in (("k", pair.heads, down.mT), ("q", pair.partner.heads, back)):
            start, whole = heads.offset - slices[part].offset, parts[part]
            first, middle, last = whole.split([start, heads.dim, whole.shape[-1] - start - heads.dim], dim=-1)
            parts[part] = torch.cat([first, torch.einsum("nhd,hdw->nhw", middle, factor), last], dim=-1)
    if output.bias is None and bias is not None and not bool(bias.any()):
        bias = None
    dims = {part: parts[part].shape[-1] if part in parts else slices[part].dim for part in "kv"}
    narrow(block, dims["k"], dims["v"], bias is not None)
    for name in block.present():
        layout = block.layout(block.prefix + name, name)
        projection = block.module_of(name)
        if not changed & set(layout):
            continue
        for part, heads in layout.items():
            rows = _rows(projection)
            place = heads.heads(rows)
            place.copy_(parts[part][: len(rows)].reshape(place.shape))
            if projection.bias is not None:
                place = heads.heads(projection.bias)
                place.copy_(parts[part][-1].reshape(place.shape))
    output = block.module_of(block.family.output)
    if read is not None:
        _rows(output).copy_(read.flatten(1).mT)
    if bias is not None:
        output.bias.copy_(bias)


def _rows(projection: Any) -> Tensor:
    """The weight as (in, out), a view."""
    return projection.weight if isinstance(projection, Conv1D) else projection.weight.mT
