"""Behaviours of LoRA in peft that go beyond one adapter at a time: mixed batches, sums, swaps, conversion."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora, set_peft_model_state_dict

from clover_peft import CloverConfig, CloverLayer, hotswap_adapter, lora_errors
from clover_peft.tuner.bases import clover_layers
from tests.support.tiny import TOLERANCE, build, inputs, logits, perturb, relative

pytestmark = pytest.mark.usefixtures("one_thread")


def _two(family: str = "llama", **kwargs) -> PeftModel:
    """A model with the trained adapters "a" and "b"."""
    model = get_peft_model(build(family), CloverConfig(**kwargs), adapter_name="a")
    perturb(model, seed=1)
    model.add_adapter("b", CloverConfig(**kwargs))
    only_b = {name: p for name, p in model.named_parameters() if ".b." in name}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in only_b.values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


# ---------------------------------------------------------------------- mixed batches


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart", "t5", "bert", "vit"])
def test_a_mixed_batch_gives_every_sample_its_adapter(family):
    model = _two(family).eval()
    batch = inputs(family, batch=4)
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["b", "__base__", "a", "b"]).logits
        for rows, name in (([0, 3], "b"), ([2], "a")):
            model.set_adapter(name)
            alone = model(**batch).logits
            assert relative(mixed[rows], alone[rows]) < TOLERANCE[torch.float32]
        with model.disable_adapter():
            assert torch.equal(mixed[1], model(**batch).logits[1])
    assert relative(mixed[0], mixed[2]) > 1e-3
    assert not any(layer._forward_pre_hooks for _, layer in clover_layers(model))


@pytest.mark.parametrize(("family", "beams"), [("llama", 1), ("llama", 3), ("bart", 3), ("t5", 3), ("whisper", 2)])
def test_a_mixed_batch_generates_as_each_adapter_does(family, beams):
    model = _two(family).eval()
    batch = {k: v for k, v in inputs(family, batch=3).items() if k != "decoder_input_ids"}
    options = dict(max_new_tokens=5, min_new_tokens=5, num_beams=beams, do_sample=False)
    mixed = model.generate(**batch, adapter_names=["a", "b", "__base__"], **options)
    for row, name in enumerate(["a", "b"]):
        model.set_adapter(name)
        assert torch.equal(model.generate(**batch, **options)[row], mixed[row])
    with model.disable_adapter():
        assert torch.equal(model.generate(**batch, **options)[2], mixed[2])


def test_a_mixed_batch_goes_through_modules_to_save():
    model = get_peft_model(build("llama"), CloverConfig(modules_to_save=["lm_head"]), adapter_name="a")
    model.add_adapter("b", CloverConfig(modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["b"].weight.mul_(2)
    model.eval()
    batch = inputs("llama")
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["a", "b"]).logits
        plain = model(**batch).logits
    assert torch.equal(mixed[0], plain[0])
    assert relative(mixed[1], 2 * plain[1]) < TOLERANCE[torch.float32]


def test_what_a_mixed_batch_cannot_do_is_refused():
    model = _two().eval()
    batch = inputs("llama")
    with pytest.raises(ValueError, match="one name in adapter_names for each of the 2 rows"):
        model(**batch, adapter_names=["a"])
    with pytest.raises(ValueError, match="expected adapters out of"):
        model(**batch, adapter_names=["a", "c"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**batch, adapter_names=["a", "b"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter first"):
        model(**batch, adapter_names=["a", "b"])
    assert not any(layer._forward_pre_hooks for _, layer in clover_layers(model))


# ---------------------------------------------------------------------- weighted sums


@pytest.mark.parametrize("options", [{}, {"s_matrix": "diagonal"}, {"r": 4}, {"r": 4, "truncate": True}])
def test_a_weighted_adapter_is_the_weighted_sum_of_the_maps(options):
    model = _two(**options).eval()
    model.add_weighted_adapter(["a", "b"], [0.7, -0.2], "sum")
    for _, layer in clover_layers(model):
        for spec in layer.specs["sum"]:
            a, b, total = (spec.residual_map(layer.tensors(name, spec)) for name in ("a", "b", "sum"))
            zero = spec.residual_map(layer.tensors("a", spec)._replace(s=torch.zeros_like(layer.tensors("a", spec).s)))
            assert relative(total - zero, 0.7 * (a - zero) - 0.2 * (b - zero)) < TOLERANCE[torch.float32]
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum." in name)
    model.set_adapter("sum")
    assert not torch.equal(logits(model, "llama"), logits(build("llama"), "llama"))


def test_a_weighted_adapter_covers_the_modules_of_all(tmp_path):
    model = get_peft_model(build("llama"), CloverConfig(target_modules=["v_proj"]), adapter_name="a")
    model.add_adapter("b", CloverConfig(target_modules=["up_proj"]))
    perturb(model)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    model.base_model.set_adapter(["a", "b"])
    both = logits(model, "llama")
    model.set_adapter("sum")
    assert relative(logits(model, "llama"), both) < TOLERANCE[torch.float32]
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "sum")
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


def test_adapters_that_do_not_fit_together_are_not_combined():
    model = _two()
    model.add_adapter("small", CloverConfig(r=4))
    model.add_adapter("head", CloverConfig(modules_to_save=["lm_head"]))
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=r"layers.0.*different bases"):
        model.add_weighted_adapter(["a", "small"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match="whole modules or tokens"):
        model.add_weighted_adapter(["a", "head"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match="one weight"):
        model.add_weighted_adapter(["a", "b"], [1.0], "sum")
    with pytest.raises(ValueError, match="exists already"):
        model.add_weighted_adapter(["a"], [1.0], "b")
    with pytest.raises(ValueError, match="'linear'"):
        model.add_weighted_adapter(["a"], [1.0], "sum", combination_type="svd")
    assert set(model.state_dict()) == before
    assert "sum" not in model.peft_config


def test_adapters_in_other_bases_are_not_combined():
    model = _two()
    _, layer = clover_layers(model)[0]
    with torch.no_grad():
        layer.tensors("b", layer.specs["b"][0]).u.mul_(1.5)
    with pytest.raises(ValueError, match="different bases"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")


def test_fingerprints_that_rounding_sets_apart_are_no_other_bases():
    model = _two()
    _, layer = clover_layers(model)[0]
    with torch.no_grad():
        layer.tensors("b", layer.specs["b"][0]).norm.mul_(1 + 3e-7)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert "sum" in model.peft_config


# ---------------------------------------------------------------------- hotswapping


def _saved(folder, seed: int, **options) -> str:
    model = get_peft_model(build("llama"), CloverConfig(**options))
    perturb(model, seed=seed)
    model.save_pretrained(folder)
    return str(folder)


def test_a_hotswap_changes_the_numbers_in_place(tmp_path):
    one, two = _saved(tmp_path / "one", 1), _saved(tmp_path / "two", 2)
    model = PeftModel.from_pretrained(build("llama"), one)
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    hotswap_adapter(model, two)
    assert torch.equal(logits(model, "llama"), logits(PeftModel.from_pretrained(build("llama"), two), "llama"))
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses
    hotswap_adapter(model, one)
    assert torch.equal(logits(model, "llama"), logits(PeftModel.from_pretrained(build("llama"), one), "llama"))


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4},
        {"r": 4, "truncate": True},
        {"s_matrix": "diagonal"},
        {"target_modules": ["v_proj"]},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
    ],
    ids=str,
)
def test_an_adapter_of_another_structure_is_not_swapped_in(tmp_path, options):
    model = PeftModel.from_pretrained(build("llama"), _saved(tmp_path / "one", 1))
    expected = logits(model, "llama")
    with pytest.raises(ValueError, match="expected"):
        hotswap_adapter(model, _saved(tmp_path / "two", 2, **options))
    assert torch.equal(logits(model, "llama"), expected)
    assert list(model.peft_config) == ["default"]


def test_only_a_loaded_unmerged_clover_adapter_is_swapped(tmp_path):
    one = _saved(tmp_path / "one", 1)
    model = PeftModel.from_pretrained(build("llama"), one)
    with pytest.raises(ValueError, match="expected a loaded CLOVER adapter"):
        hotswap_adapter(model, one, "other")
    get_peft_model(build("llama"), LoraConfig()).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="expected a CLOVER adapter, found LoraConfig"):
        hotswap_adapter(model, str(tmp_path / "lora"))
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        hotswap_adapter(model, one)


@pytest.mark.slow
def test_a_hotswap_compiles_nothing_again(tmp_path):
    one, two = _saved(tmp_path / "one", 1), _saved(tmp_path / "two", 2)
    model = PeftModel.from_pretrained(build("llama"), one)
    compiled = torch.compile(model)
    batch = inputs("llama")
    with torch.no_grad():
        first = compiled(**batch).logits
        with torch._dynamo.config.patch(error_on_recompile=True):
            hotswap_adapter(compiled, two)
            second = compiled(**batch).logits
    assert relative(first, second) > 1e-3
    expected = logits(PeftModel.from_pretrained(build("llama"), two), "llama")
    assert relative(second, expected) < TOLERANCE[torch.float32]


# ---------------------------------------------------------------------- conversion to LoRA


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
        assert abs(relative(approximated, delta) - errors[name][4]) < 1e-4, name


def test_an_untrained_adapter_loses_nothing_and_a_missing_one_is_named():
    model = get_peft_model(build("llama"), CloverConfig())
    assert set(lora_errors(model)["all"].values()) == {0.0}
    with pytest.raises(ValueError, match="'other'"):
        lora_errors(model, adapter_name="other")


def test_biases_that_change_cannot_become_a_lora():
    model = get_peft_model(build("gpt2"), CloverConfig())
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=4)


# ---------------------------------------------------------------------- copies


def test_copies_and_pickles_compute_the_same_merged_or_not():
    model = get_peft_model(build("llama"), CloverConfig())
    perturb(model)
    expected = logits(model, "llama")
    base = logits(build("llama"), "llama")
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other, "llama"), logits(model, "llama"))
            if merged:
                other.unmerge_adapter()
            assert torch.equal(logits(other, "llama"), expected)
            assert torch.equal(logits(other.unload(), "llama"), base)


def test_two_peft_models_on_one_base_share_its_layers():
    base = build("llama")
    expected = logits(base, "llama")
    first = get_peft_model(base, CloverConfig(), adapter_name="first")
    perturb(first)
    once = logits(first, "llama")
    with pytest.warns(UserWarning, match="second time"):
        second = get_peft_model(first.base_model.model, CloverConfig(), adapter_name="second")
    assert all(type(layer.base_layer) is torch.nn.Linear for _, layer in clover_layers(second))
    second.base_model.set_adapter(["first"])
    assert torch.equal(logits(second, "llama"), once)
    assert torch.equal(logits(second.unload(), "llama"), expected)
    assert isinstance(first, PeftModel)


def test_merging_in_inference_mode_leaves_a_model_that_can_be_trained():
    model = get_peft_model(build("llama"), CloverConfig())
    perturb(model)
    with torch.inference_mode():
        model.merge_adapter()
    merged = model.merge_and_unload()
    assert not any(p.is_inference() for p in merged.parameters())
    merged.requires_grad_(True)
    merged(**inputs("llama")).logits.sum().backward()


def test_layer_status_sees_every_layer():
    model = _two()
    status = model.get_model_status()
    assert status.enabled
    assert (status.active_adapters, status.merged_adapters) == (["a"], [])
    assert len(model.get_layer_status()) == sum(isinstance(m, CloverLayer) for m in model.modules())
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["a"]
