"""What is saved loads as the same function, anywhere; what does not fit is refused and changes nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clover_peft import CloverConfig, CloverLayer
from clover_peft.tuner.base_check import fingerprint
from tests.support.tiny import TOLERANCE, build, inputs, logits, perturb, relative

WEIGHTS = "adapter_model.safetensors"
MODES = [True, False, "folded"]

# name -> (family, choices): every way an adapter's tensors can be laid out.
CASES: dict[str, tuple[str, dict]] = {
    "full": ("llama", dict()),
    "diagonal": ("llama", dict(s_matrix="diagonal")),
    "svd basis": ("llama", dict(basis="svd")),
    "r": ("llama", dict(r=5)),
    "r diagonal": ("llama", dict(r=5, s_matrix="diagonal")),
    "rank_pattern": ("llama", dict(rank_pattern={"v_proj": 3, r"1\.mlp\.up_proj": 7})),
    "truncate": ("llama", dict(r=7, truncate=True)),
    "truncate diagonal": ("llama", dict(r=7, truncate=True, s_matrix="diagonal")),
    "block_size": ("llama", dict(block_size=6)),
    "block_size over heads": ("llama", dict(block_size=24, cross_layer=False)),
    "mlp_block_size": ("llama", dict(mlp_block_size=16)),
    "intra-layer": ("opt", dict(cross_layer=False)),
    "all-linear": ("llama", dict(target_modules="all-linear")),
    "one layer": ("llama", dict(layers_to_transform=0)),
    "modules_to_save": ("llama", dict(modules_to_save=["lm_head"])),
    "token indices": ("llama", dict(trainable_token_indices=[4, 9])),
    "bias all": ("opt", dict(bias="all")),
    "bias clover_only": ("opt", dict(bias="clover_only")),
    "pairs with biases": ("opt", dict()),
    "fused": ("gpt2", dict()),
    "interleaved": ("gpt_neox", dict()),
    "decoupled": ("deepseek_v3", dict()),
    "encoder-decoder": ("t5", dict()),
}


def _trained(base: nn.Module, adapter_name: str = "default", seed: int = 3, **choices) -> PeftModel:
    """An adapter on `base` whose trainable numbers, all of them, are not what they were at the start."""
    model = get_peft_model(base, CloverConfig(**choices), adapter_name=adapter_name).eval()
    perturb(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "clover_S" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def _saved(folder: Path, family: str = "llama", adapter_name: str = "default", **choices) -> Tensor:
    """Save a trained adapter for the tiny model of `family`; returns the logits it gives."""
    model = _trained(build(family), adapter_name, **choices)
    model.save_pretrained(folder)
    return logits(model, family)


def _load(base: nn.Module, folder: Path | str, **kwargs) -> PeftModel:
    torch.manual_seed(987)  # never the seed that anything was made with
    return PeftModel.from_pretrained(base, folder, **kwargs)


def _layers(model: nn.Module) -> list[CloverLayer]:
    return [module for module in model.modules() if isinstance(module, CloverLayer)]


def _edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the tensors of a saved adapter."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _edit_config(folder: Path, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---------------------------------------------------------------------- the same function again


@pytest.mark.parametrize("save_bases", MODES)
@pytest.mark.parametrize("case", CASES)
def test_reload_under_another_seed_is_the_same_function(case: str, save_bases: bool | str, tmp_path: Path) -> None:
    family, choices = CASES[case]
    base = logits(build(family), family)
    before = _saved(tmp_path, family, save_bases=save_bases, **choices)
    after = logits(_load(build(family), tmp_path), family)
    assert relative(before, base) > 1e-3
    if save_bases == "folded" and {"r", "rank_pattern"} & choices.keys():
        assert relative(after, before) < TOLERANCE[torch.float32]  # what was applied in two stages is now one matrix
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("save_bases", MODES)
@pytest.mark.parametrize("case", ["full", "diagonal", "r", "truncate", "all-linear", "fused", "pairs with biases"])
def test_low_cpu_mem_usage_loads_the_same_function(case: str, save_bases: bool | str, tmp_path: Path) -> None:
    family, choices = CASES[case]
    before = _saved(tmp_path, family, save_bases=save_bases, **choices)
    model = _load(build(family), tmp_path, low_cpu_mem_usage=True)
    assert relative(logits(model, family), before) < TOLERANCE[torch.float32]
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    merged = logits(model.merge_and_unload(safe_merge=True), family)
    assert relative(merged, before) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("save_bases", [True, False])
def test_reloaded_adapter_trains_on_and_saves_the_same(save_bases: bool, tmp_path: Path) -> None:
    before = _saved(tmp_path / "first", r=5, save_bases=save_bases)
    model = _load(build("llama"), tmp_path / "first", is_trainable=True)
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"clover_S"}
    model(**inputs("llama")).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    model.save_pretrained(tmp_path / "second")
    first, second = load_file(tmp_path / "first" / WEIGHTS), load_file(tmp_path / "second" / WEIGHTS)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    assert torch.equal(logits(_load(build("llama"), tmp_path / "second"), "llama"), before)


@pytest.mark.parametrize("save_bases", MODES)
def test_degenerate_heads_reload_as_they_were(save_bases: bool | str, tmp_path: Path) -> None:
    def degenerate() -> nn.Module:
        model = build("llama")
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight[:12] = 0  # a zero head
            model.model.layers[1].self_attn.k_proj.weight[13] = model.model.layers[1].self_attn.k_proj.weight[12]
        return model

    with pytest.warns(UserWarning, match="degenerate"):
        model = _trained(degenerate(), save_bases=save_bases)
    model.save_pretrained(tmp_path)
    assert torch.isfinite(logits(model, "llama")).all()
    assert torch.equal(logits(_load(degenerate(), tmp_path), "llama"), logits(model, "llama"))


@pytest.mark.parametrize("case", CASES)
def test_reloaded_adapter_merges_into_a_plain_model(case: str, tmp_path: Path) -> None:
    family, choices = CASES[case]
    before = _saved(tmp_path, family, **choices)
    base = build(family)
    types = [type(module) for module in base.modules()]
    merged = _load(base, tmp_path).merge_and_unload(safe_merge=True)
    assert [type(module) for module in merged.modules()] == types
    assert merged.state_dict().keys() == build(family).state_dict().keys()
    assert relative(logits(merged, family), before) < TOLERANCE[torch.float32]


# ---------------------------------------------------------------------- another precision of the base


def _condition(model: nn.Module) -> float:
    """The largest condition number of any block: S0 is the spectrum that C and E invert."""
    worst = 1.0
    for layer in _layers(model):
        for spec in layer.specs["default"]:
            s0 = layer.tensors("default", spec).s0
            worst = max(worst, float((s0[:, 0] / s0[:, -1]).max()))
    return worst


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("there", [torch.bfloat16, torch.float64])
def test_trained_on_float32_loads_on_another_precision(family: str, there: torch.dtype, tmp_path: Path) -> None:
    model = _trained(build(family))
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        base = logits(model, family).double()
    effect = logits(model, family).double() - base
    other = _load(build(family, there), tmp_path)
    found = logits(other, family).double()
    with other.disable_adapter():
        found -= logits(other, family).double()
    rounding = TOLERANCE[torch.bfloat16 if there == torch.bfloat16 else torch.float32]
    assert relative(found, effect) < rounding * max(10.0, _condition(model))
    assert relative(found, effect) < 0.5


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_trained_on_bfloat16_loads_on_float32(family: str, tmp_path: Path) -> None:
    model = _trained(build(family, torch.bfloat16))
    model.save_pretrained(tmp_path)
    other = _load(build(family), tmp_path)
    assert relative(logits(other, family), logits(model, family)) < 2 * TOLERANCE[torch.bfloat16]
    for mine, theirs in zip(_layers(other), _layers(model), strict=True):
        for key, tensor in mine.state_dict().items():
            if "clover_" in key:
                assert tensor.dtype == torch.float32
                assert torch.equal(tensor, theirs.state_dict()[key]), key


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapter_stays_in_float32_on_a_bfloat16_base(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    _saved(tmp_path)
    model = _load(build("llama", torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {t.dtype for k, t in model.state_dict().items() if "clover_" in k} == {torch.float32}
    assert logits(model, "llama").dtype == torch.bfloat16


def test_without_bases_another_precision_is_right_or_refused(tmp_path: Path) -> None:
    before = _saved(tmp_path, save_bases=False)
    base = logits(build("llama"), "llama")
    try:
        model = _load(build("llama", torch.bfloat16), tmp_path)
    except ValueError as error:
        assert "save_bases=True" in str(error)  # noqa: PT017 - either outcome is right
    else:
        effect = logits(model, "llama").double()
        with model.disable_adapter():
            effect -= logits(model, "llama").double()
        assert relative(effect, before.double() - base.double()) < 0.5


# ---------------------------------------------------------------------- what is written


def test_only_safetensors_config_and_card_are_written(tmp_path: Path) -> None:
    _saved(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, "adapter_config.json", "README.md"}


@pytest.mark.parametrize(
    ("save_bases", "choices", "qr", "svd"),
    [
        (True, dict(), {"S", "U", "S0"}, {"S", "U", "V", "S0"}),
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
    _saved(tmp_path, save_bases=save_bases, **choices)
    keys = set(load_file(tmp_path / WEIGHTS))
    prefix = "base_model.model.model.layers"
    assert keys == {
        f"{prefix}.{i}.{module}.clover_{name}.weight"
        for i in range(2)
        for module, names in (("self_attn.k_proj", qr), ("self_attn.v_proj", svd), ("mlp.up_proj", qr))
        for name in {*names, "norm"}
    }


def test_slices_of_a_fused_projection_are_keys_of_their_own(tmp_path: Path) -> None:
    _saved(tmp_path, "gpt2", target_modules=["attn.c_attn"])
    names = {key.partition("c_attn.")[2] for key in load_file(tmp_path / WEIGHTS)}
    assert {"clover_S.k", "clover_S.v", "clover_U.k", "clover_V.v", "clover_S0.v"} <= names


@pytest.mark.parametrize("adapter_name", ["other", "weight", "k"])
def test_name_of_the_adapter_is_in_no_key_and_changes_nothing(adapter_name: str, tmp_path: Path) -> None:
    before = _saved(tmp_path / "default", "gpt2")
    assert torch.equal(_saved(tmp_path, "gpt2", adapter_name), before)
    assert set(load_file(tmp_path / adapter_name / WEIGHTS)) == set(load_file(tmp_path / "default" / WEIGHTS))
    for name in ("default", adapter_name):
        model = _load(build("gpt2"), tmp_path / adapter_name, adapter_name=name)
        assert torch.equal(logits(model, "gpt2"), before), name


def test_folded_file_is_as_small_as_s_alone(tmp_path: Path) -> None:
    model = _trained(build("llama"))
    numbers = sum(p.numel() for name, p in model.named_parameters() if "clover_S" in name)
    for mode in MODES:
        model.peft_config["default"].save_bases = mode
        model.save_pretrained(tmp_path / str(mode))
    sizes = {mode: sum(t.numel() for t in load_file(tmp_path / str(mode) / WEIGHTS).values()) for mode in MODES}
    assert numbers < sizes["folded"] < 1.05 * numbers  # and the fingerprint
    assert sizes["folded"] < sizes[False] < 1.25 * numbers
    assert sizes[True] > 2 * numbers


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
    _trained(build("llama"), **choices).save_pretrained(tmp_path)
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
    _saved(tmp_path / "first")
    model = _load(build("llama"), tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    first, second = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("first", "second"))
    assert first.keys() == second.keys()
    assert "source" not in first


def test_saving_leaves_the_config_of_the_model_alone(tmp_path: Path) -> None:
    model = _trained(build("llama"), r=4, save_bases="folded")
    before = copy.deepcopy(model.peft_config["default"].to_dict())
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].to_dict() == before
    assert json.loads((tmp_path / "adapter_config.json").read_text())["folded"] is True


@pytest.mark.parametrize("times", [1, 2])
def test_card_says_once_what_to_import_and_names_the_base(times: int, tmp_path: Path) -> None:
    model = _trained(_base_in(tmp_path / "base"))
    for _ in range(times):
        model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert text.count("import clover_peft") == 1
    recipe = text.partition("import clover_peft")[2]
    assert str(tmp_path / "base") in recipe
    assert "from_pretrained" in recipe


def test_card_of_a_named_adapter_says_what_to_import(tmp_path: Path) -> None:
    _saved(tmp_path, adapter_name="other")
    cards = [path.read_text() for path in tmp_path.rglob("README.md")]
    assert cards
    assert all(card.count("import clover_peft") == 1 for card in cards)


# ---------------------------------------------------------------------- the ways to load


def _base_in(folder: Path, family: str = "llama") -> nn.Module:
    """The tiny model, saved as a checkpoint and loaded from there."""
    build(family).save_pretrained(folder)
    return hf.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Path, Tensor]:
    """Folder of a base model, folder of an adapter that names it, and the adapter's logits."""
    model = _trained(_base_in(tmp_path / "base"), task_type="CAUSAL_LM", modules_to_save=["lm_head"])
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
    assert len(_layers(model)) == 6
    assert torch.equal(logits(model, "llama"), before)


@pytest.mark.parametrize("save_bases", MODES)
def test_transformers_load_adapter_is_the_same_function(save_bases: bool | str, tmp_path: Path) -> None:
    before = _saved(tmp_path, save_bases=save_bases)
    model = build("llama")
    model.load_adapter(str(tmp_path), adapter_name="other")
    assert relative(logits(model, "llama"), before) < TOLERANCE[torch.float32]
    model.disable_adapters()
    assert torch.equal(logits(model, "llama"), logits(build("llama"), "llama"))


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
    assert torch.equal(logits(_load(build("llama"), tmp_path), "llama"), before)


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
    source = _trained(build("llama"), save_bases=save_bases)
    state = get_peft_model_state_dict(source)
    explicit = get_peft_model_state_dict(source, state_dict=source.state_dict())
    assert state.keys() == explicit.keys()
    target = get_peft_model(build("llama"), CloverConfig(save_bases=save_bases), adapter_name="elsewhere")
    assert not set_peft_model_state_dict(target, state, adapter_name="elsewhere").unexpected_keys
    assert torch.equal(logits(target, "llama"), logits(source, "llama"))
    assert get_peft_model_state_dict(source).keys() == state.keys()  # what was handed out was not changed


@pytest.mark.parametrize("name", ["inner", "deep/er"])
def test_subfolder_is_loaded(name: str, tmp_path: Path) -> None:
    before = _saved(tmp_path / name)
    assert torch.equal(logits(_load(build("llama"), tmp_path, subfolder=name), "llama"), before)


def test_second_adapter_is_loaded_beside_the_first(tmp_path: Path) -> None:
    first = _saved(tmp_path / "first", seed=3)
    second = _saved(tmp_path / "second", seed=4, r=5, target_modules=["v_proj", "q_proj"])
    model = _load(build("llama"), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(model, "llama"), first)
    model.set_adapter("second")
    assert torch.equal(logits(model, "llama"), second)
    model.delete_adapter("second")
    model.set_adapter("first")
    assert torch.equal(logits(model, "llama"), first)


def test_adapters_saved_together_are_folders_that_load_alone(tmp_path: Path) -> None:
    model = _trained(build("llama"), "one")
    model.add_adapter("two", CloverConfig(r=4, save_bases=False))
    perturb(model, seed=8)
    model.save_pretrained(tmp_path)
    for name in ("one", "two"):
        model.set_adapter(name)
        assert torch.equal(logits(_load(build("llama"), tmp_path / name), "llama"), logits(model, "llama")), name
    model.save_pretrained(tmp_path / "selected", selected_adapters=["two"])
    assert [path.name for path in (tmp_path / "selected").iterdir() if path.is_dir()] == ["two"]


def test_loading_over_an_adapter_replaces_it(tmp_path: Path) -> None:
    before = _saved(tmp_path)
    model = _trained(build("llama"), seed=11)
    assert relative(logits(model, "llama"), before) > 1e-3
    model.load_adapter(tmp_path, adapter_name="default")
    assert torch.equal(logits(model, "llama"), before)


# ---------------------------------------------------------------------- the meta device


@pytest.mark.parametrize("save_bases", [True, "folded"])
def test_base_on_meta_takes_its_weights_after_the_adapter(save_bases: bool | str, tmp_path: Path) -> None:
    before = _saved(tmp_path, "opt", save_bases=save_bases)
    with torch.device("meta"):
        base = hf.AutoModelForCausalLM.from_config(build("opt").config)
    model = _load(base, tmp_path, low_cpu_mem_usage=True)
    weights = build("opt").state_dict()
    renamed = {name.replace(".base_layer.", "."): name for name in model.get_base_model().state_dict()}
    state = {renamed[name]: tensor for name, tensor in weights.items()}
    model.get_base_model().load_state_dict(state, assign=True, strict=False)
    model.get_base_model().tie_weights()
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model.eval(), "opt"), before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_base_without_weights_cannot_be_given_bases(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    _saved(tmp_path, "opt", save_bases=False)
    with torch.device("meta"):
        base = hf.AutoModelForCausalLM.from_config(build("opt").config)
    with pytest.raises(ValueError, match=r"layers\.0\.\S+: the adapter was saved without its bases.*save_bases=True"):
        _load(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not _layers(base)


@pytest.mark.parametrize("action", ["run", "save", "merge", "merge_and_unload", "state_dict"])
@pytest.mark.parametrize("where", ["low_cpu_mem_usage", "meta base"])
def test_adapter_that_was_never_computed_is_not_used(action: str, where: str, tmp_path: Path) -> None:
    if where == "meta base":
        with torch.device("meta"):
            base = hf.AutoModelForCausalLM.from_config(build("opt").config)
        model = get_peft_model(base, CloverConfig())
    else:
        model = get_peft_model(build("opt"), CloverConfig(), low_cpu_mem_usage=True)
    assert len(_layers(model)) == 6
    actions = {
        "run": lambda: model(torch.ones(1, 3, dtype=torch.long, device=next(model.parameters()).device)),
        "save": lambda: model.save_pretrained(tmp_path / "adapter"),
        "merge": model.merge_adapter,
        "merge_and_unload": model.merge_and_unload,
        "state_dict": lambda: get_peft_model_state_dict(model),
    }
    message = r"layers\.0\.\S+: cannot \w+ adapter 'default'.*never computed or loaded.*load its weights"
    with pytest.raises(ValueError, match=message):
        actions[action]()
    assert not (tmp_path / "adapter" / WEIGHTS).exists()
    assert not any(layer.merged for layer in _layers(model))


# ---------------------------------------------------------------------- folded adapters


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_folded_adapter_is_not_trained_on(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    _saved(tmp_path, save_bases="folded")
    base = build("llama")
    with pytest.raises(ValueError, match=r"folded.*is_trainable=False.*save_bases=True"):
        _load(base, tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not _layers(base)
    assert torch.equal(logits(base, "llama"), logits(build("llama"), "llama"))
    model = _load(base, tmp_path)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="folded"):
        model.load_adapter(tmp_path, adapter_name="second", is_trainable=True)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("choices", [dict(), dict(s_matrix="diagonal"), dict(truncate=True, r=6)], ids=str)
def test_folded_file_does_not_go_into_a_trainable_adapter(choices: dict) -> None:
    state = get_peft_model_state_dict(_trained(build("llama"), save_bases="folded", **choices))
    model = _trained(build("llama"), seed=7, **choices)
    before = logits(model, "llama")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.k_proj: expected .* in the adapter's file"):
        set_peft_model_state_dict(model, state)
    assert torch.equal(logits(model, "llama"), before)


def test_trainable_file_does_not_go_into_a_folded_adapter(tmp_path: Path) -> None:
    before = _saved(tmp_path, save_bases="folded")
    model = _load(build("llama"), tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0\.\S+: expected .*, found .*folded"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(_trained(build("llama"), seed=7)))
    assert torch.equal(logits(model, "llama"), before)


def test_folded_adapter_saves_and_merges_as_itself(tmp_path: Path) -> None:
    before = _saved(tmp_path / "first", r=7, truncate=True, save_bases="folded")
    model = _load(build("llama"), tmp_path / "first")
    after = logits(model, "llama")
    assert relative(after, before) < TOLERANCE[torch.float32]
    model.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(_load(build("llama"), tmp_path / "second"), "llama"), after)
    assert relative(logits(model.merge_and_unload(), "llama"), before) < TOLERANCE[torch.float32]


# ---------------------------------------------------------------------- what is refused


def _cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def _random_bytes(folder: Path) -> None:
    numbers = torch.randint(256, (5000,), generator=torch.Generator().manual_seed(0))
    (folder / WEIGHTS).write_bytes(bytes(numbers.tolist()))


def _lora_weights(folder: Path) -> None:
    get_peft_model(build("llama"), LoraConfig(target_modules=["v_proj"])).save_pretrained(folder / "lora")
    (folder / WEIGHTS).write_bytes((folder / "lora" / WEIGHTS).read_bytes())


def _first(tensors: dict[str, Tensor], part: str) -> Tensor:
    return tensors[next(key for key in sorted(tensors) if f"1.self_attn.v_proj.clover_{part}." in key)]


def _other_layers(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if ".layers.1." in key]:
        del tensors[key]


# name -> (damage done to a folder, the message): what the loader must not swallow.
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (_cut, f"{WEIGHTS}: expected a whole safetensors file.*copy or download it again"),
    "random bytes": (_random_bytes, f"{WEIGHTS}: expected a whole safetensors file.*copy or download it again"),
    "empty file": (
        lambda folder: (folder / WEIGHTS).write_bytes(b""),
        f"{WEIGHTS}: expected a whole safetensors file.*copy or download it again",
    ),
    "no tensors": (
        lambda folder: save_file({}, folder / WEIGHTS),
        "expected a CLOVER adapter.*clover_S.*found 0 keys",
    ),
    "LoRA weights": (_lora_weights, "expected a CLOVER adapter.*clover_S.*found .*lora_"),
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        f"expected the adapter's weights, {WEIGHTS}, found no such file",
    ),
    **{
        f"{value} in {part}": (
            lambda folder, part=part, value=value: _edit(
                folder, lambda tensors: _first(tensors, part).view(-1)[5:6].fill_(float(value))
            ),
            rf"layers\.1\.self_attn\.v_proj: clover_{part} in the adapter's file has NaN or infinite values",
        )
        for part in ("S", "U", "V", "S0")
        for value in ("nan", "inf")
    },
    "rank of another config": (
        lambda folder: _edit_config(folder, r=5),
        r"layers\.0\.self_attn\.k_proj: expected .* in the adapter's file",
    ),
    "matrix of another config": (
        lambda folder: _edit_config(folder, s_matrix="diagonal"),
        r"layers\.0\.self_attn\.k_proj: expected .* in the adapter's file",
    ),
    "blocks of another config": (
        lambda folder: _edit_config(folder, block_size=6),
        r"layers\.0\.self_attn\.k_proj: expected clover_\w+ of shape \(4, 6(, 6)?\), found \(2, 12",
    ),
    "a layer missing": (
        lambda folder: _edit(folder, _other_layers),
        r"layers\.1\.self_attn\.k_proj: expected .*found \[\]",
    ),
    "targets of another config": (
        lambda folder: _edit_config(folder, target_modules=["v_proj", "o_proj"]),
        r"layers\.0\.self_attn\.o_proj: expected .*found \[\]",
    ),
    "fewer targets than the file": (
        lambda folder: _edit_config(folder, target_modules=["v_proj"]),
        r"layers\.0\.(self_attn\.k_proj|mlp\.up_proj): expected .*, found ",
    ),
    "unknown choice in the config": (
        lambda folder: _edit_config(folder, s_matrix="half"),
        "s_matrix: expected one of",
    ),
}


@contextmanager
def _kept(model: PeftModel) -> Iterator[None]:
    """What fails inside leaves a model with adapters as it was."""
    before = logits(model, "llama")
    modules = [(name, module) for name, module in model.named_modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapters, active = list(model.peft_config), list(model.active_adapters)
    yield
    assert list(model.peft_config) == adapters
    assert list(model.active_adapters) == active
    assert [(name, module) for name, module in model.named_modules()] == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for layer in _layers(model):
        assert list(layer.specs) == list(layer.clover_S) == list(layer.clover_dropout)
    assert torch.equal(logits(model, "llama"), before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_file_leaves_the_base_model_as_it_was(damage: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    _saved(tmp_path)
    spoil, message = DAMAGE[damage]
    spoil(tmp_path)
    base = build("llama")
    before, types = logits(base, "llama"), [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        _load(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not _layers(base)
    assert [type(module) for module in base.modules()] == types
    assert torch.equal(logits(base, "llama"), before)
    get_peft_model(base, CloverConfig())  # and it can be adapted again


@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_file_leaves_the_loaded_adapter_as_it_was(damage: str, tmp_path: Path) -> None:
    _saved(tmp_path)
    spoil, message = DAMAGE[damage]
    spoil(tmp_path)
    model = _trained(build("llama"), target_modules=["v_proj", "up_proj"], r=6)
    with _kept(model), pytest.raises(ValueError, match=f"(?s){message}"):
        model.load_adapter(tmp_path, adapter_name="second")


@pytest.mark.parametrize("damage", ["cut short", "random bytes", "nan in S", "a layer missing"])
def test_broken_file_does_not_replace_an_adapter(damage: str, tmp_path: Path) -> None:
    _saved(tmp_path)
    DAMAGE[damage][0](tmp_path)
    model = _trained(build("llama"), seed=12)
    with _kept(model), pytest.raises(Exception, match=r"(?i)header|deserializ|file"):
        model.load_adapter(tmp_path, adapter_name="default")


@pytest.mark.parametrize("from_file", [False, True])
def test_wrong_state_dict_does_not_replace_an_adapter(from_file: bool, tmp_path: Path) -> None:
    """Nor does it take out an adapter whose config came from a file."""
    _saved(tmp_path)
    config = CloverConfig.from_pretrained(tmp_path) if from_file else CloverConfig()
    model = get_peft_model(build("llama"), config)
    perturb(model)
    state = get_peft_model_state_dict(_trained(build("llama")))
    _first(state, "S").view(-1)[3] = torch.nan
    with _kept(model), pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj: clover_S .*NaN"):
        set_peft_model_state_dict(model, state)


@pytest.mark.parametrize(
    "choices",
    [
        dict(modules_to_save=["lm_head"]),
        dict(trainable_token_indices=[4, 9]),
        dict(bias="all"),
        dict(bias="clover_only"),
        dict(target_modules="all-linear"),
        dict(init_weights=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("loaded", [False, True])
def test_broken_file_of_an_adapter_with_more_than_maps_changes_nothing(
    choices: dict, loaded: bool, tmp_path: Path
) -> None:
    _saved(tmp_path, **choices)
    _edit(tmp_path, lambda tensors: _first(tensors, "S").fill_(torch.nan))
    base = build("llama")
    before, types = logits(base, "llama"), [type(module) for module in base.modules()]
    if loaded:
        model = _trained(base, target_modules=["v_proj"])
        outputs = logits(model, "llama")
        with pytest.raises(ValueError, match="NaN"):
            model.load_adapter(tmp_path, adapter_name="second")
        assert list(model.peft_config) == ["default"]
        assert list(model.active_adapters) == ["default"]
        assert torch.equal(logits(model, "llama"), outputs)
        assert torch.equal(logits(model.unload(), "llama"), before)
        return
    with pytest.raises(ValueError, match="NaN"):
        _load(base, tmp_path)
    assert [type(module) for module in base.modules()] == types
    assert torch.equal(logits(base, "llama"), before)


def test_failed_load_over_several_adapters_keeps_them_all(tmp_path: Path) -> None:
    _saved(tmp_path)
    _edit(tmp_path, lambda tensors: _first(tensors, "U").fill_(torch.nan))
    model = _trained(build("llama"), "one")
    model.add_adapter("two", CloverConfig(target_modules=["v_proj"], r=3))
    model.base_model.set_adapter(["one", "two"])
    with _kept(model), pytest.raises(ValueError, match="NaN"):
        model.load_adapter(tmp_path, adapter_name="three")


# ---------------------------------------------------------------------- another base


@pytest.mark.parametrize("save_bases", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_of_another_seed_is_refused_by_name(save_bases: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = _trained(build("llama", dtype), save_bases=save_bases)
    model.save_pretrained(tmp_path)
    base = build("llama", dtype, seed=1)
    before = logits(base, "llama")
    message = (
        r"^model\.layers\.0\.self_attn\.k_proj \(k, block \d\): expected the weights of the base.*check_base = False"
    )
    with pytest.raises(ValueError, match=message):
        _load(base, tmp_path)
    assert not _layers(base)
    assert torch.equal(logits(base, "llama"), before)


@pytest.mark.parametrize("case", CASES)
def test_a_load_compares_the_first_features_of_every_block(case: str) -> None:
    family, choices = CASES[case]
    model = get_peft_model(build(family), CloverConfig(**choices))
    for layer in _layers(model):
        for spec in layer.specs["default"]:
            found, stored = (
                fingerprint(model.base_model.model, layer.base_weight, spec),
                layer.tensors("default", spec).norm,
            )
            assert found.shape == (spec.blocks, min(8, spec.size))
            torch.testing.assert_close(found, stored[:, :8], rtol=1e-6, atol=0)


def test_first_module_that_differs_is_named(tmp_path: Path) -> None:
    _saved(tmp_path)
    base, other = build("llama"), build("llama", seed=1)
    base.model.layers[1].mlp.up_proj = other.model.layers[1].mlp.up_proj
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj \(up, block \d\)"):
        _load(base, tmp_path)


def test_partner_that_differs_is_noticed(tmp_path: Path) -> None:
    _saved(tmp_path)
    base, other = build("llama"), build("llama", seed=1)
    base.model.layers[1].self_attn.o_proj = other.model.layers[1].self_attn.o_proj
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.self_attn\.v_proj \(v, block \d\)"):
        _load(base, tmp_path)


@pytest.mark.parametrize(
    "shape", [dict(hidden_size=24), dict(intermediate_size=96), dict(num_hidden_layers=3)], ids=str
)
def test_base_of_another_shape_is_refused_by_name(shape: dict, tmp_path: Path) -> None:
    _saved(tmp_path)
    base = build("llama", **shape)
    before = logits(base, "llama")
    with pytest.raises(ValueError, match=r"^model\.layers\.\d\.\S+ ?.*: expected .*, found "):
        _load(base, tmp_path)
    assert not _layers(base)
    assert torch.equal(logits(base, "llama"), before)


@pytest.mark.parametrize("shape", [dict(head_dim=6), dict(intermediate_size=96)], ids=str)
def test_base_of_another_shape_is_refused_without_the_check_too(shape: dict, tmp_path: Path) -> None:
    _saved(tmp_path, check_base=False)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.\S+: expected clover_\w+ of shape .*, found "):
        _load(build("llama", **shape), tmp_path)


def test_base_with_fewer_layers_is_refused(tmp_path: Path) -> None:
    _saved(tmp_path)
    base = build("llama")
    del base.model.layers[1]
    base.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match=r"layers\.1\."):
        _load(base, tmp_path)
    assert not _layers(base)


@pytest.mark.parametrize("how", ["saved so", "changed in the file", "changed in the config"])
def test_check_base_false_lets_another_base_through(how: str, tmp_path: Path) -> None:
    _saved(tmp_path, check_base=how != "saved so")
    kwargs = {}
    if how == "changed in the file":
        _edit_config(tmp_path, check_base=False)
    elif how == "changed in the config":
        kwargs["config"] = CloverConfig.from_pretrained(tmp_path)
        kwargs["config"].check_base = False
    model = _load(build("llama", seed=1), tmp_path, **kwargs)
    expected = load_file(tmp_path / WEIGHTS)
    found = get_peft_model_state_dict(model)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_second_adapter_for_another_base_leaves_the_first(tmp_path: Path) -> None:
    _trained(build("llama", seed=1)).save_pretrained(tmp_path)
    model = _trained(build("llama"))
    with _kept(model), pytest.raises(ValueError, match=r"k_proj \(k, block \d\): expected the weights of the base"):
        model.load_adapter(tmp_path, adapter_name="second")


def test_another_base_is_noticed_with_low_cpu_mem_usage(tmp_path: Path) -> None:
    _saved(tmp_path)
    base = build("llama", seed=1)
    with pytest.raises(ValueError, match=r"k_proj \(k, block \d\): expected the weights of the base"):
        _load(base, tmp_path, low_cpu_mem_usage=True)
    assert not _layers(base)


# ---------------------------------------------------------------------- S alone, and what it stands on


@pytest.mark.parametrize("module", ["self_attn.v_proj", "self_attn.k_proj", "mlp.up_proj"])
def test_sign_of_a_basis_that_differs_is_refused(module: str, tmp_path: Path) -> None:
    """Singular vectors are defined up to sign, which S0 does not show; the probe does."""
    _saved(tmp_path, r=5, save_bases=False)
    key = f"base_model.model.model.layers.1.{module}.clover_probe.weight"

    def flip(tensors: dict[str, Tensor]) -> None:
        direction = int(tensors[key][0].abs().argmax())
        tensors[key][0, direction] *= -1

    _edit(tmp_path, flip)
    base = build("llama")
    message = (
        rf"layers\.1\.{module} \(\w+\): the adapter was saved with save_bases=False.*are not those.*save_bases=True"
    )
    with pytest.raises(ValueError, match=message):
        _load(base, tmp_path)
    assert not _layers(base)
    with pytest.raises(ValueError, match=message):
        _load(base, tmp_path, low_cpu_mem_usage=True)
    assert not _layers(base)


def _isotropic(noise: float = 0.0) -> nn.Module:
    """A model whose value-output heads have equal singular values, so that any rotation of their bases will do."""
    model = build("llama", num_key_value_heads=4)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight):
                weight.copy_(torch.linalg.qr(torch.randn(48, 48, generator=generator))[0])
                weight.add_(noise * torch.randn(48, 48, generator=generator))
    return model


def test_ambiguous_bases_are_refused_unless_they_are_saved(tmp_path: Path) -> None:
    """On a base that rounding alone sets apart, the recomputed bases are others; S alone would be another function."""
    for save_bases in (True, False):
        model = _trained(_isotropic(), target_modules=["v_proj"], save_bases=save_bases)
        model.save_pretrained(tmp_path / str(save_bases))
    before = logits(model, "llama")
    assert torch.equal(logits(_load(_isotropic(), tmp_path / "False"), "llama"), before)
    with pytest.raises(ValueError, match=r"v_proj \(v\): the adapter was saved with save_bases=False"):
        _load(_isotropic(1e-6), tmp_path / "False")
    assert relative(logits(_load(_isotropic(1e-6), tmp_path / "True"), "llama"), before) < 1e-4


@pytest.mark.parametrize("key", ["clover_probe", "clover_S0"])
def test_fingerprint_that_is_missing_is_refused(key: str, tmp_path: Path) -> None:
    _saved(tmp_path, save_bases=False)
    _edit(tmp_path, lambda tensors: [tensors.pop(k) for k in list(tensors) if key in k])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj: expected .*in the adapter's file, found"):
        _load(build("llama"), tmp_path)


def test_loading_one_adapter_leaves_another_of_the_same_structure_alone(tmp_path: Path) -> None:
    """Bases are shared when an adapter is made; writing another's into it must not reach the first."""
    rounded = build("llama").to(torch.bfloat16).float()
    _trained(rounded).save_pretrained(tmp_path)
    model = _trained(build("llama"))
    before = logits(model, "llama")
    config = CloverConfig.from_pretrained(tmp_path)
    config.check_base = False
    model.add_adapter("b", config)
    model.load_adapter(tmp_path, "b")
    assert torch.equal(logits(model, "llama"), before)
    model.set_adapter("b")
    assert not torch.equal(logits(model, "llama"), before)
    model.set_adapter("default")
    assert torch.equal(logits(model, "llama"), before)


def test_a_folded_adapter_knows_its_base(tmp_path: Path) -> None:
    _saved(tmp_path, save_bases="folded")
    with pytest.raises(ValueError, match="expected the weights of the base"):
        _load(build("llama", seed=1), tmp_path)


def test_another_base_of_the_same_statistics_is_noticed(tmp_path: Path) -> None:
    """Wide random weights have nearly the same singular values; the norms of their rows tell them apart."""
    shape = dict(hidden_size=512, intermediate_size=512, num_attention_heads=8, num_key_value_heads=8, head_dim=64)
    model = get_peft_model(build("llama", torch.bfloat16, **shape), CloverConfig())
    model.save_pretrained(tmp_path)
    _load(build("llama", torch.bfloat16, **shape), tmp_path)
    with pytest.raises(ValueError, match="expected the weights of the base"):
        _load(build("llama", torch.bfloat16, seed=1, **shape), tmp_path)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    _trained(build("llama")).save_pretrained(tmp_path, safe_serialization=False)
    base = build("llama")
    with pytest.raises(ValueError, match="a pickle, which is never read"):
        _load(base, tmp_path)
    assert not _layers(base)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "SEQ_CLS"])
def test_the_recipe_in_the_card_names_a_class_that_loads_the_adapter(task_type: str | None, tmp_path: Path) -> None:
    import peft

    _saved(tmp_path, task_type=task_type)
    card = (tmp_path / "README.md").read_text()
    name = card.partition("from peft import ")[2].split()[0]
    assert hasattr(peft, name)
    assert (name == "AutoPeftModel") == (task_type is None)


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


@pytest.mark.parametrize("reader", [None, CloverConfig, PeftConfig])
def test_a_load_that_is_refused_leaves_no_layers(reader, tmp_path: Path) -> None:
    _saved(tmp_path)
    base = build("llama", seed=9)
    config = None if reader is None else reader.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected the weights of the base model"):
        PeftModel.from_pretrained(base, tmp_path, config=config)
    assert not any(isinstance(module, CloverLayer) for module in base.modules())


def test_a_damaged_file_in_the_hubs_cache_is_found_before_anything_changes(tmp_path: Path, monkeypatch) -> None:
    _saved(tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS).write_bytes((tmp_path / "adapter" / WEIGHTS).read_bytes()[:1000])
    monkeypatch.setattr(
        "clover_peft.tuner.config.try_to_load_from_cache", lambda *_, **__: str(tmp_path / "adapter" / WEIGHTS)
    )
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        CloverConfig.from_pretrained("someone/adapter")


@pytest.mark.parametrize(
    "key", ["model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.v_proj.base_layer.weight"]
)
def test_weights_of_the_base_in_an_adapters_file_are_refused(key: str, tmp_path: Path) -> None:
    _saved(tmp_path)
    weight = build("llama").get_parameter(key.replace("base_layer.", ""))
    tensors = load_file(tmp_path / WEIGHTS) | {f"base_model.model.{key}": torch.zeros_like(weight)}
    save_file(tensors, tmp_path / WEIGHTS)
    base = build("llama").eval()
    before = logits(base, "llama")
    with pytest.raises(ValueError, match="expected no weights of the base model in the adapter's file"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(base, "llama"), before)


def test_a_folded_checkpoint_is_warned_of(tmp_path: Path) -> None:
    model = get_peft_model(build("llama"), CloverConfig(save_bases="folded"))
    with pytest.warns(UserWarning, match="can be neither resumed nor loaded as the best"):
        model.save_pretrained(tmp_path / "checkpoint-5")
