"""Passes of a tiny model with adapters, and the changes that they have to see."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from clover_peft import CloverConfig
from tests.support.adapters import layers
from tests.support.tiny import build, inputs, perturb


def two_adapters(**config) -> PeftModel:
    """Two adapters, "a" and "b", of which "a" is active."""
    result = get_peft_model(build("llama"), CloverConfig(**config), adapter_name="a")
    result.add_adapter("b", CloverConfig(**config))
    perturb(result)
    result.set_adapter("a", inference_mode=True)
    return result.eval()


@torch.no_grad()
def answer(model: nn.Module, **kwargs) -> Tensor:
    return model(**inputs("llama"), **kwargs).logits


@torch.no_grad()
def step(model: nn.Module, **kwargs) -> Tensor:
    """A step of decoding: one token of every sequence."""
    return model(**inputs("llama", length=1), **kwargs).logits


def unfolded(model: PeftModel, **kwargs) -> Tensor:
    """The same from maps that are folded for this pass."""
    return model(**inputs("llama"), **kwargs).logits.detach()


def write(model: PeftModel) -> None:
    with torch.no_grad():
        for layer in layers(model):
            layer.clover_S["a"].weight.mul_(2)
