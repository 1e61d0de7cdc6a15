"""`keep_maps`: folded maps of frozen adapters, kept from one pass to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from .maps import HeadMap


class _Seen(NamedTuple):
    """A tensor that maps were folded from, with torch's count of writes to it, and a view of its numbers."""

    tensor: Tensor
    version: int
    numbers: Tensor  # also keeps the memory alive, so that no other tensor gets its address


class MapCache:
    """Folded maps by the adapters, in order, and the dtype that they were folded for.

    Maps are folded again if one of their tensors was replaced, moved or written to. Torch does not count writes by
    fused optimizers, by collectives and through `tensor.data`. So maps are kept inside `keep_maps` alone, and
    only those of frozen adapters; the layer clears them in `train()`, `eval()` and passes with gradients.

    Attributes:
        is_on: maps may be kept.
        is_stale: clear the cache before its next use; a compiled pass, which cannot clear the cache, sets it.
    """

    is_on = False

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[list[HeadMap], list[_Seen]]] = {}
        self.is_stale = False

    def get(
        self, key: Hashable, sources: Sequence[Tensor | None], fold: Callable[[], list[HeadMap]]
    ) -> list[HeadMap] | None:
        """The maps for `key`, folded now if they are missing or out of date; None if they cannot be kept.

        Args:
            key: adapters and dtype.
            sources: the tensors that `fold` reads now.
            fold: computes the maps.
        """
        if self.is_stale:
            self.clear()
        maps, seen = self._entries.pop(key, (None, []))
        if maps is None or len(seen) != len(sources) or not all(map(_is_same, seen, sources)):
            if not all(map(_can_watch, sources)):
                return None
            maps = fold()
            if any(type(m.matrix) is not Tensor for m in maps):  # a tracer's stand-in
                return maps
            seen = [_Seen(t, t._version, t.detach()) for t in sources if t is not None]
        self._entries[key] = (maps, seen)
        return maps

    def clear(self) -> None:
        """Forget all maps."""
        self._entries.clear()
        self.is_stale = False

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple[type[MapCache], tuple[()]]:
        return MapCache, ()  # a copy starts empty, and outside of `keep_maps`


@contextmanager
def keep_maps(model: nn.Module) -> Iterator[None]:
    """Keep the folded maps of frozen adapters inside the context, which decodes faster (as peft's `DoraCaching`).

    A map is folded again if one of its tensors was replaced, moved, loaded or written to. Writes that torch does not
    count (through `tensor.data`, numpy or collectives) are not seen inside the context until `model.eval()` is called;
    outside they always are. Memory: the maps of every adapter that ran, H d^2 numbers a target.

    Args:
        model: a model with CLOVER adapters, in evaluation mode.
    """
    caches = [cache for m in model.modules() if isinstance(cache := getattr(m, "_cache", None), MapCache)]
    before = [cache.is_on for cache in caches]
    for cache in caches:
        cache.is_on = True
    try:
        yield
    finally:
        for cache, was_on in zip(caches, before, strict=True):
            cache.is_on = was_on
            if not was_on:
                cache.clear()


def _is_same(seen: _Seen, now: Tensor | None) -> bool:
    """Whether a tensor is the one that was read, and is still frozen and, as far as torch counts, unchanged."""
    if now is not seen.tensor or now.requires_grad:
        return False
    return now._version == seen.version and now.data_ptr() == seen.numbers.data_ptr()


def _can_watch(tensor: Tensor | None) -> bool:
    """Whether changes of a tensor can be noticed: it is frozen, here, whole, and of one process only."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor is None or tensor.is_inference() or tensor.requires_grad:
        return False
    shared = tensor.device.type == "cpu" and tensor.is_shared()
    return not (shared or tensor.is_meta or hasattr(tensor, "ds_id"))
