"""How a layer applies its adapters' maps in one pass: `choose_form` decides it, `apply_adapters` does it."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..runtime.tracing import is_captured, is_traced
from .adapter_tensors import AdapterTensors
from .fused_maps import apply_maps
from .map_cache import MapCache
from .maps import HeadMap


class Form(enum.Enum):
    """A way to compute `z + E dS C z`; all give the same numbers but for rounding.

    Attributes:
        CACHED: by `E dS C`, folded in an earlier pass and kept.
        FOLDED: by `E dS C`, folded for this pass.
        STAGED: by C, dS and E one after the other, which is less work for a few tokens.
    """

    CACHED = "cached"
    FOLDED = "folded"
    STAGED = "staged"


class Pass(NamedTuple):
    """What decides the form of one pass.

    Attributes:
        differentiated: torch records gradients, or the layer is in training mode.
        traced: torch records or transforms the operations themselves.
        compiled: by `torch.compile` or `torch.export`.
        keeps_nothing: a CUDA graph is captured, or the layer is a replica of `DataParallel`.
        is_decoding: one token a sequence, fewer of them than a block has features, and nothing is differentiated.
        has_dropout: dropout is applied to the maps' input.
    """

    differentiated: bool
    traced: bool
    compiled: bool
    keeps_nothing: bool
    is_decoding: bool
    has_dropout: bool


def choose_form(p: Pass, cacheable: bool = True) -> Form:
    """The form of a pass.

    Args:
        p: the pass.
        cacheable: the adapters are frozen, so that folded maps may be kept.
    """
    if cacheable and not (p.differentiated or p.traced or p.keeps_nothing):
        return Form.CACHED
    # Other passes of few tokens are folded as well: they then round as those of the same adapter in training.
    return Form.STAGED if p.is_decoding and not p.has_dropout else Form.FOLDED


def apply_adapters(layer: AdapterTensors, z: Tensor, adapter_names: Sequence[str], cache: MapCache) -> Tensor:
    """`z + sum_i E_i dS_i C_i z` over the adapters, with their dropout in training.

    Args:
        layer: holds the adapters.
        z: (..., out_features), the base projection's output.
        adapter_names: the adapters; those that the layer does not have are passed over.
        cache: of the layer; cleared by differentiated passes.

    Returns:
        (..., out_features), dtype of `z`.
    """
    names = [name for name in adapter_names if name in layer.specs]
    this = _describe(layer, z, names)
    if this.differentiated or this.traced or this.keeps_nothing:
        _invalidate(cache, this)
    elif (kept := _kept_maps(layer, names, z.dtype, cache)) is not None:
        return apply_maps(z, kept)
    if choose_form(this, cacheable=False) is Form.STAGED:
        wide = z.to(torch.promote_types(z.dtype, torch.float32))  # as E, S and C are, which are larger
        return apply_maps(wide, layer.staged_maps(names)).to(z.dtype)
    return apply_maps(z, layer.maps(names, dropout=True), output_is_kept(layer, names))


def _describe(layer: AdapterTensors, z: Tensor, names: Sequence[str]) -> Pass:
    grad, traced, compiled = torch.is_grad_enabled(), is_traced(), torch.compiler.is_compiling()
    # A tracer's sizes are tensors, and cannot be compared.
    sizes_are_known = compiled or not traced
    return Pass(
        differentiated=layer.training or grad,
        traced=traced,
        compiled=compiled,
        keeps_nothing=is_captured(z) or bool(layer.__dict__.get("_is_replica")),
        is_decoding=not grad and sizes_are_known and _is_decoding(layer, z, names),
        has_dropout=layer.training and any(getattr(layer.clover_dropout[name], "p", 0.0) for name in names),
    )


def _is_decoding(layer: AdapterTensors, z: Tensor, names: Sequence[str]) -> bool:
    if z.ndim < 3 or not statically_known_true(z.shape[-2] == 1):
        return False
    sizes = [spec.size for name in names for spec in layer.specs[name]]
    smallest, sequences = min(sizes, default=0), math.prod(z.shape[:-2])
    # What is not known while compiling must not be asked for: the graph is to hold for any number of sequences.
    if torch.compiler.is_exporting():
        return bool(statically_known_true(sequences < smallest))
    return not statically_known_true(sequences >= smallest)


def _invalidate(cache: MapCache, this: Pass) -> None:
    if not this.compiled:
        cache.clear()
    elif this.differentiated and not torch.compiler.is_exporting():
        cache.is_stale = True


def _kept_maps(
    layer: AdapterTensors, names: Sequence[str], dtype: torch.dtype, cache: MapCache
) -> list[HeadMap] | None:
    """The maps of frozen adapters, folded once; None for others."""
    sources = [
        getattr(layer, attribute)[name].registered(spec.name)
        for name in names
        for spec in layer.specs[name]
        for attribute in ("clover_S", *spec.base_shapes)
    ]
    return cache.get((*names, dtype), sources, lambda: [m.to(dtype) for m in layer.maps(names)])


def output_is_kept(layer: AdapterTensors, names: Sequence[str]) -> bool:
    """Whether what follows may keep the layer's output for its backward pass; with a low-rank part, that is no longer
    the output of the maps."""
    specs = (spec for name in names for spec in layer.specs[name])
    return any(spec.output_is_kept for spec in specs) and not any(name in layer.clover_A for name in names)
