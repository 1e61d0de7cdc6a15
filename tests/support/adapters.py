"""Adapters on tiny models, and what the tests read off them."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from clover_peft import CloverConfig, CloverLayer
from tests.support.tiny import build, inputs, perturb

FORMS = {
    "full": {},
    "diagonal": {"s_matrix": "diagonal"},
    "leading": {"r": 4},
    "half heads": {"block_size": 6},
    "alone": {"cross_layer": False, "block_size": 24, "mlp_block_size": 16},
}


def adapted(family: str = "llama", *, dtype=torch.float32, seed: int = 0, model=None, **config) -> PeftModel:
    """A tiny model with one adapter, "default", whose S is not zero."""
    model = get_peft_model(build(family, dtype, seed) if model is None else model, CloverConfig(**config))
    perturb(model)
    return model.eval()


def several(names: dict[str, dict], family: str = "llama") -> PeftModel:
    """A tiny model with an adapter for each name, all of them with an S that is not zero."""
    first, *rest = names
    model = get_peft_model(build(family), CloverConfig(**names[first]), adapter_name=first)
    for name in rest:
        model.add_adapter(name, CloverConfig(**names[name]))
    perturb(model)
    return model.eval()


def layers(model: nn.Module) -> list[CloverLayer]:
    """The adapted projections of a model."""
    return [module for module in model.modules() if isinstance(module, CloverLayer)]


def base_tensors(model: nn.Module) -> list[Tensor]:
    """Copies of the base weights and biases of every adapted projection."""
    bases = [layer.get_base_layer() for layer in layers(model)]
    return [t.detach().clone() for base in bases for t in (base.weight, base.bias) if t is not None]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two lists of tensors hold the same bits."""
    return len(first) == len(second) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )


def activate(model: PeftModel, names: str | list[str]) -> PeftModel:
    model.base_model.set_adapter(names)
    return model


def loss_and_grads(model: nn.Module, family: str = "llama") -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    batch = inputs(family)
    loss = nn.functional.cross_entropy(model(**batch).logits.float().flatten(0, 1), batch["input_ids"].flatten())
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
