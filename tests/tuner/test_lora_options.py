"""Options of LoRA in a CLOVER config: a message says what corresponds to them."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields

import pytest
from peft import LoraConfig, get_peft_model

from clover_peft import CloverConfig
from clover_peft.tuner.lora_options import CORRESPONDING
from tests.support.adapters import layers
from tests.support.tiny import build


@pytest.mark.parametrize("name", sorted(CORRESPONDING))
def test_an_option_of_lora_is_refused_with_what_corresponds(name: str) -> None:
    assert name in {field.name for field in fields(LoraConfig)}
    assert name not in {field.name for field in fields(CloverConfig)}
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}', an option of LoraConfig: {name}: "):
        CloverConfig(r=4, **{name: 16})


def test_other_options_are_refused_by_python_and_configs_are_copied() -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        CloverConfig(no_such_option=1)
    config = CloverConfig(r=4)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_the_rank_of_a_lora_is_refused_before_anything_changes() -> None:
    model = build("llama")
    message = r"layers\.0\.self_attn\.k_proj: r=64 .* 12 features \(k, head_dim 12\).*not LoRA's rank: leave it out"
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, CloverConfig(r=64))
    assert not layers(model)
