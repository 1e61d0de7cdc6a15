"""Adapters are switched, added, deleted and named as peft's others are, and do not disturb each other."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from clover_peft import CloverConfig
from tests.support.adapters import FORMS, activate, adapted, base_tensors, layers, same, several
from tests.support.tiny import TOLERANCE, build, logits, perturb, relative


@pytest.mark.parametrize("form", FORMS)
def test_disabled_is_the_base_bit_for_bit_and_enabling_restores_the_adapter(form):
    base = logits(build("llama"), "llama")
    model = adapted(**FORMS[form])
    on = logits(model, "llama")
    assert relative(on, base) > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), base)
        with model.disable_adapter():
            assert torch.equal(logits(model, "llama"), base)
    assert torch.equal(logits(model, "llama"), on)
    assert any(p.requires_grad for p in model.parameters())


def test_disabled_is_the_base_also_after_an_error_inside():
    model = adapted()
    on = logits(model, "llama")
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(logits(model, "llama"), on)


def test_disabled_while_merged_is_the_base_bit_for_bit():
    base = logits(build("qwen2"), "qwen2")
    model = adapted("qwen2")
    on = logits(model, "qwen2")
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, "qwen2"), base)
    assert relative(logits(model, "qwen2"), on) < TOLERANCE[torch.float32]


def test_set_adapter_selects_what_runs_and_what_is_trained():
    model = several({"a": {}, "b": {"s_matrix": "diagonal"}})
    outputs = {}
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        output = logits(model, "llama")
        assert torch.equal(outputs.setdefault(name, output), output)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 6
        assert all(f".clover_S.{name}." in n for n in trained)
    assert relative(outputs["a"], outputs["b"]) > 1e-3


def test_an_adapter_is_not_disturbed_by_another_one():
    alone = logits(adapted(), "llama")
    model = adapted()
    model.add_adapter("other", CloverConfig(r=4, s_matrix="diagonal"))
    model.set_adapter("other")
    perturbed = [p for n, p in model.named_parameters() if ".clover_S.other." in n]
    for parameter in perturbed:
        nn.init.normal_(parameter)
    model.set_adapter("default")
    assert torch.equal(logits(model, "llama"), alone)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_active_adapters_add_their_effects_in_any_order(family):
    names = {name.replace(" ", "_"): FORMS[name] for name in ("full", "diagonal", "leading", "half heads")}
    if family == "gpt_neox":  # the rotated slice of a head has four features, the other one twelve
        names = {"full": {}, "diagonal": {"s_matrix": "diagonal"}, "leading": {"r": 2}, "twos": {"block_size": 2}}
    model = several(names, family)
    for layer in layers(model):
        x = torch.randn(3, 5, layer.get_base_layer().weight.shape[0 if family == "gpt2" else 1])
        z = layer.get_base_layer()(x)
        effects = []
        for name in names:
            activate(model, name)
            effects.append(layer(x) - z)
            assert relative(effects[-1], z) > 1e-3
        activate(model, list(names))
        assert relative(layer(x), z + sum(effects)) < TOLERANCE[torch.float32]
        activate(model, list(names)[::-1])
        assert relative(layer(x), z + sum(effects)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("order", [["short", "plain"], ["plain", "short"]])
def test_an_adapter_adds_to_one_that_truncates(family, order):
    model = several({"short": {"r": 6, "truncate": True}, "plain": {}}, family)
    for layer in layers(model):
        x = torch.randn(3, 5, layer.get_base_layer().weight.shape[0 if family == "gpt2" else 1])
        z = layer.get_base_layer()(x)
        activate(model, "plain")
        effect = layer(x) - z
        activate(model, "short")
        truncated = layer(x)
        activate(model, order)
        assert relative(layer(x), truncated + effect) < TOLERANCE[torch.float32]


# With r=12 only the up-projection truncates, and it comes last.
@pytest.mark.parametrize("r", [6, 12])
def test_two_truncating_adapters_are_refused_and_nothing_changes(r):
    model = several({"a": {"r": r, "truncate": True}, "b": {"r": r, "truncate": True}, "c": {}})
    activate(model, ["a", "c"])
    before, trained = logits(model, "llama"), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="at most one active adapter with truncate=True"):
        activate(model, ["a", "b"])
    assert torch.equal(logits(model, "llama"), before)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert {tuple(layer.active_adapters) for layer in layers(model)} == {("a", "c")}


@pytest.mark.parametrize("one_by_one", [False, True])
def test_two_truncating_adapters_are_not_merged_together(one_by_one):
    model = several({"a": {"r": 6, "truncate": True}, "b": {"r": 6, "truncate": True}})
    if one_by_one:
        model.merge_adapter(["a"])
    before = base_tensors(model)
    with pytest.raises(ValueError, match="truncate"):
        model.merge_adapter(["a", "b"])
    assert same(base_tensors(model), before)


def test_deleting_the_active_adapter_activates_another_one():
    model = several({"a": {}, "b": {"r": 4}})
    model.set_adapter("b")
    b = logits(model, "llama")
    model.set_adapter("a")
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert torch.equal(logits(model, "llama"), b)
    assert not any(".a." in name for name in model.state_dict())
    assert all(list(layer.specs) == ["b"] for layer in layers(model))


def test_deleting_the_last_adapter_leaves_the_base_and_room_for_a_new_one():
    base = logits(build("llama"), "llama")
    model = adapted()
    model.delete_adapter("default")
    # A PeftModel without an adapter cannot be called, whatever the method; the model inside it can.
    assert torch.equal(logits(model.base_model.model, "llama"), base)
    assert not any("clover_" in name for name in model.state_dict())
    model.add_adapter("default", CloverConfig(s_matrix="diagonal"))
    model.set_adapter("default")
    perturb(model)
    assert relative(logits(model, "llama"), base) > 1e-3


def test_a_merged_adapter_is_not_deleted():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    model.delete_adapter("default")


def test_an_adapter_added_while_another_is_merged_gets_the_bases_of_the_base_weights():
    plain = several({"a": {}, "b": {"r": 4}})
    model = several({"a": {}})
    model.merge_adapter()
    model.add_adapter("b", CloverConfig(r=4))
    for here, there in zip(layers(model), layers(plain), strict=True):
        for spec in here.specs["b"]:
            for a, b in zip(here.tensors("b", spec)[1:], there.tensors("b", spec)[1:], strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["my-adapter", "v", "k", "weight", "clover_S", "default_1", "v_proj", "base_layer"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_odd_adapter_names_work(name, family, tmp_path):
    expected = logits(adapted(family), family)
    base = logits(build(family), family)
    model = get_peft_model(build(family), CloverConfig(), adapter_name=name)
    perturb(model)
    assert torch.equal(logits(model, family), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path / name, adapter_name="other")
    assert torch.equal(logits(loaded, family), expected)
    loaded.load_adapter(tmp_path / name, adapter_name=name)
    loaded.set_adapter(name)
    assert torch.equal(logits(loaded, family), expected)
    loaded.delete_adapter("other")
    assert torch.equal(logits(loaded, family), expected)
    model.delete_adapter(name)
    assert torch.equal(logits(model.base_model.model, family), base)


@pytest.mark.parametrize("name", ["with.dot", "keys"])
def test_impossible_adapter_names_are_refused_before_the_model_changes(name):
    model = build("llama")
    before = logits(model, "llama")
    with pytest.raises((KeyError, ValueError)):
        get_peft_model(model, CloverConfig(), adapter_name=name)
    assert not layers(model)
    assert torch.equal(logits(model, "llama"), before)

    model = adapted()
    before = logits(model, "llama")
    with pytest.raises((KeyError, ValueError)):
        model.add_adapter(name, CloverConfig())
    assert all(list(layer.specs) == ["default"] for layer in layers(model))
    assert torch.equal(logits(model, "llama"), before)


def test_a_reference_adapter_made_by_copying_parameters_equals_the_trained_one():
    """Trainers of preference objectives make their reference model this way."""
    model = adapted(dtype=torch.bfloat16)
    trained = logits(model, "llama")
    model.add_adapter("ref", model.peft_config["default"])
    names = [name for name, _ in model.named_parameters() if ".default." in name]
    assert names
    for name in names:
        model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(model.get_parameter(name).data)
    for layer in layers(model):
        for spec in layer.specs["ref"]:
            pairs = zip(layer.tensors("ref", spec), layer.tensors("default", spec), strict=True)
            assert all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)
    model.set_adapter("ref")
    assert torch.equal(logits(model, "llama"), trained)


def test_a_reference_adapter_shares_the_bases_of_one_loaded_onto_another_precision(tmp_path):
    """Bases computed again from the weights at hand would not be those that the loaded S belongs to."""
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build("llama", torch.bfloat16), tmp_path, is_trainable=True)
    trained = logits(model, "llama")
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model, "llama"), trained)
