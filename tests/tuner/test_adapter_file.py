"""A file that is damaged or does not fit is refused, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from clover_peft import CloverConfig
from tests.support.adapters import layers
from tests.support.saved_adapters import (
    WEIGHTS,
    edit,
    edit_config,
    first_tensor,
    kept,
    load,
    save_trained,
    trained_model,
)
from tests.support.tiny import build, logits, perturb


def _cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def _random_bytes(folder: Path) -> None:
    numbers = torch.randint(256, (5000,), generator=torch.Generator().manual_seed(0))
    (folder / WEIGHTS).write_bytes(bytes(numbers.tolist()))


def _lora_weights(folder: Path) -> None:
    get_peft_model(build("llama"), LoraConfig(target_modules=["v_proj"])).save_pretrained(folder / "lora")
    (folder / WEIGHTS).write_bytes((folder / "lora" / WEIGHTS).read_bytes())


def _other_layers(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if ".layers.1." in key]:
        del tensors[key]


def test_numbers_that_are_not_finite_are_found_in_trained_modules_too(tmp_path):
    save_trained(tmp_path, modules_to_save=["lm_head"])
    edit(
        tmp_path,
        lambda tensors: next(t for key, t in tensors.items() if "lm_head" in key).view(-1)[7].fill_(torch.nan),
    )
    with pytest.raises(ValueError, match=r"lm_head\S* in the adapter's file has NaN or infinite values"):
        load(build("llama"), tmp_path)


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
            lambda folder, part=part, value=value: edit(
                folder, lambda tensors: first_tensor(tensors, part).view(-1)[5:6].fill_(float(value))
            ),
            rf"layers\.1\.self_attn\.v_proj: clover_{part}\S* in the adapter's file has NaN or infinite values",
        )
        for part in ("S", "U", "V", "S0")
        for value in ("nan", "inf")
    },
    "rank of another config": (
        lambda folder: edit_config(folder, r=5),
        r"layers\.0\.self_attn\.k_proj: expected .* in the adapter's file",
    ),
    "matrix of another config": (
        lambda folder: edit_config(folder, s_matrix="diagonal"),
        r"layers\.0\.self_attn\.k_proj: expected .* in the adapter's file",
    ),
    "blocks of another config": (
        lambda folder: edit_config(folder, block_size=6),
        r"layers\.0\.self_attn\.k_proj: expected clover_\w+ of shape \(4, 6(, 6)?\), found \(2, 12",
    ),
    "a layer missing": (
        lambda folder: edit(folder, _other_layers),
        r"layers\.1\.self_attn\.k_proj: expected .*found \[\]",
    ),
    "targets of another config": (
        lambda folder: edit_config(folder, target_modules=["v_proj", "o_proj"]),
        r"layers\.0\.self_attn\.o_proj: expected .*found \[\]",
    ),
    "fewer targets than the file": (
        lambda folder: edit_config(folder, target_modules=["v_proj"]),
        r"layers\.0\.(self_attn\.k_proj|mlp\.up_proj): expected .*, found ",
    ),
    "unknown choice in the config": (
        lambda folder: edit_config(folder, s_matrix="half"),
        "s_matrix: expected one of",
    ),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_file_leaves_the_base_model_as_it_was(damage: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    save_trained(tmp_path)
    spoil, message = DAMAGE[damage]
    spoil(tmp_path)
    base = build("llama")
    before, types = logits(base, "llama"), [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not layers(base)
    assert [type(module) for module in base.modules()] == types
    assert torch.equal(logits(base, "llama"), before)
    get_peft_model(base, CloverConfig())  # and it can be adapted again


@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_file_leaves_the_loaded_adapter_as_it_was(damage: str, tmp_path: Path) -> None:
    save_trained(tmp_path)
    spoil, message = DAMAGE[damage]
    spoil(tmp_path)
    model = trained_model(build("llama"), target_modules=["v_proj", "up_proj"], r=6)
    with kept(model), pytest.raises(ValueError, match=f"(?s){message}"):
        model.load_adapter(tmp_path, adapter_name="second")


@pytest.mark.parametrize("damage", ["cut short", "random bytes", "nan in S", "a layer missing"])
def test_broken_file_does_not_replace_an_adapter(damage: str, tmp_path: Path) -> None:
    save_trained(tmp_path)
    DAMAGE[damage][0](tmp_path)
    model = trained_model(build("llama"), seed=12)
    with kept(model), pytest.raises(Exception, match=r"(?i)header|deserializ|file"):
        model.load_adapter(tmp_path, adapter_name="default")


@pytest.mark.parametrize("from_file", [False, True])
def test_wrong_state_dict_does_not_replace_an_adapter(from_file: bool, tmp_path: Path) -> None:
    """Nor does it take out an adapter whose config came from a file."""
    save_trained(tmp_path)
    config = CloverConfig.from_pretrained(tmp_path) if from_file else CloverConfig()
    model = get_peft_model(build("llama"), config)
    perturb(model)
    state = get_peft_model_state_dict(trained_model(build("llama")))
    first_tensor(state, "S").view(-1)[3] = torch.nan
    with kept(model), pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj: clover_S.*NaN"):
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
    save_trained(tmp_path, **choices)
    edit(tmp_path, lambda tensors: first_tensor(tensors, "S").fill_(torch.nan))
    base = build("llama")
    before, types = logits(base, "llama"), [type(module) for module in base.modules()]
    if loaded:
        model = trained_model(base, target_modules=["v_proj"])
        outputs = logits(model, "llama")
        with pytest.raises(ValueError, match="NaN"):
            model.load_adapter(tmp_path, adapter_name="second")
        assert list(model.peft_config) == ["default"]
        assert list(model.active_adapters) == ["default"]
        assert torch.equal(logits(model, "llama"), outputs)
        assert torch.equal(logits(model.unload(), "llama"), before)
        return
    with pytest.raises(ValueError, match="NaN"):
        load(base, tmp_path)
    assert [type(module) for module in base.modules()] == types
    assert torch.equal(logits(base, "llama"), before)


def test_failed_load_over_several_adapters_keeps_them_all(tmp_path: Path) -> None:
    save_trained(tmp_path)
    edit(tmp_path, lambda tensors: first_tensor(tensors, "U").fill_(torch.nan))
    model = trained_model(build("llama"), "one")
    model.add_adapter("two", CloverConfig(target_modules=["v_proj"], r=3))
    model.base_model.set_adapter(["one", "two"])
    with kept(model), pytest.raises(ValueError, match="NaN"):
        model.load_adapter(tmp_path, adapter_name="three")


@pytest.mark.parametrize("key", ["clover_probe", "clover_S0"])
def test_fingerprint_that_is_missing_is_refused(key: str, tmp_path: Path) -> None:
    save_trained(tmp_path, save_bases=False)
    edit(tmp_path, lambda tensors: [tensors.pop(k) for k in list(tensors) if key in k])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj: expected .*in the adapter's file, found"):
        load(build("llama"), tmp_path)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    save_trained(tmp_path)  # its config; an earlier version wrote pickles too
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS).unlink()
    base = build("llama")
    with pytest.raises(ValueError, match="a pickle, which is never read"):
        load(base, tmp_path)
    assert not layers(base)


def test_a_damaged_file_in_the_hubs_cache_is_found_before_anything_changes(tmp_path: Path, monkeypatch) -> None:
    save_trained(tmp_path / "adapter")
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
    save_trained(tmp_path)
    weight = build("llama").get_parameter(key.replace("base_layer.", ""))
    tensors = load_file(tmp_path / WEIGHTS) | {f"base_model.model.{key}": torch.zeros_like(weight)}
    save_file(tensors, tmp_path / WEIGHTS)
    base = build("llama").eval()
    before = logits(base, "llama")
    with pytest.raises(ValueError, match="expected no weights of the base model in the adapter's file"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(base, "llama"), before)


def _trained_alone(model: PeftModel) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(model)
    return {key: tensor for key, tensor in state.items() if any(f".clover_{name}." in key for name in "SAB")}


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize(
    "choices", [dict(), dict(s_matrix="diagonal"), dict(low_rank=3), dict(save_bases=False)], ids=str
)
def test_trained_tensors_alone_are_set_in_an_adapter_with_bases(computed: bool, choices: dict, tmp_path: Path) -> None:
    trained = trained_model(build("llama"), **choices)
    if computed:
        model = get_peft_model(build("llama"), CloverConfig(**choices))
    else:
        save_trained(tmp_path, seed=7, **choices)
        model = load(build("llama"), tmp_path)
    state = _trained_alone(trained)
    assert set_peft_model_state_dict(model, state).unexpected_keys == []
    assert torch.equal(logits(model, "llama"), logits(trained, "llama"))


def test_trained_tensors_of_one_layer_leave_the_others_alone() -> None:
    model, trained = trained_model(build("llama"), seed=7), trained_model(build("llama"))
    before = get_peft_model_state_dict(model)
    before = {key: tensor.clone() for key, tensor in before.items()}
    one = {key: tensor for key, tensor in _trained_alone(trained).items() if ".layers.0." in key}
    set_peft_model_state_dict(model, one)
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(after[key], one.get(key, before[key])) for key in after)


def _wrong_shape(state: dict[str, Tensor]) -> None:
    first_tensor(state, "S").resize_(1, 2, 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: first_tensor(state, "S").view(-1).fill_(torch.nan), "NaN"),
        (_wrong_shape, "expected clover_S of shape"),
        (lambda state: state.update({"base_model.model.elsewhere.clover_S.weight": torch.ones(2)}), "without a place"),
        (lambda state: [state.pop(key) for key in list(state)], "found \\[\\]"),
    ],
    ids=["NaN", "shape", "elsewhere", "empty"],
)
def test_trained_tensors_alone_are_checked(damage: Callable[[dict], object], message: str) -> None:
    model, state = trained_model(build("llama"), seed=7), _trained_alone(trained_model(build("llama")))
    state = {key: tensor.clone() for key, tensor in state.items()}
    damage(state)
    with kept(model), pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, state)


def test_trained_tensors_alone_are_no_adapters_file(tmp_path: Path) -> None:
    """Its bases could be others than those computed here."""
    save_trained(tmp_path)
    alone = {key: tensor for key, tensor in load_file(tmp_path / WEIGHTS).items() if "clover_S." in key}
    save_file(alone, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"expected .* in the adapter's file"):
        load(build("llama"), tmp_path)
    model = trained_model(build("llama"), seed=7)
    with kept(model), pytest.raises(ValueError, match=r"expected .* in the adapter's file"):
        model.load_adapter(tmp_path, adapter_name="default")


def test_trained_tensors_alone_are_no_maps_of_a_folded_adapter(tmp_path: Path) -> None:
    """S of a block that is trained whole has the shape of its map."""
    save_trained(tmp_path, save_bases="folded")
    model = load(build("llama"), tmp_path)
    with kept(model), pytest.raises(ValueError, match="in the adapter's file"):
        set_peft_model_state_dict(model, _trained_alone(trained_model(build("llama"), seed=7)))
