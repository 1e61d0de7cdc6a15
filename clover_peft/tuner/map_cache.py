"""`MapCache`: folded maps of frozen adapters, kept from one pass to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .maps import HeadMap


class _Seen(NamedTuple):
    """A tensor that maps were folded from, and how torch counts and places what it holds."""

    tensor: Tensor
    version: int
    address: int
    storage: Tensor  # kept alive, so that nothing else comes to lie at the address


class MapCache:
    """Folded maps by what they were folded for: the adapters, in order, and a dtype.

    Maps are folded again when one of their tensors was replaced, moved or written to. Fused optimizers, collectives
    and `tensor.data` write without torch counting it. So maps are kept of frozen adapters alone, as
    `PeftModel.from_pretrained` loads them, and the layer clears them in `train()`, in `eval()` and in differentiated
    passes.

    Attributes:
        is_stale: clear the cache at the next look; a compiled pass sets it, because it cannot clear the cache itself.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[list[HeadMap], list[_Seen]]] = {}
        self.is_stale = False

    def get(
        self, key: Hashable, sources: Sequence[Tensor | None], fold: Callable[[], list[HeadMap]]
    ) -> list[HeadMap] | None:
        """The maps for `key`, folded now if they are missing or out of date; None where they cannot be kept.

        Args:
            key: what the maps are for.
            sources: the tensors that `fold` reads, as they are now.
            fold: makes the maps.
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
            seen = [_Seen(t, t._version, t.data_ptr(), t.detach()) for t in sources if t is not None]
        self._entries[key] = (maps, seen)
        return maps

    def clear(self) -> None:
        """Forget all maps."""
        self._entries.clear()
        self.is_stale = False

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple[type[MapCache], tuple[()]]:
        return MapCache, ()  # a copy starts without any


def _is_same(seen: _Seen, now: Tensor | None) -> bool:
    """Whether a tensor is the one that was read, still frozen and unchanged as far as torch counts."""
    return (
        now is seen.tensor
        and not now.requires_grad
        and now._version == seen.version
        and now.data_ptr() == seen.address
    )


def _can_watch(tensor: Tensor | None) -> bool:
    """Whether changes of a tensor would be seen: not of one that is trained, sharded, shared between processes,
    offloaded, or made in inference mode."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor is None or tensor.is_inference() or tensor.requires_grad:
        return False
    shared = tensor.device.type == "cpu" and tensor.is_shared()
    return not (shared or tensor.is_meta or hasattr(tensor, "ds_id"))
