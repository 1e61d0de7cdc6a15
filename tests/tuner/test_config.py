"""Every impossible choice is an error that names it, before there is a model."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import re

import pytest
from transformers import HfArgumentParser

from clover_peft import CloverConfig


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("s_matrix", "half", "'full', 'diagonal'"),
        ("s_matrix", None, "'full', 'diagonal'"),
        ("s_matrix", "FULL", "'full', 'diagonal'"),
        ("basis", "lu", "None, 'qr', 'svd'"),
        ("basis", False, "None, 'qr', 'svd'"),
        ("bias", "lora_only", "'none', 'all', 'clover_only'"),
        ("bias", True, "'none', 'all', 'clover_only'"),
        ("bias", None, "'none', 'all', 'clover_only'"),
        ("save_bases", "fold", "True, False, 'folded'"),
        ("save_bases", None, "True, False, 'folded'"),
        ("save_bases", 1, "True, False, 'folded'"),
        ("cross_layer", "yes", "True, False"),
        ("cross_layer", 1, "True, False"),
        ("truncate", "no", "True, False"),
        ("truncate", None, "True, False"),
        ("init_weights", "pissa", "True, False"),
        ("check_base", 0, "True, False"),
        ("folded", "folded", "True, False"),
    ],
)
def test_value_outside_the_choices_is_refused(field: str, value: object, expected: str) -> None:
    message = f"CloverConfig.{field}: expected one of [{expected}], found {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        CloverConfig(**{field: value})


@pytest.mark.parametrize("field", ["r", "block_size", "mlp_block_size", "head_dim", "num_heads"])
@pytest.mark.parametrize("value", [0, -1, 2.0, 0.5, "8", True, False, [8], float("nan")])
def test_number_that_is_no_positive_integer_is_refused(field: str, value: object) -> None:
    message = f"CloverConfig.{field}: expected a positive integer or None, found {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        CloverConfig(**{field: value})


@pytest.mark.parametrize("rank", [0, -4, 1.5, "4", True, None])
def test_rank_pattern_with_no_positive_integer_is_refused(rank: object) -> None:
    message = f"CloverConfig.rank_pattern['v_proj']: expected a positive integer, found {rank!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        CloverConfig(rank_pattern={"k_proj": 4, "v_proj": rank})


@pytest.mark.parametrize("value", [-1, True, 1.0, "8", None])
def test_low_rank_that_is_no_rank_is_refused(value: object) -> None:
    message = f"CloverConfig.low_rank: expected a positive integer, or 0 for none, found {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        CloverConfig(low_rank=value)


@pytest.mark.parametrize("value", [["v_proj"], "v_proj", None, 4])
def test_rank_pattern_that_is_no_dict_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"CloverConfig\.rank_pattern: expected .*, found "):
        CloverConfig(rank_pattern=value)


@pytest.mark.parametrize("value", [1, 1.0, -0.1, 7, float("nan")])
def test_dropout_that_is_no_probability_below_one_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"CloverConfig\.clover_dropout: expected 0 <= p < 1, found "):
        CloverConfig(clover_dropout=value)


@pytest.mark.parametrize(
    "choice", [{"modules_to_save": ["norm", "layer"]}, {"trainable_token_indices": {"layer": [1]}}]
)
def test_names_that_meet_the_base_layers_are_refused(choice: dict) -> None:
    with pytest.raises(ValueError, match=r"CloverConfig\.\w+: 'layer' also ends 'base_layer', .*; pass a longer end"):
        CloverConfig(**choice)
    with pytest.raises(ValueError, match=r"CloverConfig\.modules_to_save: expected a list of names, found 'lm_head'"):
        CloverConfig(modules_to_save="lm_head")
    CloverConfig(modules_to_save=["encoder.layer"], trainable_token_indices=[1])


@pytest.mark.parametrize("value", ["0.1", None, [0.1], True])
def test_dropout_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"CloverConfig\.clover_dropout: expected .*, found "):
        CloverConfig(clover_dropout=value)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(s_matrix="diagonal", basis="qr"), "s_matrix='diagonal' has no meaning in the QR basis.*basis='svd'"),
        (dict(truncate=True), "truncate=True drops the directions beyond r; pass r=... or rank_pattern"),
        (dict(truncate=True, r=4, basis="qr"), "truncate=True needs leading directions.*basis='svd'"),
        (dict(target_modules=".*v_proj", layers_to_transform=0), "layers_to_transform cannot be used with a regular"),
        (
            dict(target_modules=".*v_proj", layers_to_transform=[1]),
            "layers_to_transform cannot be used with a regular",
        ),
        (
            dict(target_modules=".*v_proj", layers_pattern="layers"),
            "layers_pattern cannot be used with a regular expression",
        ),
        (dict(layers_pattern="layers"), "layers_pattern needs layers_to_transform"),
        (dict(target_modules=["v_proj"], layers_pattern=["layers"]), "layers_pattern needs layers_to_transform"),
        (dict(folded=True), "a folded adapter holds maps for inference and cannot be trained.*is_trainable=False"),
    ],
)
def test_combination_without_meaning_is_refused(choices: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)CloverConfig: .*{message}"):
        CloverConfig(**choices)


@pytest.mark.parametrize(
    "choices",
    [
        dict(),
        dict(r=1),
        dict(s_matrix="diagonal", basis="svd"),
        dict(s_matrix="full", basis="qr"),
        dict(truncate=True, r=4),
        dict(truncate=True, rank_pattern={"v_proj": 4}),
        dict(target_modules=["v_proj"], layers_to_transform=0, layers_pattern="layers"),
        dict(layers_to_transform=[0]),
        dict(target_modules="all-linear"),
        dict(folded=True, inference_mode=True),
        dict(clover_dropout=0),
        dict(clover_dropout=0.99),
        *(dict(save_bases=value) for value in (True, False, "folded")),
        *(dict(bias=value) for value in ("none", "all", "clover_only")),
    ],
    ids=str,
)
def test_meaningful_choices_are_kept(choices: dict) -> None:
    config = CloverConfig(**choices)
    for name, value in choices.items():
        found = getattr(config, name)
        assert found == (set(value) if isinstance(found, set) else value)


@pytest.mark.parametrize("key", ["rank", "lora_alpha", "targets_modules", "clover_alpha"])
def test_unknown_key_is_a_type_error(key: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{key}'"):
        CloverConfig(**{key: 8})


def test_every_field_says_what_it_is() -> None:
    described = CloverConfig.__doc__.partition("Args:")[2].partition("Raises:")[0]
    ours = [f for f in dataclasses.fields(CloverConfig) if f.name in CloverConfig.__annotations__]
    assert len(ours) > 20
    for field in ours:
        assert field.metadata.get("help"), field.name
        assert re.search(rf"^ +{field.name}: \S", described, re.MULTILINE), field.name


def test_dropout_and_truncation_are_refused_together():
    with pytest.raises(ValueError, match="use one of the two"):
        CloverConfig(truncate=True, r=4, clover_dropout=0.1)


def test_the_signature_lists_the_fields() -> None:
    fields = [field.name for field in dataclasses.fields(CloverConfig) if field.init]
    assert list(inspect.signature(CloverConfig).parameters) == fields
    assert inspect.signature(CloverConfig).parameters["s_matrix"].default == "full"

    @dataclasses.dataclass
    class Wider(CloverConfig):
        more: int = 3

    assert list(inspect.signature(Wider).parameters) == [*fields, "more"]
    assert Wider(r=4, more=5).more == 5


def test_a_config_is_copied_pickled_replaced_and_parsed() -> None:
    config = CloverConfig(r=4, rank_pattern={"up_proj": 8})
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == copy.copy(config) == config
    assert dataclasses.replace(config, r=5).r == 5

    @dataclasses.dataclass
    class Command:
        config: CloverConfig = dataclasses.field(default_factory=CloverConfig)
        r: int = 3

    [command] = HfArgumentParser(Command).parse_dict({"r": 6, "config": config})
    assert (command.r, command.config) == (6, config)
