"""Options of LoRA in a CLOVER config: a message says what corresponds to them."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import fields

import pytest
from peft import LoraConfig, get_peft_model

from clover_peft import CloverConfig
from clover_peft.tuner.config_checks import CORRESPONDING, NOT_CHOSEN
from tests.support.adapters import layers
from tests.support.tiny import build


@pytest.mark.parametrize("name", sorted(CORRESPONDING))
def test_an_option_of_lora_is_refused_with_what_corresponds(name: str) -> None:
    assert name in {field.name for field in fields(LoraConfig)}
    assert name not in {field.name for field in fields(CloverConfig)}
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}', an option of LoraConfig: {name}: "):
        CloverConfig(r=4, **{name: 16})


@pytest.mark.parametrize(
    ("name", "meant"),
    [("target_module", "target_modules"), ("exclude", "exclude_modules"), ("blocksize", "block_size")],
)
def test_a_misspelt_option_names_the_nearest_field(name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'; did you mean {meant}\\?"):
        CloverConfig(r=4, **{name: 8})


def test_fields_that_no_user_sets_are_not_offered() -> None:
    assert set(NOT_CHOSEN) <= {field.name for field in fields(CloverConfig)}
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'folde'$"):
        CloverConfig(folde=True)


def test_a_file_of_a_later_version_is_read_without_its_new_fields(tmp_path) -> None:
    CloverConfig(r=4).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules_2": ["v_proj"]}))
    with pytest.warns(UserWarning, match="target_modules_2.*ignored"):
        assert CloverConfig.from_pretrained(str(tmp_path)).r == 4


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
