"""The files of a saved adapter: tensors and their keys, config, model card; and the folded form."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from clover_peft import CloverConfig
from tests.support.adapters import layers
from tests.support.saved_adapters import SAVE_BASES, WEIGHTS, base_in, load, save_trained, trained_model
from tests.support.tiny import TOLERANCE, build, logits, relative

# ---------------------------------------------------------------------- what is written


def test_only_safetensors_config_and_card_are_written(tmp_path: Path) -> None:
    save_trained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, "adapter_config.json", "README.md"}


@pytest.mark.parametrize(
    ("save_bases", "choices", "qr", "svd"),
    [
        (True, dict(), {"S", "L", "S0"}, {"S", "U", "V", "S0"}),
        (True, dict(r=4), {"S", "U", "V", "S0"}, {"S", "U", "V", "S0"}),
        (True, dict(s_matrix="diagonal"), {"S", "U", "V", "S0"}, {"S", "U", "V", "S0"}),
        (False, dict(), {"S", "S0", "probe"}, {"S", "S0", "probe"}),
        ("folded", dict(), {"S"}, {"S"}),
        ("folded", dict(r=4), {"S"}, {"S"}),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else str(value),  # the same in every process
)
def test_keys_name_the_papers_factors(
    save_bases: bool | str, choices: dict, qr: set[str], svd: set[str], tmp_path: Path
) -> None:
    save_trained(tmp_path, save_bases=save_bases, **choices)
    keys = set(load_file(tmp_path / WEIGHTS))
    prefix = "base_model.model.model.layers"
    assert keys == {
        f"{prefix}.{i}.{module}.clover_{name}.weight"
        for i in range(2)
        for module, names in (("self_attn.k_proj", qr), ("self_attn.v_proj", svd), ("mlp.up_proj", qr))
        for name in {*names, "norm"}
    }


def test_slices_of_a_fused_projection_are_keys_of_their_own(tmp_path: Path) -> None:
    save_trained(tmp_path, "gpt2", target_modules=["attn.c_attn"])
    names = {key.partition("c_attn.")[2] for key in load_file(tmp_path / WEIGHTS)}
    assert {"clover_S.k", "clover_S.v", "clover_U.k", "clover_V.v", "clover_S0.v"} <= names


@pytest.mark.parametrize("adapter_name", ["other", "weight", "k"])
def test_name_of_the_adapter_is_in_no_key_and_changes_nothing(adapter_name: str, tmp_path: Path) -> None:
    before = save_trained(tmp_path / "default", "gpt2")
    assert torch.equal(save_trained(tmp_path, "gpt2", adapter_name), before)
    assert set(load_file(tmp_path / adapter_name / WEIGHTS)) == set(load_file(tmp_path / "default" / WEIGHTS))
    for name in ("default", adapter_name):
        model = load(build("gpt2"), tmp_path / adapter_name, adapter_name=name)
        assert torch.equal(logits(model, "gpt2"), before), name


def test_folded_file_is_as_small_as_s_alone(tmp_path: Path) -> None:
    model = trained_model(build("llama"))
    numbers = sum(p.numel() for name, p in model.named_parameters() if "clover_S" in name)
    for mode in SAVE_BASES:
        model.peft_config["default"].save_bases = mode
        model.save_pretrained(tmp_path / str(mode))
    sizes = {mode: sum(t.numel() for t in load_file(tmp_path / str(mode) / WEIGHTS).values()) for mode in SAVE_BASES}
    assert numbers < sizes["folded"] < 1.05 * numbers  # and the fingerprint
    assert sizes["folded"] < sizes[False] < 1.25 * numbers
    assert 1.5 * numbers < sizes[True] < 2.2 * numbers  # the pair's C and E are whole, and other C packed


def test_config_file_round_trips(tmp_path: Path) -> None:
    config = CloverConfig(
        r=5,
        s_matrix="diagonal",
        target_modules=["k_proj", "v_proj", "up_proj"],
        exclude_modules=["layers.1.mlp.up_proj"],
        basis="svd",
        clover_dropout=0.1,
        bias="clover_only",
        save_bases=False,
        check_base=False,
        modules_to_save=["lm_head"],
        trainable_token_indices=[3],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        rank_pattern={"v_proj": 3},
        head_dim=12,
        block_size=6,
        mlp_block_size=20,
        cross_layer=False,
        task_type="CAUSAL_LM",
    )
    choices = {name: value for name, value in config.to_dict().items() if name != "peft_type"}
    trained_model(build("llama"), **choices).save_pretrained(tmp_path)
    found = PeftConfig.from_pretrained(tmp_path)
    assert type(found) is CloverConfig
    set_by_peft = ("base_model_name_or_path", "inference_mode", "base_precision", "auto_mapping")
    for name, value in config.to_dict().items():
        if name not in set_by_peft:
            assert getattr(found, name) == value, name
    assert found.inference_mode
    assert found.base_precision == "float32"
    found.save_pretrained(tmp_path / "again")
    assert PeftConfig.from_pretrained(tmp_path / "again").to_dict() == found.to_dict()


def test_config_file_holds_fields_only(tmp_path: Path) -> None:
    save_trained(tmp_path / "first")
    model = load(build("llama"), tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    first, second = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("first", "second"))
    assert first.keys() == second.keys()
    assert "source" not in first


def test_saving_leaves_the_config_of_the_model_alone(tmp_path: Path) -> None:
    model = trained_model(build("llama"), r=4, save_bases="folded")
    before = copy.deepcopy(model.peft_config["default"].to_dict())
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].to_dict() == before
    assert json.loads((tmp_path / "adapter_config.json").read_text())["folded"] is True


@pytest.mark.parametrize("times", [1, 2])
def test_card_says_once_what_to_import_and_names_the_base(times: int, tmp_path: Path) -> None:
    model = trained_model(base_in(tmp_path / "base"))
    for _ in range(times):
        model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert text.count("import clover_peft") == 1
    recipe = text.partition("import clover_peft")[2]
    assert str(tmp_path / "base") in recipe
    assert "from_pretrained" in recipe


def test_card_of_a_named_adapter_says_what_to_import(tmp_path: Path) -> None:
    save_trained(tmp_path, adapter_name="other")
    cards = [path.read_text() for path in tmp_path.rglob("README.md")]
    assert cards
    assert all(card.count("import clover_peft") == 1 for card in cards)
    assert all("Install clover_peft with `pip install .` in a clone of its repository" in card for card in cards)


def test_the_import_stands_before_every_other_section_of_the_card(tmp_path: Path) -> None:
    """peft's template is long, and people stop at the first code."""
    save_trained(tmp_path)
    headings = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("#")]
    assert headings[:3] == ["# Model Card for Model ID", "## How to load", "## Model Details"]


def test_a_card_of_one_s_own_keeps_its_text(tmp_path: Path) -> None:
    own = "---\nlibrary_name: peft\n---\n# Mine\n\nSome text.\n"
    (tmp_path / "README.md").write_text(own)
    save_trained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.partition("## How to load")[0].endswith("# Mine\n\nSome text.\n\n")
    assert text.count("import clover_peft") == 1


# ---------------------------------------------------------------------- folded adapters


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_folded_adapter_for_inference_has_no_trainable_numbers(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    save_trained(tmp_path, save_bases="folded")
    model = load(build("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {spec.basis for layer in layers(model) for spec in layer.specs["default"]} == {"folded"}


def test_folded_config_makes_no_new_adapter(tmp_path: Path) -> None:
    save_trained(tmp_path, save_bases="folded")
    config = CloverConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    base = build("llama")
    with pytest.raises(ValueError, match=r"saved folded.*found no weights for it"):
        get_peft_model(base, config)
    assert not layers(base)


@pytest.mark.parametrize("choices", [dict(), dict(s_matrix="diagonal"), dict(truncate=True, r=6)], ids=str)
def test_folded_file_does_not_go_into_a_trainable_adapter(choices: dict) -> None:
    state = get_peft_model_state_dict(trained_model(build("llama"), save_bases="folded", **choices))
    model = trained_model(build("llama"), seed=7, **choices)
    before = logits(model, "llama")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.k_proj: expected .* in the adapter's file"):
        set_peft_model_state_dict(model, state)
    assert torch.equal(logits(model, "llama"), before)


def test_trainable_file_does_not_go_into_a_folded_adapter(tmp_path: Path) -> None:
    before = save_trained(tmp_path, save_bases="folded")
    model = load(build("llama"), tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0\.\S+: expected .*, found .*folded"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(trained_model(build("llama"), seed=7)))
    assert torch.equal(logits(model, "llama"), before)


def test_folded_adapter_saves_and_merges_as_itself(tmp_path: Path) -> None:
    before = save_trained(tmp_path / "first", r=7, truncate=True, save_bases="folded")
    model = load(build("llama"), tmp_path / "first")
    after = logits(model, "llama")
    assert relative(after, before) < TOLERANCE[torch.float32]
    model.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(load(build("llama"), tmp_path / "second"), "llama"), after)
    assert relative(logits(model.merge_and_unload(), "llama"), before) < TOLERANCE[torch.float32]


def test_a_pickle_is_refused_when_it_is_written(tmp_path: Path) -> None:
    model = trained_model(build("llama"))
    for again in (False, True):  # also over an earlier file, which would be loaded in its place
        if again:
            (tmp_path / "adapter_model.bin").unlink()
            model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"found them in adapter_model\.bin, a pickle, which is never read"):
            model.save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / "adapter_model.bin").touch()
    model.save_pretrained(tmp_path)  # a file of earlier, beside new weights
    assert torch.equal(logits(load(build("llama"), tmp_path), "llama"), logits(model.eval(), "llama"))


# ---------------------------------------------------------------------- cards and checkpoints


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "SEQ_CLS"])
def test_the_recipe_in_the_card_names_a_class_that_loads_the_adapter(task_type: str | None, tmp_path: Path) -> None:
    import peft

    save_trained(tmp_path, task_type=task_type)
    card = (tmp_path / "README.md").read_text()
    name = card.partition("from peft import ")[2].split()[0]
    assert hasattr(peft, name)
    assert (name == "AutoPeftModel") == (task_type is None)


def test_a_folded_checkpoint_is_warned_of(tmp_path: Path) -> None:
    model = get_peft_model(build("llama"), CloverConfig(save_bases="folded"))
    with pytest.warns(UserWarning, match="can be neither resumed nor loaded as the best"):
        model.save_pretrained(tmp_path / "checkpoint-5")
