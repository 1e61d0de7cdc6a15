"""target_modules="all-linear" finds modules that have adapters already, CLOVER's and other tuners'."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import clover_peft
from clover_peft import CloverConfig
from tests.support.tiny import build, logits, perturb

LORA = dict(r=2, init_lora_weights=False)


def adapted(model: nn.Module, adapter_name: str, attribute: str) -> set[str]:
    """The paths of the projections that have an adapter, without the tuner layers around them."""
    layers = ((path, getattr(module, attribute, ())) for path, module in model.named_modules())
    return {path.replace(".base_layer", "") for path, tensors in layers if adapter_name in tensors}


def linears(model: nn.Module) -> set[str]:
    head = model.get_output_embeddings()
    return {path for path, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("first", [None, "all-linear"])
@pytest.mark.parametrize("way", ["add_adapter", "inject"])
def test_a_second_adapter(family: str, first: str | None, way: str) -> None:
    model = build(family)
    expected = adapted(
        peft.inject_adapter_in_model(CloverConfig(target_modules="all-linear"), build(family)), "default", "clover_S"
    )
    second = CloverConfig(target_modules="all-linear")
    if way == "inject":
        peft.inject_adapter_in_model(CloverConfig(target_modules=first), model)
        peft.inject_adapter_in_model(second, model, "second")
        inner = model
    else:
        wrapped = peft.get_peft_model(model, CloverConfig(target_modules=first))
        wrapped.add_adapter("second", second)
        inner = wrapped.get_base_model()
    assert adapted(inner, "second", "clover_S") == expected
    assert not any("clover" in path for path in expected)


@pytest.mark.parametrize("first", [None, "all-linear"])
def test_lora_on_clover(first: str | None) -> None:
    model = build("llama")
    expected, before = linears(model), logits(model, "llama")
    clover_peft.CloverModel(model, CloverConfig(target_modules=first), "one")
    config = peft.LoraConfig(target_modules="all-linear", **LORA)
    peft.LoraModel(model, {"two": config}, "two")
    assert adapted(model, "two", "lora_A") == expected
    assert not torch.equal(logits(model, "llama"), before)


@pytest.mark.parametrize("first", [["v_proj"], "all-linear"], ids=str)
def test_clover_on_lora(first: list[str] | str) -> None:
    model = build("llama")
    expected = linears(model)
    peft.LoraModel(model, peft.LoraConfig(target_modules=first, **LORA), "one")
    before = logits(model, "llama")
    clover_peft.CloverModel(model, {"two": CloverConfig(target_modules="all-linear")}, "two")
    assert adapted(model, "two", "clover_S") == expected
    assert torch.equal(logits(model, "llama"), before)
    perturb(model)
    assert not torch.equal(logits(model, "llama"), before)
