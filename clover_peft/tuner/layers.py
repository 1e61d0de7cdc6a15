"""The CLOVER layers of a model."""

from __future__ import annotations

import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .adapter_tensors import FROZEN
from .layer import CloverLayer


def clover_layers(model: nn.Module, adapter_name: str | None = None) -> list[tuple[str, CloverLayer]]:
    """Every CLOVER layer of a model and its path; with a name, the layers that have this adapter."""
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, CloverLayer)]
    return [(path, layer) for path, layer in layers if adapter_name is None or adapter_name in layer.specs]


def layers_with(model: nn.Module, adapter_name: str) -> list[tuple[str, CloverLayer]]:
    """The layers that have an adapter, and their paths.

    Raises:
        ValueError: if there are none.
    """
    if layers := clover_layers(model, adapter_name):
        return layers
    found = sorted({name for _, layer in clover_layers(model) for name in layer.specs})
    raise ValueError(
        f"adapter {adapter_name!r}: expected a model with this CLOVER adapter, found {found or 'none'}; pass "
        "adapter_name=..., or add the adapter first with get_peft_model or load_adapter"
    )


def unwrap_empty_layers(model: nn.Module) -> None:
    """Put the projections of layers without an adapter back in their places."""
    for name, layer in reversed(clover_layers(model)):  # a module inside another one first
        if not layer.specs:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)


def inner_model(model: nn.Module) -> nn.Module:
    """The adapted model inside a `PeftModel` or tuner; partners' paths are relative to it."""
    tuner = model if isinstance(model, BaseTuner) else getattr(model, "base_model", None)
    return tuner.model if isinstance(tuner, BaseTuner) else model


def broadcast_bases(model: nn.Module) -> None:
    """Give all processes the bases of the first one, if machines that differ train together.

    Equal machines compute equal bases, but another linear algebra library may reverse a singular vector. All processes
    must call this, with the model on their devices.

    Args:
        model: a model with CLOVER adapters.
    """
    for _, layer in clover_layers(inner_model(model)):
        layer.forget_maps()
        for name, buffer in layer.named_buffers():
            if name.startswith(FROZEN):
                dist.broadcast(buffer, src=0)
