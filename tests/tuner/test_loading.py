"""Bases that an adapter's file holds are not computed first; all others are, at once, also by a config from a file."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clover_peft import CloverConfig, CloverLayer, hotswap_adapter, initialize_from_activations
from clover_peft.tuner import bases
from tests.support.tiny import TOLERANCE, build, inputs, logits, perturb, relative

WEIGHTS = "adapter_model.safetensors"
NEVER = r"cannot \w+ adapter 'default'.*never computed or loaded.*load its weights"


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """One entry for each slice whose bases are computed."""
    found: list[str] = []
    original = bases.compute_bases
    monkeypatch.setattr(bases, "compute_bases", lambda spec, *args: found.append(spec.part) or original(spec, *args))
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Tensor]:
    """Saves a base in `base` and a trained adapter of it in `adapter`; returns the adapter's logits."""

    def save(family: str = "llama", **choices) -> Tensor:
        build(family).save_pretrained(tmp_path / "base")
        base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        model = get_peft_model(base, CloverConfig(task_type="CAUSAL_LM", **choices)).eval()
        perturb(model)
        model.save_pretrained(tmp_path / "adapter")
        return logits(model, family)

    return save


def _layers(model: nn.Module) -> list[CloverLayer]:
    return [module for module in model.modules() if isinstance(module, CloverLayer)]


def _base(folder: Path) -> nn.Module:
    torch.manual_seed(987)  # never the seed that anything was made with
    return hf.AutoModelForCausalLM.from_pretrained(folder.parent / "base").eval()


def _with_config(reader: Callable[[Path], PeftConfig]) -> Callable[[Path], nn.Module]:
    return lambda folder: PeftModel.from_pretrained(_base(folder), folder, config=reader(folder))


def _beside_another(folder: Path) -> nn.Module:
    model = PeftModel.from_pretrained(_base(folder), folder, adapter_name="first")
    model.load_adapter(folder, "second")
    model.set_adapter("second", inference_mode=True)
    return model


def _by_transformers(folder: Path) -> nn.Module:
    model = _base(folder)
    model.load_adapter(str(folder), adapter_name="other")
    return model


def _by_state_dict(folder: Path, low_cpu_mem_usage: bool = False) -> nn.Module:
    model, state = _base(folder), load_file(folder / WEIGHTS)
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    config = PeftConfig.from_pretrained(folder)
    inject_adapter_in_model(config, model, state_dict=state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not set_peft_model_state_dict(model, state, low_cpu_mem_usage=low_cpu_mem_usage).unexpected_keys
    return model.eval()


# name -> how an adapter's folder becomes a model
LOADERS: dict[str, Callable[[Path], nn.Module]] = {
    "from_pretrained": lambda folder: PeftModel.from_pretrained(_base(folder), folder),
    "low_cpu_mem_usage": lambda folder: PeftModel.from_pretrained(_base(folder), folder, low_cpu_mem_usage=True),
    "config of CloverConfig": _with_config(CloverConfig.from_pretrained),
    "config of PeftConfig": _with_config(PeftConfig.from_pretrained),
    "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained,
    "load_adapter": _beside_another,
    "transformers' load_adapter": _by_transformers,
    "transformers' from_pretrained": lambda folder: hf.AutoModelForCausalLM.from_pretrained(folder).eval(),
    "state dict": _by_state_dict,
    "state dict, low_cpu_mem_usage": lambda folder: _by_state_dict(folder, low_cpu_mem_usage=True),
}


@pytest.mark.parametrize("save_bases", [True, "folded"])
@pytest.mark.parametrize("loader", LOADERS)
def test_bases_of_the_file_are_not_computed(loader: str, save_bases, saved, computed, tmp_path: Path) -> None:
    before = saved(save_bases=save_bases)
    computed.clear()
    model = LOADERS[loader](tmp_path / "adapter")
    assert not computed
    assert len(_layers(model)) == 6
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert all(layer.has_bases(name) for layer in _layers(model) for name in layer.specs)
    assert torch.equal(logits(model, "llama"), before)
    assert relative(logits(pickle.loads(pickle.dumps(model)), "llama"), before) == 0


@pytest.mark.parametrize(
    "choices",
    [dict(r=5), dict(r=7, truncate=True), dict(target_modules="all-linear", low_rank=2), dict(init_weights=False)],
    ids=str,
)
@pytest.mark.parametrize("trainable", [False, True])
def test_a_loaded_adapter_runs_trains_merges_and_saves(choices, trainable, saved, computed, tmp_path: Path) -> None:
    before = saved(**choices)
    computed.clear()
    model = PeftModel.from_pretrained(_base(tmp_path / "adapter"), tmp_path / "adapter", is_trainable=trainable)
    assert torch.equal(logits(model, "llama"), before)
    if trainable:
        copy.deepcopy(model)(**inputs("llama")).logits.square().mean().backward()
    model.save_pretrained(tmp_path / "again")
    first, second = load_file(tmp_path / "adapter" / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    merged = model.merge_and_unload(safe_merge=True)
    assert relative(logits(merged, "llama"), before) < TOLERANCE[torch.float32]
    assert not computed


@pytest.mark.parametrize("loader", [name for name in LOADERS if "transformers'" not in name])
def test_bases_that_the_file_lacks_are_computed_once(loader: str, saved, computed, tmp_path: Path) -> None:
    before = saved(save_bases=False)
    computed.clear()
    assert torch.equal(logits(LOADERS[loader](tmp_path / "adapter"), "llama"), before)
    assert sorted(computed) == ["k", "k", "up", "up", "v", "v"]


def test_transformers_computes_bases_that_the_file_lacks(saved, computed, tmp_path: Path) -> None:
    before = saved(save_bases=False)
    computed.clear()
    model = LOADERS["transformers' load_adapter"](tmp_path / "adapter")
    assert relative(logits(model, "llama"), before) < TOLERANCE[torch.float32]
    assert len(computed) == 6


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_bases_are_computed_where_the_config_is_wrong_about_them(family: str, saved, computed, tmp_path: Path) -> None:
    before = saved(family, save_bases=False)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"save_bases": false', '"save_bases": true'))
    computed.clear()
    model = PeftModel.from_pretrained(_base(tmp_path / "adapter"), tmp_path / "adapter")
    assert torch.equal(logits(model, family), before)
    assert len(computed) == 6


# ---------------------------------------------------------------------- a config from a file makes a new adapter


def _get_peft_model(base: nn.Module, config: CloverConfig) -> nn.Module:
    return get_peft_model(base, config)


def _trainable(base: nn.Module, config: CloverConfig) -> nn.Module:
    config.inference_mode = False
    return get_peft_model(base, config)


def _add_adapter(base: nn.Module, config: CloverConfig) -> nn.Module:
    model = get_peft_model(base, CloverConfig(r=1, target_modules=["q_proj"]), adapter_name="first")
    model.add_adapter("default", config)
    model.set_adapter("default")
    model.delete_adapter("first")
    return model


def _add_to_loaded(base: nn.Module, config: CloverConfig) -> nn.Module:
    model = PeftModel.from_pretrained(base, config.folder, adapter_name="first")
    model.add_adapter("default", config)
    model.set_adapter("default")
    model.delete_adapter("first")
    return model


def _transformers_add_adapter(base: nn.Module, config: CloverConfig) -> nn.Module:
    needed = hf.integrations.peft.MIN_PEFT_VERSION
    if Version(peft.__version__) < Version(needed):
        pytest.skip(f"transformers {hf.__version__} adds adapters with peft >= {needed} only")
    base.add_adapter(config)
    return base


MAKERS: dict[str, Callable[[nn.Module, CloverConfig], nn.Module]] = {
    "get_peft_model": _get_peft_model,
    "get_peft_model, trainable": _trainable,
    "add_adapter": _add_adapter,
    "add_adapter to a loaded model": _add_to_loaded,
    "inject_adapter_in_model": lambda base, config: inject_adapter_in_model(config, base),
    "transformers' add_adapter": _transformers_add_adapter,
}


@pytest.mark.parametrize("save_bases", [True, False])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_new_adapter_of_a_files_config_has_its_bases_at_once(maker, save_bases, saved, tmp_path: Path) -> None:
    saved(save_bases=save_bases)
    expected = get_peft_model_state_dict(get_peft_model(_base(tmp_path / "adapter"), CloverConfig()))
    expected = {key.removeprefix("base_model.model."): tensor for key, tensor in expected.items()}
    config = CloverConfig.from_pretrained(tmp_path / "adapter")
    config.save_bases = save_bases
    model = MAKERS[maker](_base(tmp_path / "adapter"), config)
    assert all(layer.has_bases("default") for layer in _layers(model))
    model.peft_config["default"].save_bases = True
    found = get_peft_model_state_dict(model)
    found = {key.removeprefix("base_model.model."): tensor for key, tensor in found.items()}
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    assert torch.equal(logits(copy.deepcopy(model).eval(), "llama"), logits(_base(tmp_path / "adapter"), "llama"))


def test_a_new_adapter_of_a_files_config_stands_on_its_own_base(saved, computed, tmp_path: Path) -> None:
    """Not on the one that the file was made on."""
    saved()
    computed.clear()
    other = get_peft_model(build("llama", seed=1), CloverConfig.from_pretrained(tmp_path / "adapter"))
    fresh = get_peft_model(build("llama", seed=1), CloverConfig())
    assert len(computed) == 12
    for mine, theirs in zip(_layers(other), _layers(fresh), strict=True):
        assert mine.specs["default"] == theirs.specs["default"]
        for spec in mine.specs["default"]:
            pairs = zip(mine.tensors("default", spec), theirs.tensors("default", spec), strict=True)
            assert all(a is b is None or torch.equal(a, b) for a, b in pairs)


def test_swapping_computes_nothing(saved, computed, tmp_path: Path) -> None:
    before = saved()
    model = PeftModel.from_pretrained(_base(tmp_path / "adapter"), tmp_path / "adapter")
    perturb(model, seed=8)
    computed.clear()
    hotswap_adapter(model, str(tmp_path / "adapter"))
    assert torch.equal(logits(model, "llama"), before)
    assert not computed


# ---------------------------------------------------------------------- a load that never comes


@pytest.fixture
def unloaded(saved, monkeypatch, tmp_path: Path) -> nn.Module:
    """What is left of a base model where the file vanished between the making of the adapter and its load."""
    saved()
    base = _base(tmp_path / "adapter")
    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.load_peft_weights", lambda *_, **__: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            PeftModel.from_pretrained(base, tmp_path / "adapter")
    return base


@pytest.mark.parametrize("first", [None, "to", "to_empty", "deepcopy", "load S alone"])
@pytest.mark.parametrize("action", ["run", "state dict", "merge"])
def test_bases_that_were_never_loaded_are_not_used(unloaded: nn.Module, first: str | None, action: str) -> None:
    model = unloaded
    if first == "to":
        model.to(torch.float64)
    elif first == "to_empty":
        model.to_empty(device="cpu")
    elif first == "deepcopy":
        model = copy.deepcopy(model)
    elif first == "load S alone":
        state = {name: torch.ones_like(p) for name, p in model.named_parameters() if "clover_S" in name}
        model.load_state_dict(state, strict=False)
    actions = {
        "run": lambda: model(**inputs("llama")),
        "state dict": lambda: get_peft_model_state_dict(model),
        "merge": _layers(model)[0].merge,
    }
    with pytest.raises(ValueError, match=NEVER):
        actions[action]()


def test_a_load_is_made_up_for(unloaded: nn.Module, computed, tmp_path: Path) -> None:
    before = logits(PeftModel.from_pretrained(_base(tmp_path / "adapter"), tmp_path / "adapter"), "llama")
    assert torch.equal(logits(PeftModel.from_pretrained(unloaded, tmp_path / "adapter"), "llama"), before)
    assert not computed


def test_a_model_takes_a_whole_state_dict_later(unloaded: nn.Module, tmp_path: Path) -> None:
    whole = PeftModel.from_pretrained(_base(tmp_path / "adapter"), tmp_path / "adapter")
    assert not unloaded.load_state_dict(whole.get_base_model().state_dict()).missing_keys
    assert torch.equal(logits(unloaded, "llama"), logits(whole, "llama"))


def test_transformers_loads_no_numbers_that_the_file_lacks(saved, tmp_path: Path) -> None:
    saved()
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    del tensors[next(key for key in tensors if "clover_U" in key)]
    save_file(tensors, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
    model = _base(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"expected .*clover_U.* in the adapter's file, found"):
        model.load_adapter(str(tmp_path / "adapter"))
    assert not _layers(model)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_a_folder_without_weights_changes_nothing(trainable: bool, beside: bool, saved, tmp_path: Path) -> None:
    saved()
    (tmp_path / "adapter" / WEIGHTS).unlink()
    base = _base(tmp_path / "adapter")
    model = get_peft_model(base, CloverConfig(target_modules=["v_proj"])) if beside else None
    load = (
        partial(PeftModel.from_pretrained, base)
        if model is None
        else partial(model.load_adapter, adapter_name="second")
    )
    with pytest.raises(ValueError, match=f"expected the adapter's weights, {WEIGHTS}, found no such file"):
        load(tmp_path / "adapter", is_trainable=trainable)
    assert [list(layer.specs) for layer in _layers(base)] == ([["default"]] * 2 if beside else [])


def test_a_load_with_a_config_of_ones_own_that_is_refused_leaves_no_layers(saved, tmp_path: Path) -> None:
    saved()
    base = build("llama", seed=9)
    with pytest.raises(ValueError, match="expected the weights of the base model"):
        PeftModel.from_pretrained(base, tmp_path / "adapter", config=CloverConfig())
    assert not _layers(base)


def test_a_loaded_model_compiles_as_it_is(saved, tmp_path: Path) -> None:
    before = saved()
    model = PeftModel.from_pretrained(_base(tmp_path / "adapter"), tmp_path / "adapter", is_trainable=True)
    graphs: list[int] = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(1) or graph.forward, fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(**inputs("llama")).logits, before) < TOLERANCE[torch.float32]
        compiled(**inputs("llama"))
    assert len(graphs) == 1


# ---------------------------------------------------------------------- weights set by hand


def _by_hand(folder: Path, base: nn.Module) -> PeftModel:
    """An adapter of a file's config, which gets the file's weights afterwards."""
    model = get_peft_model(base, PeftConfig.from_pretrained(folder))
    set_peft_model_state_dict(model, load_peft_weights(str(folder)))
    return model.eval()


def test_weights_set_by_hand_may_come_from_another_precision(saved, tmp_path: Path) -> None:
    saved()
    narrow = _base(tmp_path / "adapter").bfloat16()
    adapted = get_peft_model(narrow, CloverConfig(task_type="CAUSAL_LM"))
    perturb(adapted)
    adapted.save_pretrained(tmp_path / "narrow")
    expected = logits(PeftModel.from_pretrained(_base(tmp_path / "adapter"), tmp_path / "narrow"), "llama")
    assert torch.equal(logits(_by_hand(tmp_path / "narrow", _base(tmp_path / "adapter")), "llama"), expected)


def test_weights_set_by_hand_may_have_bases_of_activations(saved, tmp_path: Path) -> None:
    saved()
    adapted = get_peft_model(_base(tmp_path / "adapter"), CloverConfig(task_type="CAUSAL_LM"))
    initialize_from_activations(adapted, [inputs("llama")] * 4)
    perturb(adapted)
    adapted.save_pretrained(tmp_path / "activations")
    found = _by_hand(tmp_path / "activations", _base(tmp_path / "adapter"))
    assert torch.equal(logits(found, "llama"), logits(adapted.eval(), "llama"))


def test_a_failed_load_takes_out_no_adapter_of_the_same_name(saved, monkeypatch, tmp_path: Path) -> None:
    saved()
    model = PeftModel.from_pretrained(_base(tmp_path / "adapter"), tmp_path / "adapter")
    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.load_peft_weights", lambda *_, **__: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            model.load_adapter(tmp_path / "adapter", "second")
    model.delete_adapter("second")
    model.add_adapter("second", CloverConfig())
    damaged = load_peft_weights(str(tmp_path / "adapter"))
    damaged.pop(next(key for key in damaged if "clover_S" in key))
    with pytest.raises(ValueError, match="expected"):
        set_peft_model_state_dict(model, damaged, adapter_name="second")
    assert list(model.peft_config) == ["default", "second"]


def test_a_replica_refuses_to_take_out_merged_adapters(saved, tmp_path: Path) -> None:
    """It shares plain attributes with the original layer, which would lose its merge without a word."""
    saved()
    model = PeftModel.from_pretrained(_base(tmp_path / "adapter"), tmp_path / "adapter")
    model.merge_adapter()
    merged = logits(model, "llama")
    model.base_model.disable_adapter_layers()
    layer = _layers(model)[0]
    with pytest.raises(ValueError, match=r"DataParallel replica.*call unmerge_adapter\(\)"):
        layer._replicate_for_data_parallel()(torch.zeros(1, 2, layer.in_features))
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model, "llama"), merged)
