"""Maps that were folded for inference, kept until something they were made of changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .head_map import HeadMap


class _Source(NamedTuple):
    """A tensor as it was, and the places where it is looked up."""

    adapters: dict[str, Any]  # of one attribute of a layer
    adapter_name: str
    module: nn.Module
    tensors: dict[str, Any]  # parameters or buffers of `module`
    name: str
    tensor: Tensor
    version: int
    address: int
    storage: Tensor  # kept alive, so that nothing else comes to lie at its address

    @classmethod
    def of(cls, adapters: nn.ModuleDict, adapter_name: str, name: str) -> _Source | None:
        """One of an adapter; None where changes may not be seen: trained, sharded, shared, offloaded, or made in
        inference mode."""
        module = adapters[adapter_name]
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for holder in holders:
            tensor: Any = holder.get(name)
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference() or tensor.requires_grad:
                continue
            shared = tensor.device.type == "cpu" and tensor.is_shared()  # with processes that may write to it
            if not (shared or tensor.is_meta or hasattr(tensor, "ds_id")):
                place = (adapters._modules, adapter_name, module, holder, name)
                return cls(*place, tensor, tensor._version, tensor.data_ptr(), tensor.detach())
        return None


class FoldedMaps:
    """Maps by what they were folded for: the adapters, in order, and a dtype.

    They are folded again when a tensor was replaced, moved, or written to in any way that torch counts. Much that
    writes is not counted: fused optimizers, collectives, `tensor.data`. Therefore maps are kept of frozen adapters
    alone, as `PeftModel.from_pretrained` loads them, and the layer clears them in `train()`, in `eval()` and in
    differentiated passes.

    Attributes:
        out_of_date: they are to be cleared at the next look, as compiled passes say, which cannot do it themselves.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[list[HeadMap], list[_Source]]] = {}
        self.out_of_date = False

    def get(
        self,
        key: Hashable,
        read: Iterable[tuple[nn.ModuleDict, str, str]],
        fold: Callable[[], list[HeadMap]],
    ) -> list[HeadMap] | None:
        """The maps for `key`, folded now if they are not there or out of date; None where they cannot be kept.

        Args:
            key: what they are for.
            read: the tensors that `fold` reads: of which modules, of which adapter, and their names.
            fold: makes them.
        """
        if self.out_of_date:
            self.clear()
        if (found := self._entries.pop(key, None)) is not None:
            maps, sources = found
            for adapters_now, adapter_name, module, tensors, name, tensor, version, address, _ in sources:
                if (
                    adapters_now.get(adapter_name) is not module
                    or tensors.get(name) is not tensor
                    or tensor.requires_grad
                    or tensor._version != version
                    or tensor.data_ptr() != address
                ):
                    break
            else:
                self._entries[key] = found
                return maps
        sources = []
        for modules, adapter_name, name in read:
            if (source := _Source.of(modules, adapter_name, name)) is None:
                return None
            sources.append(source)
        maps = fold()
        if all(type(m.matrix) is Tensor for m in maps):  # no stand-in of a tracer
            self._entries[key] = (maps, sources)
        return maps

    def clear(self) -> None:
        """Forget all maps."""
        self._entries.clear()
        self.out_of_date = False

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple[type[FoldedMaps], tuple[()]]:
        return FoldedMaps, ()  # a copy starts without any
