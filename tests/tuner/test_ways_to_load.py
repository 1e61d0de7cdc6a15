"""Every way that peft and transformers load an adapter gives the same function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor

from clover_peft import CloverConfig, balance_updates, initialize_from_activations
from tests.support.adapters import layers
from tests.support.saved_adapters import (
    SAVE_BASES,
    WEIGHTS,
    base_in,
    edit,
    load,
    save_trained,
    trained_model,
)
from tests.support.tiny import TOLERANCE, build, inputs, logits, perturb, relative, through_transformers

# ---------------------------------------------------------------------- the ways to load


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Path, Tensor]:
    """Folder of a base model, folder of an adapter that names it, and the adapter's logits."""
    model = trained_model(base_in(tmp_path / "base"), task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", logits(model, "llama")


@pytest.mark.parametrize("kwargs", [dict(), dict(device_map={"": "cpu"}), dict(dtype=torch.float32)], ids=str)
def test_auto_peft_model_finds_the_base(published: tuple, kwargs: dict) -> None:
    _, adapter, before = published
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, **kwargs)
    assert torch.equal(logits(model, "llama"), before)


def test_transformers_from_pretrained_takes_an_adapter_folder(published: tuple) -> None:
    _, adapter, before = published
    model = hf.AutoModelForCausalLM.from_pretrained(adapter)
    assert len(layers(model)) == 6
    assert torch.equal(logits(model, "llama"), before)


@pytest.mark.parametrize("save_bases", SAVE_BASES)
def test_transformers_load_adapter_is_the_same_function(save_bases: bool | str, tmp_path: Path) -> None:
    before = save_trained(tmp_path, save_bases=save_bases)
    model = build("llama")
    model.load_adapter(str(tmp_path), adapter_name="other")
    assert relative(logits(model, "llama"), before) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("save_bases", SAVE_BASES)
def test_transformers_reports_no_key_that_was_left_out_on_purpose(save_bases: bool | str, tmp_path: Path) -> None:
    save_trained(tmp_path, save_bases=save_bases)
    info = build("llama").load_adapter(str(tmp_path), adapter_name="other")
    assert not info.missing_keys
    assert not info.unexpected_keys


@pytest.mark.parametrize("save_bases", SAVE_BASES)
def test_transformers_loads_onto_no_other_base(save_bases: bool | str, tmp_path: Path) -> None:
    save_trained(tmp_path, save_bases=save_bases)
    base = build("llama", seed=1)
    with pytest.raises(ValueError, match=r"k_proj \(k, block \d\): expected the weights of the base"):
        base.load_adapter(str(tmp_path), adapter_name="other")
    assert not layers(base)


@pytest.mark.parametrize("save_bases", [True, False])
def test_transformers_loads_no_damaged_file(save_bases: bool, tmp_path: Path) -> None:
    save_trained(tmp_path, save_bases=save_bases)
    edit(tmp_path, lambda tensors: tensors.pop(next(key for key in tensors if "clover_S0" in key)))
    base = build("llama")
    with pytest.raises(ValueError, match=r"expected .*clover_S0.* in the adapter's file, found"):
        base.load_adapter(str(tmp_path), adapter_name="other")
    assert not layers(base)


@through_transformers
@pytest.mark.parametrize("save_bases", SAVE_BASES)
def test_transformers_disable_adapters_gives_the_base(save_bases: bool | str, tmp_path: Path) -> None:
    save_trained(tmp_path, save_bases=save_bases)
    model = build("llama")
    model.load_adapter(str(tmp_path), adapter_name="other")
    model.disable_adapters()
    assert torch.equal(logits(model, "llama"), logits(build("llama"), "llama"))


@through_transformers
def test_transformers_add_adapter_trains_and_saves(tmp_path: Path) -> None:
    model = build("llama")
    base = logits(model, "llama")
    model.add_adapter(CloverConfig(r=5), adapter_name="mine")
    assert model.active_adapters() == ["mine"]
    assert torch.equal(logits(model, "llama"), base)
    perturb(model)
    before = logits(model, "llama")
    model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).exists()
    other = build("llama")
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other, "llama"), before)
    assert torch.equal(logits(load(build("llama"), tmp_path), "llama"), before)


@pytest.mark.parametrize("with_state_dict", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_injected_adapter_takes_a_state_dict(with_state_dict: bool, low_cpu_mem_usage: bool) -> None:
    source = inject_adapter_in_model(CloverConfig(), build("llama"))
    perturb(source)
    state = get_peft_model_state_dict(source)
    assert "model.layers.0.self_attn.v_proj.clover_S.weight" in state
    # With a state dict its keys decide what is adapted, whatever the config says.
    config = CloverConfig(target_modules=["v_proj"]) if with_state_dict else CloverConfig()
    kwargs = dict(state_dict=state) if with_state_dict else {}
    torch.manual_seed(5)
    target = build("llama")
    if with_state_dict:
        with pytest.warns(RuntimeWarning, match="inconsistency"):
            inject_adapter_in_model(config, target, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
    else:
        inject_adapter_in_model(config, target, low_cpu_mem_usage=low_cpu_mem_usage)
    result = set_peft_model_state_dict(target, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "clover_" in key]
    assert torch.equal(logits(target, "llama"), logits(source, "llama"))


@pytest.mark.parametrize("save_bases", [True, False])
def test_state_dict_goes_from_one_model_to_another(save_bases: bool) -> None:
    source = trained_model(build("llama"), save_bases=save_bases)
    state = get_peft_model_state_dict(source)
    explicit = get_peft_model_state_dict(source, state_dict=source.state_dict())
    assert state.keys() == explicit.keys()
    target = get_peft_model(build("llama"), CloverConfig(save_bases=save_bases), adapter_name="elsewhere")
    assert not set_peft_model_state_dict(target, state, adapter_name="elsewhere").unexpected_keys
    assert torch.equal(logits(target, "llama"), logits(source, "llama"))
    assert get_peft_model_state_dict(source).keys() == state.keys()  # what was handed out was not changed


@pytest.mark.parametrize("name", ["inner", "deep/er"])
def test_subfolder_is_loaded(name: str, tmp_path: Path) -> None:
    before = save_trained(tmp_path / name)
    assert torch.equal(logits(load(build("llama"), tmp_path, subfolder=name), "llama"), before)


def test_second_adapter_is_loaded_beside_the_first(tmp_path: Path) -> None:
    first = save_trained(tmp_path / "first", seed=3)
    second = save_trained(tmp_path / "second", seed=4, r=5, target_modules=["v_proj", "q_proj"])
    model = load(build("llama"), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(model, "llama"), first)
    model.set_adapter("second")
    assert torch.equal(logits(model, "llama"), second)
    model.delete_adapter("second")
    model.set_adapter("first")
    assert torch.equal(logits(model, "llama"), first)


def test_adapters_saved_together_are_folders_that_load_alone(tmp_path: Path) -> None:
    model = trained_model(build("llama"), "one")
    model.add_adapter("two", CloverConfig(r=4, save_bases=False))
    perturb(model, seed=8)
    model.save_pretrained(tmp_path)
    for name in ("one", "two"):
        model.set_adapter(name)
        assert torch.equal(logits(load(build("llama"), tmp_path / name), "llama"), logits(model, "llama")), name
    model.save_pretrained(tmp_path / "selected", selected_adapters=["two"])
    assert [path.name for path in (tmp_path / "selected").iterdir() if path.is_dir()] == ["two"]


def test_loading_over_an_adapter_replaces_it(tmp_path: Path) -> None:
    before = save_trained(tmp_path)
    model = trained_model(build("llama"), seed=11)
    assert relative(logits(model, "llama"), before) > 1e-3
    model.load_adapter(tmp_path, adapter_name="default")
    assert torch.equal(logits(model, "llama"), before)


# --- configs read from files --------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [None, CloverConfig, PeftConfig])
@pytest.mark.parametrize("saved", [True, "folded"])
def test_a_load_with_a_config_knows_the_precision_it_was_trained_in(reader, saved, tmp_path: Path) -> None:
    trained = get_peft_model(build("llama", torch.bfloat16), CloverConfig(save_bases=saved))
    perturb(trained)
    trained.save_pretrained(tmp_path / "bf16")
    config = None if reader is None else reader.from_pretrained(tmp_path / "bf16")
    # the same function on the float32 weights that those were rounded from
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "bf16", config=config)
    assert loaded.peft_config["default"].base_precision == "bfloat16"
    loaded.save_pretrained(tmp_path / "again")
    assert PeftConfig.from_pretrained(tmp_path / "again").base_precision == "bfloat16"


def test_a_new_adapter_of_a_files_config_records_its_own_base(tmp_path: Path) -> None:
    get_peft_model(build("llama", torch.bfloat16), CloverConfig()).save_pretrained(tmp_path / "bf16")
    fresh = get_peft_model(build("llama"), CloverConfig.from_pretrained(tmp_path / "bf16"))
    fresh.save_pretrained(tmp_path / "float32")
    assert PeftConfig.from_pretrained(tmp_path / "float32").base_precision == "float32"


def _made_from_data(folder: Path) -> Path:
    """The folder of an adapter with bases from activations, which were balanced too, on a bfloat16 base."""
    made = get_peft_model(build("llama", torch.bfloat16), CloverConfig())
    batches = [inputs("llama") | {"labels": inputs("llama")["input_ids"]}] * 8
    initialize_from_activations(made, batches)
    balance_updates(made, batches)
    perturb(made)
    made.save_pretrained(folder)
    return folder


BY_DATA = ("from_activations", "balanced_updates")


def test_a_new_adapter_of_a_files_config_says_how_its_own_bases_were_made(tmp_path: Path) -> None:
    config = CloverConfig.from_pretrained(_made_from_data(tmp_path / "data"))
    assert config.from_activations
    assert config.balanced_updates
    fresh = get_peft_model(build("llama"), config)
    other = get_peft_model(build("llama"), config)  # one config for two models
    for model in (fresh, other):
        specs = [spec for layer in layers(model) for spec in layer.specs["default"]]
        assert not any(getattr(spec, name) for spec in specs for name in BY_DATA)
    fresh.save_pretrained(tmp_path / "weights")
    saved = PeftConfig.from_pretrained(tmp_path / "weights")
    assert (saved.from_activations, saved.balanced_updates, saved.base_precision) == (False, False, "float32")


def test_a_file_that_is_loaded_later_brings_its_own_description(tmp_path: Path) -> None:
    folder = _made_from_data(tmp_path / "data")
    model = get_peft_model(build("llama"), CloverConfig.from_pretrained(folder))
    damaged = load_file(folder / WEIGHTS)
    damaged.pop(next(key for key in damaged if "clover_S" in key))
    perturb(model)
    with pytest.raises(ValueError, match=r"expected .* in the adapter's file"):
        set_peft_model_state_dict(model, damaged)
    config = model.peft_config["default"]
    assert (config.from_activations, config.base_precision) == (False, "float32")
    set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    specs = [spec for layer in layers(model) for spec in layer.specs["default"]]
    assert all(getattr(described, name) for described in (config, *specs) for name in BY_DATA)
    assert config.base_precision == "bfloat16"


def test_a_checkpoint_of_a_new_adapter_says_what_that_says(tmp_path: Path) -> None:
    """Also if another process loads it, as a training that goes on: into an adapter of the same earlier file."""
    folder = _made_from_data(tmp_path / "data")
    fresh = get_peft_model(build("llama"), CloverConfig.from_pretrained(folder))
    perturb(fresh)
    fresh.save_pretrained(tmp_path / "checkpoint")
    resumed = get_peft_model(build("llama"), CloverConfig.from_pretrained(folder))
    for model in (fresh, resumed):
        model.load_adapter(tmp_path / "checkpoint", "default")
        specs = [spec for layer in layers(model) for spec in layer.specs["default"]]
        assert not any(
            getattr(described, name) for described in (model.peft_config["default"], *specs) for name in BY_DATA
        )
        assert model.peft_config["default"].base_precision == "float32"
    assert torch.equal(logits(resumed, "llama"), logits(fresh, "llama"))


def test_a_config_that_could_not_be_used_keeps_what_it_says(tmp_path: Path) -> None:
    config = CloverConfig.from_pretrained(_made_from_data(tmp_path / "data"))
    config.target_modules = {"v_proj"}
    config.head_dim = 7
    with pytest.raises(ValueError, match="head_dim"):
        get_peft_model(build("llama"), config)
    assert (config.from_activations, config.balanced_updates, config.base_precision) == (True, True, "bfloat16")


def test_transformers_loads_what_the_file_says(tmp_path: Path) -> None:
    _made_from_data(tmp_path / "data")
    model = build("llama")
    model.load_adapter(str(tmp_path / "data"))
    get_peft_model_state_dict(model)  # as in saving
    config = model.peft_config["default"]
    assert (config.from_activations, config.balanced_updates, config.base_precision) == (True, True, "bfloat16")
