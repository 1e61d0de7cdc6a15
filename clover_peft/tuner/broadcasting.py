"""Equal bases in all processes."""

from __future__ import annotations

from torch import nn

from ..runtime.sharding import broadcast_from_rank_0
from .adapter_tensors import FROZEN
from .layers import clover_layers, inner_model


def broadcast_bases(model: nn.Module) -> None:
    """Give all processes the bases of the first one, if machines that differ train together.

    Equal machines compute equal bases, but another linear algebra library may reverse a singular vector. All processes
    must call this, with the model on their devices.

    Args:
        model: a model with CLOVER adapters.
    """
    for _, layer in clover_layers(inner_model(model)):
        layer.forget_maps()
        broadcast_from_rank_0(buffer for name, buffer in layer.named_buffers() if name.startswith(FROZEN))
