"""Adapters on tiny models, and what the tests read off them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from clover_peft import CloverConfig, CloverLayer
from clover_peft.tuner.block_spec import BlockSpec
from tests.support.tiny import build, inputs, logits, perturb

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


def two_trained(family: str = "llama", **kwargs) -> PeftModel:
    """A model with the trained adapters "a" and "b"."""
    model = get_peft_model(build(family), CloverConfig(**kwargs), adapter_name="a")
    perturb(model, seed=1)
    model.add_adapter("b", CloverConfig(**kwargs))
    only_b = {name: p for name, p in model.named_parameters() if ".b." in name}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in only_b.values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


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


def layers_by_name(model: nn.Module) -> dict[str, CloverLayer]:
    """The adapted projections by their paths in the base model."""
    return {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, CloverLayer)
    }


def only_spec(layer: CloverLayer, adapter_name: str = "default") -> BlockSpec:
    """The spec of the one slice of a projection that is adapted."""
    (spec,) = layer.specs[adapter_name]
    return spec


@contextmanager
def untouched(model: nn.Module, call=lambda model: logits(model, "llama")) -> Iterator[None]:
    """What fails inside must leave the model as it was: modules, tensors, gradient flags, configs, outputs."""
    with torch.no_grad():
        before = call(model)
    modules = [(name, module, type(module)) for name, module in model.named_modules()]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(id(parameter), name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    yield
    assert [(name, module, type(module)) for name, module in model.named_modules()] == modules
    assert [(id(p), name, p.requires_grad) for name, p in model.named_parameters()] == flags
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not getattr(model, "_hf_peft_config_loaded", False)
    assert model.state_dict().keys() == tensors.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), tensors[name].nan_to_num(7.0)), name
    with torch.no_grad():
        assert torch.equal(call(model).nan_to_num(7.0), before.nan_to_num(7.0))
