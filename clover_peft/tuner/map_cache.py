"""`MapCache`: folded maps of frozen adapters, kept for the decoding steps that follow a pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, cast

from torch import Tensor

from ..runtime.tensors import is_plain
from .maps import HeadMap


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
        """The maps for `key`, folded now, and kept; None if they cannot be kept.

        Args:
            key: adapters and dtype.
            sources: the tensors that `fold` reads now.
            scales: of the adapters.
            fold: computes the maps.
        """
        if self.is_stale:
            self.clear()
        self._entries.pop(key, None)
        if not all(map(_can_watch, sources)):
            return None
        maps = fold()
        if all(type(m.matrix) is Tensor for m in maps):  # no tracer's stand-in
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
