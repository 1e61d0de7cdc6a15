"""How a layer applies its adapters' maps in one pass."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..runtime.tracing import is_captured, is_traced, shares_state
from .adapter_tensors import AdapterTensors
from .fused_maps import apply_maps
from .map_cache import MapCache
from .model_maps import maps_of_model


def apply_adapters(layer: AdapterTensors, z: Tensor, adapter_names: Sequence[str], cache: MapCache) -> Tensor:
    """`z + sum_i E_i dS_i C_i z` over the layer's adapters of these names, with their dropout in training.

    It is computed in one of four forms, which give the same numbers up to rounding:

    - cached: with `E dS C`, folded in the last pass of several tokens a sequence, while the adapters are frozen;
    - together: with `E dS C`, folded for this pass together with the maps of the model's other layers;
    - staged: with C, dS and E one after the other, which is less work for a few tokens;
    - folded: with `E dS C`, folded for this pass.

    Args:
        layer: the layer.
        z: (..., out_features), the base projection's output.
        adapter_names: the adapters; names that the layer does not have are ignored.
        cache: the layer's kept maps; a pass with gradients clears them.

    Returns:
        (..., out_features), dtype of `z`.
    """
    names = [name for name in adapter_names if name in layer.specs]
    traced, differentiated = is_traced(), layer.training or torch.is_grad_enabled()
    is_replica = shares_state(layer)
    if not (differentiated or traced or is_replica or is_captured(z)):
        kept = None
        if z.ndim > 2 and z.shape[-2] == 1:
            kept = cache.find(*_sources(layer, names, z.dtype))
        elif z.ndim > 2:
            kept = cache.renew(*_sources(layer, names, z.dtype), lambda: [m.to(z.dtype) for m in layer.maps(names)])
        if kept is not None:
            return apply_maps(z, kept)
    elif not torch.compiler.is_compiling():
        cache.clear()
    elif differentiated and not torch.compiler.is_exporting():
        cache.is_stale = True
    has_dropout = layer.training and any(getattr(layer.clover_dropout[name], "p", 0.0) for name in names)
    maps = None
    if torch.is_grad_enabled():
        if not (has_dropout or traced or is_replica or is_captured(z)):
            maps = maps_of_model(layer, names)
    # A pass of few tokens that is not decoding is folded too: it then rounds like the same adapter in training.
    elif not has_dropout and _is_decoding(layer, z, names, traced):
        wide = z.to(torch.promote_types(z.dtype, torch.float32))  # cheaper than casting the larger E, S and C
        return apply_maps(wide, layer.staged_maps(names)).to(z.dtype)
    if maps is None:
        maps = layer.maps(names, dropout=True)
    return apply_maps(z, maps, layer.output_is_kept(names))


def _is_decoding(layer: AdapterTensors, z: Tensor, names: Sequence[str], traced: bool) -> bool:
    if traced and not torch.compiler.is_compiling():
        return False  # sizes are tensors there, and cannot be compared
    if z.ndim < 3 or not statically_known_true(z.shape[-2] == 1):
        return False
    sizes = [spec.size for name in names for spec in layer.specs[name]]  # the compiler takes no generator
    smallest, sequences = min(sizes, default=0), math.prod(z.shape[:-2])
    # A question about a size that the compiler does not know would tie its graph to one number of sequences.
    if torch.compiler.is_exporting():
        return bool(statically_known_true(sequences < smallest))
    return not statically_known_true(sequences >= smallest)


def _sources(
    layer: AdapterTensors, names: Sequence[str], dtype: torch.dtype
) -> tuple[Hashable, list[Tensor | None], list[float]]:
    """What folded maps depend on: the key that they are kept under, the tensors, and the scales."""
    tensors = [t for name in names for spec in layer.specs[name] for t in layer.registered(name, spec).values()]
    return (*names, dtype), tensors, [layer.scaling[name] for name in names]
