"""Tensors that keep their precision whatever casts, shards or moves the module that holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class GuardedTensors(nn.Module):
    """Named tensors, parameters or buffers, that keep at least float32 whatever the model is cast to.

    Args:
        tensors: name -> tensor.
        trainable: make them parameters.
        persistent: whether the model's state dict has the buffers.
        guarded: also undo casts that replace a parameter's `data`. TRL casts all trained parameters of a quantised
            model to bfloat16 in this way.
    """

    def __init__(
        self, tensors: dict[str, Tensor], trainable: bool = False, persistent: bool = True, guarded: bool = False
    ) -> None:
        super().__init__()
        # The parameters' `data`: it shares their storage until somebody replaces it.
        self._kept: dict[str, Tensor] | None = {} if guarded else None
        for name, tensor in tensors.items():
            if trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor, persistent=persistent)
        self._keep()

    def _keep(self) -> None:
        if self._kept is not None:
            self._kept = {name: parameter.data for name, parameter in self.named_parameters()}

    def restore(self) -> None:
        """Give guarded parameters their precision back."""
        for name, kept in (self._kept or {}).items():
            parameter = self.get_parameter(name)
            if parameter.dtype.itemsize < kept.dtype.itemsize:
                same = kept.shape == parameter.shape and torch.equal(kept.to(parameter), parameter)
                parameter.data = kept.to(parameter.device) if same else parameter.data.to(kept.dtype)
        self._keep()

    def train(self, mode: bool = True) -> GuardedTensors:
        """As in torch. Trainers call it after they cast parameters and before the first step."""
        self.restore()
        return super().train(mode)

    def forward(self, name: str, use: Callable[[Tensor], Tensor]) -> Tensor:
        """`use` of a tensor. DeepSpeed's ZeRO-3 gathers parameters for a call of their module, and only then."""
        return use(getattr(self, name))  # FSDP1 puts plain tensors in the parameters' places

    def registered(self, name: str) -> Tensor | None:
        """The parameter or buffer of this name; None if something else was put in its place."""
        return self._parameters.get(name, self._buffers.get(name))

    def devices(self) -> set[torch.device]:
        """The devices of its parameters and buffers."""
        held = (*self._parameters.values(), *self._buffers.values())
        return {tensor.device for tensor in held if tensor is not None}

    def get(self, name: str) -> Tensor | None:
        """The tensor of this name, or None if there is none."""
        return getattr(self, name, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GuardedTensors:
        def at_least_float32(tensor: Tensor) -> Tensor:
            if tensor.is_meta and not isinstance(tensor, nn.Parameter):
                return tensor  # not loaded yet: `to_empty` would give it arbitrary numbers
            result = fn(tensor)
            if result.is_floating_point() and result.dtype.itemsize < 4 <= tensor.dtype.itemsize:
                return tensor.to(result.device)
            return result

        self.restore()
        super()._apply(at_least_float32, recurse)
        self._keep()
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        self.restore()
        # Load every tensor that the state dict offers, also buffers that the model's own state dict leaves out.
        left_out = self._non_persistent_buffers_set
        self._non_persistent_buffers_set = {name for name in left_out if prefix + name not in state_dict}
        try:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        finally:
            self._non_persistent_buffers_set = left_out
            self._keep()


def is_plain(tensor: Tensor | None) -> bool:
    """Whether a tensor is one of torch's own, whose numbers are here and whole, not sharded or offloaded.

    Torch does not count writes to inference tensors, so these are not plain.
    """
    if tensor is None or type(tensor) not in (Tensor, nn.Parameter):
        return False
    return not (tensor.is_meta or tensor.is_inference() or hasattr(tensor, "ds_id"))
