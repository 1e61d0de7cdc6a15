"""Adapters on tiny models, and what the tests read off them."""

from __future__ import annotations

from torch import nn

from clover_peft import CloverLayer


def layers(model: nn.Module) -> list[CloverLayer]:
    """The adapted projections of a model."""
    return [module for module in model.modules() if isinstance(module, CloverLayer)]
