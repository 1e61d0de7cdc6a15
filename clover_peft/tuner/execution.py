"""How a layer applies its adapters' maps in one pass: `choose_form` decides it, `apply_adapters` does it.

`MapCache` keeps folded maps of frozen adapters for the decoding steps that follow a pass.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..runtime.tensors import is_plain
from ..runtime.tracing import is_captured, is_traced, shares_state
from .adapter_tensors import AdapterTensors
from .fused_maps import apply_maps
from .maps import HeadMap
from .model_maps import maps_of_model


class _Seen(NamedTuple):
    """A tensor that maps were folded from, with torch's count of writes to it, and a view of its numbers."""

    tensor: Tensor
    version: int
    numbers: Tensor  # also keeps the memory alive, so that no other tensor gets its address


class MapCache:
    """Folded maps by the adapters, in order, and the dtype that they were folded for.

    A pass of several tokens a sequence folds the maps and keeps them; passes of one token, which continue a sequence,
    use them. Kept maps are given up if one of their tensors was replaced, moved or written to. Torch does not count
    writes by fused optimizers, by collectives and through `tensor.data`: these take effect in the next pass of several
    tokens. Only maps of frozen adapters are kept, and the layer clears them in `train()`, `eval()` and passes with
    gradients.

    Attributes:
        is_stale: clear the cache before its next use; a compiled pass, which cannot clear the cache, sets it.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[list[HeadMap], list[_Seen], Sequence[float]]] = {}
        self.is_stale = False

    def renew(
        self,
        key: Hashable,
        sources: Sequence[Tensor | None],
        scales: Sequence[float],
        fold: Callable[[], list[HeadMap]],
    ) -> list[HeadMap] | None:
        """The maps for `key`, folded now from `sources`, and kept; None if they cannot be kept."""
        if self.is_stale:
            self.clear()
        self._entries.pop(key, None)
        if not all(map(_can_watch, sources)):
            return None
        maps = fold()
        if all(type(m.matrix) is Tensor for m in maps):  # and no FakeTensor of a tracer
            self._entries[key] = (
                maps,
                [_Seen(t, t._version, t.detach()) for t in cast(list[Tensor], sources)],
                scales,
            )
        return maps

    def find(self, key: Hashable, sources: Sequence[Tensor | None], scales: Sequence[float]) -> list[HeadMap] | None:
        """The maps that were kept for `key`; None if there are none, or they are out of date."""
        if self.is_stale:
            self.clear()
        if key not in self._entries:
            return None
        maps, seen, scaled = self._entries[key]
        if scaled == scales and all(map(_is_same, seen, sources)):
            return maps
        del self._entries[key]
        return None

    def clear(self) -> None:
        """Forget all maps."""
        self._entries.clear()
        self.is_stale = False

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple[type[MapCache], tuple[()]]:
        return MapCache, ()  # a copy starts empty


def _is_same(seen: _Seen, now: Tensor | None) -> bool:
    """Whether a tensor is the one that was read, and is still frozen and, as far as torch counts, unchanged."""
    if now is not seen.tensor or now.requires_grad:
        return False
    return now._version == seen.version and now.data_ptr() == seen.numbers.data_ptr()


def _can_watch(tensor: Tensor | None) -> bool:
    """Whether changes of a tensor can be noticed: it is frozen, here, whole, and of one process only."""
    if tensor is None or not is_plain(tensor) or tensor.requires_grad:
        return False
    return not (tensor.device.type == "cpu" and tensor.is_shared())


class Form(enum.Enum):
    """A way to compute `z + E dS C z`; all forms give the same numbers up to rounding.

    Attributes:
        CACHED: with `E dS C`, folded in the last pass of several tokens a sequence.
        FOLDED: with `E dS C`, folded for this pass; of frozen adapters, it is kept for the passes that follow.
        TOGETHER: with `E dS C`, folded for this pass together with the maps of the model's other layers.
        STAGED: with C, dS and E one after the other, which is less work for a few tokens.
    """

    CACHED = "cached"
    FOLDED = "folded"
    TOGETHER = "together"
    STAGED = "staged"


def choose_form(*, has_kept_maps: bool, has_model_maps: bool, is_decoding: bool, has_dropout: bool) -> Form:
    """The form of a pass.

    Args:
        has_kept_maps: folded maps of frozen adapters were kept, and the pass continues a sequence.
        has_model_maps: the maps of the model's layers were folded together, and this layer's are among them.
        is_decoding: no gradients, and one token a sequence, fewer of them than a block has features.
        has_dropout: dropout is applied to the maps' input.
    """
    if has_kept_maps:
        return Form.CACHED
    if has_model_maps:
        return Form.TOGETHER
    # A pass of few tokens that is not decoding is folded too: it then rounds like the same adapter in training.
    return Form.STAGED if is_decoding and not has_dropout else Form.FOLDED


def apply_adapters(layer: AdapterTensors, z: Tensor, adapter_names: Sequence[str], cache: MapCache) -> Tensor:
    """`z + sum_i E_i dS_i C_i z` over the layer's adapters of these names, with their dropout in training.

    Args:
        layer: the layer.
        z: (..., out_features), the base projection's output.
        adapter_names: the adapters; names that the layer does not have are ignored.
        cache: the layer's kept maps; a pass with gradients clears them.

    Returns:
        (..., out_features), dtype of `z`.
    """
    names = [name for name in adapter_names if name in layer.specs]
    if not names:
        return z
    traced, differentiated = is_traced(), layer.training or torch.is_grad_enabled()
    is_replica = shares_state(layer)
    kept = folded = together = None
    if not (differentiated or traced or is_replica or is_captured(z)):
        if z.ndim > 2 and z.shape[-2] == 1:
            kept = cache.find(*_sources(layer, names, z.dtype))
        elif z.ndim > 2:
            folded = cache.renew(*_sources(layer, names, z.dtype), lambda: [m.to(z.dtype) for m in layer.maps(names)])
    elif not torch.compiler.is_compiling():
        cache.clear()
    elif differentiated and not torch.compiler.is_exporting():
        cache.is_stale = True
    dropouts = (layer.clover_dropout[name] for name in names) if layer.training else ()
    has_dropout = any(getattr(dropout, "p", 0.0) for dropout in dropouts)
    if torch.is_grad_enabled() and not (has_dropout or traced or is_replica or is_captured(z)):
        together = maps_of_model(layer, names)
    form = choose_form(
        has_kept_maps=kept is not None,
        has_model_maps=together is not None,
        is_decoding=kept is None and not torch.is_grad_enabled() and _is_decoding(layer, z, names, traced),
        has_dropout=has_dropout,
    )
    if form is Form.STAGED:
        wide = z.to(torch.promote_types(z.dtype, torch.float32))  # The sum of the maps is in float32 too.
        return apply_maps(wide, layer.staged_maps(names)).to(z.dtype)
    maps = {Form.CACHED: kept, Form.TOGETHER: together, Form.FOLDED: folded}[form]
    maps = layer.maps(names, dropout=True) if maps is None else maps
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
