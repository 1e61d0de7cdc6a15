"""The best LoRA of a rank for an adapter, through peft's conversion, and its error."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, save_as_lora, set_peft_model_state_dict

from clover_peft import CloverConfig, lora_errors
from clover_peft.tuner.layers import clover_layers
from tests.support.tiny import TOLERANCE, build, logits, perturb, relative

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_lora_of_full_rank_is_the_same_function(tmp_path):
    model = get_peft_model(build("llama", num_key_value_heads=1), CloverConfig(target_modules=["v_proj", "k_proj"]))
    perturb(model)
    expected = logits(model, "llama")
    save_as_lora(tmp_path, model, rank=12)  # one head of 12
    lora = PeftModel.from_pretrained(build("llama", num_key_value_heads=1), tmp_path)
    assert relative(logits(lora, "llama"), expected) < TOLERANCE[torch.float32]


def test_the_error_of_a_lora_is_foretold():
    model = get_peft_model(build("llama"), CloverConfig())
    perturb(model)
    errors = lora_errors(model, ranks=[4, 12, 48])
    assert errors["all"][4] > errors["all"][12] > errors["all"][48]
    assert errors["all"][48] < 1e-6
    config, state = convert_to_lora(model, rank=4)
    lora = get_peft_model(build("llama"), config)
    set_peft_model_state_dict(lora, state)
    for name, layer in clover_layers(model):
        delta = layer.get_delta_weight("default")
        approximated = lora.get_submodule(name).get_delta_weight("default")
        inner = name.removeprefix("base_model.model.")  # the name that other functions have for the module
        assert abs(relative(approximated, delta) - errors[inner][4]) < 1e-4, name


def test_an_untrained_adapter_loses_nothing_and_a_missing_one_is_named():
    model = get_peft_model(build("llama"), CloverConfig())
    assert set(lora_errors(model)["all"].values()) == {0.0}
    with pytest.raises(ValueError, match="'other'"):
        lora_errors(model, adapter_name="other")


def test_biases_that_change_cannot_become_a_lora():
    model = get_peft_model(build("gpt2"), CloverConfig())
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=4)


def test_peft_may_ask_about_the_conversion_without_a_name():
    """It asks a whole model so, and the adapter has any name."""
    for family, supported in (("llama", True), ("gpt2", False)):
        model = get_peft_model(build(family), CloverConfig(), adapter_name="french")
        assert model.supports_lora_conversion("french") is supported
        assert model.base_model.supports_lora_conversion("french") is supported


@pytest.mark.parametrize("rank", [12, 0.999999])
def test_an_adapter_becomes_a_lora_beside_one_of_other_modules(rank):
    base = build("llama", num_key_value_heads=1)
    model = get_peft_model(base, CloverConfig(target_modules=["v_proj"]), adapter_name="french")
    model.add_adapter("german", CloverConfig(target_modules=["k_proj", "up_proj"]))
    perturb(model)
    expected = logits(model, "llama")
    config, state = convert_to_lora(model, rank=rank, adapter_name="french")
    lora = get_peft_model(build("llama", num_key_value_heads=1), config)
    set_peft_model_state_dict(lora, state)
    assert relative(logits(lora, "llama"), expected) < 1e-4
    model.delete_adapter("german")
    for gone in ("german", "typo"):
        with pytest.raises(ValueError, match=rf"expected one of the adapters \['french'\], found '{gone}'; correct"):
            convert_to_lora(model, rank=4, adapter_name=gone)


def test_one_rank_and_ranks_beyond_the_modules_and_wrong_ones():
    model = get_peft_model(build("llama"), CloverConfig())
    perturb(model)
    assert lora_errors(model, 4) == lora_errors(model, [4])
    assert set(lora_errors(model, [10_000])["all"].values()) == {0.0}
    for wrong in (0, [16, -1], ["16"], [4.0], [True]):
        with pytest.raises(ValueError, match="lora_errors: expected positive integers as ranks, found"):
            lora_errors(model, wrong)
