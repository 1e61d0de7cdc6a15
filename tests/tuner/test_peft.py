"""What peft's users rely on holds for CLOVER: switching, adding, merging, unloading, casting, compiling, copying."""

from __future__ import annotations

import copy
import pickle
import shutil
import warnings

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from clover_peft import CloverConfig, CloverLayer
from clover_peft.tuner.bases import clover_layers
from clover_peft.tuner.fused_maps import apply_maps
from tests.support.tiny import TOLERANCE, VOCAB, build, inputs, logits, perturb, relative

FORMS = {
    "full": {},
    "diagonal": {"s_matrix": "diagonal"},
    "leading": {"r": 4},
    "half heads": {"block_size": 6},
    "alone": {"cross_layer": False, "block_size": 24, "mlp_block_size": 16},
}


def adapted(family: str = "llama", *, dtype=torch.float32, seed: int = 0, model=None, **config) -> PeftModel:
    """A tiny model with one adapter, "default", whose S is not zero."""
    model = get_peft_model(build(family, dtype, seed) if model is None else model, CloverConfig(**config))
    perturb(model)
    return model.eval()


def several(names: dict[str, dict], family: str = "llama") -> PeftModel:
    """A tiny model with an adapter for each name, all of them with an S that is not zero."""
    first, *rest = names
    model = get_peft_model(build(family), CloverConfig(**names[first]), adapter_name=first)
    for name in rest:
        model.add_adapter(name, CloverConfig(**names[name]))
    perturb(model)
    return model.eval()


def layers(model: nn.Module) -> list[CloverLayer]:
    return [layer for _, layer in clover_layers(model)]


def base_tensors(model: nn.Module) -> list[Tensor]:
    """Copies of the base weights and biases of every adapted projection."""
    bases = [layer.get_base_layer() for layer in layers(model)]
    return [t.detach().clone() for base in bases for t in (base.weight, base.bias) if t is not None]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two lists of tensors hold the same bits."""
    return len(first) == len(second) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )


def activate(model: PeftModel, names: str | list[str]) -> PeftModel:
    model.base_model.set_adapter(names)
    return model


def loss_and_grads(model: nn.Module, family: str = "llama") -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    batch = inputs(family)
    loss = nn.functional.cross_entropy(model(**batch).logits.float().flatten(0, 1), batch["input_ids"].flatten())
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, 2 * (2 * 12**2 + 2 * 12**2 + 2 * 40**2)), ({"s_matrix": "diagonal"}, 2 * (24 + 24 + 80)), ({"r": 4}, 192)],
)
def test_trainable_parameters_are_the_entries_of_s_and_are_printed(config, expected, capsys):
    base = build("llama")
    total = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, CloverConfig(**config))
    assert model.get_nb_trainable_parameters() == (expected, total + expected)
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert f"trainable params: {expected:,}" in printed
    assert f"all params: {total + expected:,}" in printed
    assert all(".clover_S.default." in n for n, p in model.named_parameters() if p.requires_grad)


def test_inference_mode_trains_nothing_and_computes_the_same():
    model = adapted(inference_mode=True)
    assert model.get_nb_trainable_parameters()[0] == 0
    assert torch.equal(logits(model, "llama"), logits(adapted(), "llama"))


def test_set_requires_grad_freezes_one_adapter_only():
    model = activate(several({"a": {}, "b": {"r": 4}}), ["a", "b"])
    model.base_model.set_requires_grad("a", False)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".clover_S.b." in n for n in trained)


@pytest.mark.parametrize(("family", "bias"), [("qwen2", "all"), ("qwen2", "clover_only"), ("opt", "clover_only")])
def test_bias_trains_the_right_biases_and_they_are_saved_loaded_and_merged(family, bias, tmp_path):
    model = get_peft_model(build(family), CloverConfig(bias=bias))
    adapted_biases = {f"{n}.base_layer.bias" for n, m in clover_layers(model) if m.get_base_layer().bias is not None}
    every_bias = {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".clover_S." not in n}
    assert trained == (every_bias if bias == "all" else adapted_biases)
    assert adapted_biases

    perturb(model)
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(0.3)
    expected = logits(model, family)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path)
    assert torch.equal(logits(loaded, family), expected)
    merged = model.merge_and_unload()
    assert relative(logits(merged, family), expected) < TOLERANCE[torch.float32]


def test_an_adapter_with_biases_saved_while_merged_is_the_same_adapter(tmp_path):
    model = adapted("qwen2", bias="all")
    expected = logits(model, "qwen2")
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("qwen2"), tmp_path)
    assert torch.equal(logits(loaded, "qwen2"), expected)


def test_only_one_adapter_may_train_biases():
    model = adapted("qwen2", bias="all")
    before = logits(model, "qwen2")
    with pytest.raises(ValueError, match="bias"):
        model.add_adapter("second", CloverConfig(bias="all"))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, "qwen2"), before)


def test_modules_to_save_are_trained_saved_loaded_and_merged(tmp_path):
    base = logits(build("llama"), "llama")
    model = adapted(modules_to_save=["lm_head"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".clover_S." not in n}
    assert trained == {"base_model.model.lm_head.modules_to_save.default.weight"}
    with torch.no_grad():
        model.get_parameter(*trained).mul_(1.5)
    expected = logits(model, "llama")
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), base)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path), "llama"), expected)
    assert relative(logits(model.merge_and_unload(), "llama"), expected) < TOLERANCE[torch.float32]


def test_merging_a_head_trained_apart_from_tied_embeddings_unties_the_config(tmp_path):
    model = get_peft_model(build("llama", tie_word_embeddings=True), CloverConfig(modules_to_save=["lm_head"]))
    perturb(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    expected = logits(model, "llama")
    merged = model.merge_and_unload()
    assert relative(logits(merged, "llama"), expected) < TOLERANCE[torch.float32]
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert relative(logits(loaded, "llama"), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("tie", [False, True])
def test_trainable_tokens_are_trained_saved_loaded_and_merged(tie, tmp_path):
    def fresh():
        return build("llama", tie_word_embeddings=tie)

    base = logits(fresh(), "llama")
    present = inputs("llama")["input_ids"][0, :3].tolist()
    model = adapted(model=fresh(), trainable_token_indices=present)
    deltas = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    assert deltas
    assert all(p.requires_grad for p in deltas)
    only_s = logits(model, "llama")
    with torch.no_grad():
        for delta in {id(d): d for d in deltas}.values():
            delta.add_(0.5)
    expected = logits(model, "llama")
    assert not torch.equal(expected, only_s)
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), base)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh(), tmp_path), "llama"), expected)
    assert relative(logits(model.merge_and_unload(), "llama"), expected) < TOLERANCE[torch.float32]


def test_unload_takes_merged_tokens_out_again():
    model = adapted(trainable_token_indices=[4, 5])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    unloaded = model.unload()
    assert same(list(unloaded.state_dict().values()), list(build("llama").state_dict().values()))


@pytest.mark.parametrize("index", [0, 1, [0], [0, 1]])
def test_layers_to_transform_adapts_exactly_the_named_layers(index):
    model = get_peft_model(build("llama"), CloverConfig(layers_to_transform=index))
    found = {int(name.split(".layers.")[1].split(".")[0]) for name, _ in clover_layers(model)}
    assert found == ({index} if isinstance(index, int) else set(index))


# ---------------------------------------------------------------------- switching and adding


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


def test_dropout_acts_in_training_only():
    plain, model = adapted(), adapted(clover_dropout=0.5)
    assert torch.equal(logits(model, "llama"), logits(plain, "llama"))
    model.train()
    first, second = logits(model, "llama"), logits(model, "llama")
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    first = logits(model, "llama")
    torch.manual_seed(5)
    assert torch.equal(logits(model, "llama"), first)


def test_dropout_acts_on_the_input_of_the_map_and_keeps_its_mean():
    layer = layers(adapted(clover_dropout=0.25))[0]
    x = torch.randn(1, 48)
    z, y = layer.get_base_layer()(x), layer(x)
    layer.train()
    torch.manual_seed(0)
    effects = layer(x.expand(20_000, -1)) - z
    assert relative(effects.mean(0, keepdim=True), y - z) < 0.05
    with torch.no_grad():
        for parameter in layer.clover_S.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), z)


# ---------------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "deepseek_v3"])
def test_merged_computes_what_unmerged_does_and_unmerging_restores_the_bits(family, dtype):
    model = adapted(family, dtype=dtype)
    before, expected = base_tensors(model), logits(model, family)
    model.merge_adapter()
    assert not same(base_tensors(model), before)
    assert [t.dtype for t in base_tensors(model)] == [t.dtype for t in before]
    assert [t.stride() for t in base_tensors(model)] == [t.stride() for t in before]
    assert relative(logits(model, family), expected) < TOLERANCE[dtype]
    model.unmerge_adapter()
    assert same(base_tensors(model), before)
    assert torch.equal(logits(model, family), expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_twenty_merges_and_unmerges_leave_no_drift(dtype):
    model = adapted("qwen2", dtype=dtype)
    before = base_tensors(model)
    model.merge_adapter()
    merged = base_tensors(model)
    for _ in range(20):
        model.unmerge_adapter()
        assert same(base_tensors(model), before)
        model.merge_adapter()
        assert same(base_tensors(model), merged)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_delta_weight_is_merged_minus_base_in_the_layout_of_the_base(form, family):
    model = adapted(family, **FORMS[form])
    weights = [layer.get_base_layer().weight.detach().clone() for layer in layers(model)]
    deltas = [layer.get_delta_weight("default") for layer in layers(model)]
    model.merge_adapter()
    for layer, weight, delta in zip(layers(model), weights, deltas, strict=True):
        assert isinstance(layer.get_base_layer(), nn.Linear) == (family != "gpt2")
        assert delta.shape == weight.shape
        assert relative(layer.get_base_layer().weight, weight + delta) < TOLERANCE[torch.float32]
        assert relative(layer.get_base_layer().weight - weight, delta) < 1e-4
        assert torch.equal(layer.get_delta_weight("default"), delta)


def test_delta_weight_of_a_conv1d_is_what_it_adds_to_the_output():
    layer = layers(adapted("gpt2"))[0]
    x = torch.randn(5, 48)
    bias = layer.get_base_layer().bias
    effect = layer(x) - layer.get_base_layer()(x)
    expected = x @ layer.get_delta_weight("default") + (apply_maps(bias, layer.maps(["default"])) - bias)
    assert relative(effect, expected) < TOLERANCE[torch.float32]


def test_a_second_adapter_merged_on_top_adds_up_and_unmerging_restores_the_bits():
    model = several({"a": {}, "b": {"s_matrix": "diagonal"}}, "qwen2")
    before = base_tensors(model)
    expected = logits(activate(model, ["a", "b"]), "qwen2")
    model.merge_adapter()
    at_once = base_tensors(model)
    model.unmerge_adapter()
    model.merge_adapter(["a"])
    with pytest.warns(UserWarning, match="additionally merging b"):
        model.merge_adapter(["b"])
    assert same(base_tensors(model), at_once)
    assert relative(logits(model, "qwen2"), expected) < TOLERANCE[torch.float32]
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter(["a"])
    assert same(base_tensors(model), at_once)
    model.unmerge_adapter()
    assert same(base_tensors(model), before)


def test_merging_by_name_does_not_depend_on_what_is_active():
    model = several({"a": {}, "b": {"r": 4}}, "qwen2")
    before = base_tensors(model)
    expected = logits(activate(model, "b"), "qwen2")
    activate(model, "a")
    model.merge_adapter(adapter_names=["b"])
    assert all(layer.merged_adapters == ["b"] for layer in layers(model))
    assert relative(logits(model, "qwen2"), expected) < TOLERANCE[torch.float32]
    model.unmerge_adapter()
    assert same(base_tensors(model), before)
    merged = model.merge_and_unload(adapter_names=["b"])
    assert relative(logits(merged, "qwen2"), expected) < TOLERANCE[torch.float32]


def test_a_string_is_not_a_list_of_adapters_to_merge():
    model = adapted()
    before = base_tensors(model)
    with pytest.raises(TypeError, match="list of strings"):
        model.merge_adapter(adapter_names="default")
    assert same(base_tensors(model), before)


def test_setting_an_adapter_unmerges_first():
    model = several({"a": {}, "b": {"r": 4}})
    before = base_tensors(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("b")
    assert same(base_tensors(model), before)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_merge_and_unload_gives_a_plain_model_with_the_same_function(family, safe_merge):
    model = adapted(family)
    expected = logits(model, family)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert type(merged) is type(build(family))
    assert not layers(merged)
    assert list(merged.state_dict()) == list(build(family).state_dict())
    assert relative(logits(merged, family), expected) < TOLERANCE[torch.float32]


def test_safe_merge_gives_the_bits_of_a_plain_merge():
    plain, safe = adapted("qwen2").merge_and_unload(), adapted("qwen2").merge_and_unload(safe_merge=True)
    assert same(list(plain.state_dict().values()), list(safe.state_dict().values()))


@pytest.mark.parametrize("action", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_safe_merge_refuses_a_broken_adapter_and_leaves_the_model_as_it_was(action, value):
    model = adapted("qwen2")
    with torch.no_grad():
        next(iter(layers(model)[-1].clover_S["default"].parameters())).view(-1)[0] = value
    before = base_tensors(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        getattr(model, action)(safe_merge=True)
    assert same(base_tensors(model), before)
    assert len(layers(model)) == 6
    assert not any(layer.merged for layer in layers(model))
    with model.disable_adapter():
        assert torch.equal(logits(model, "qwen2"), logits(build("qwen2"), "qwen2"))


@pytest.mark.parametrize("action", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_that_fails_keeps_what_was_merged_before(action):
    model = several({"good": {}, "broken": {}}, "qwen2")
    with torch.no_grad():
        next(iter(layers(model)[-1].clover_S["broken"].parameters())).view(-1)[0] = float("inf")
    model.merge_adapter(["good"])
    before = base_tensors(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        getattr(model, action)(adapter_names=["broken"], safe_merge=True)
    assert same(base_tensors(model), before)
    assert all(layer.merged_adapters == ["good"] for layer in layers(model))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_unload_gives_back_the_base_bit_for_bit(merged, dtype):
    model = adapted("qwen2", dtype=dtype)
    if merged:
        model.merge_adapter()
    unloaded = model.unload()
    base = build("qwen2", dtype)
    assert type(unloaded) is type(base)
    assert list(unloaded.state_dict()) == list(base.state_dict())
    assert same(list(unloaded.state_dict().values()), list(base.state_dict().values()))


def test_the_weight_kept_for_unmerging_is_neither_trained_nor_saved(tmp_path):
    model = adapted("qwen2")

    def names() -> list[list[str]]:
        return [list(model.state_dict()), list(dict(model.named_parameters())), list(dict(model.named_buffers()))]

    before = names()
    model.save_pretrained(tmp_path / "unmerged")
    model.merge_adapter()
    assert names() == before
    model.save_pretrained(tmp_path / "merged")
    files = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("unmerged", "merged")]
    assert files[0] == files[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_weight_kept_for_unmerging_follows_the_model(dtype):
    model = adapted("qwen2")
    expected = [t.to(dtype) for t in base_tensors(model)]
    model.merge_adapter()
    model.to(dtype)
    model.unmerge_adapter()
    assert same(base_tensors(model), expected)


def test_merging_bfloat16_rounds_once():
    """The merged weight is the nearest bfloat16 of the exact one: nothing is rounded on the way."""
    model = adapted("qwen2", dtype=torch.bfloat16)
    exact = []
    for layer in layers(model):
        wide = copy.deepcopy(layer).double()
        exact.append(apply_maps(wide.base_weight.transposed().double(), wide.maps(["default"])).mT)
    model.merge_adapter()
    for layer, weight in zip(layers(model), exact, strict=True):
        error = (layer.get_base_layer().weight.double() - weight).abs() / weight.abs().clamp(min=1e-3)
        assert float(error.max()) < 2**-8


def test_lora_trains_on_a_merged_clover_model():
    merged = adapted("qwen2").merge_and_unload()
    expected = logits(merged, "qwen2")
    model = get_peft_model(merged, LoraConfig(target_modules=["v_proj", "up_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(logits(model, "qwen2"), expected)
    _, grads = loss_and_grads(model, "qwen2")
    assert len(grads) == 8
    assert torch.equal(logits(model.unload(), "qwen2"), expected)


def test_clover_trains_on_a_model_with_lora_merged():
    lora = get_peft_model(
        build("qwen2"), LoraConfig(target_modules=["v_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    merged = lora.merge_and_unload()
    expected = logits(merged, "qwen2")
    model = get_peft_model(merged, CloverConfig())
    assert torch.equal(logits(model, "qwen2"), expected)
    perturb(model)
    changed = logits(model, "qwen2")
    assert relative(changed, expected) > 1e-3
    assert relative(logits(model.merge_and_unload(), "qwen2"), changed) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("merged", [False, True])
def test_clover_over_lora_layers_merges_only_what_it_can_read(merged):
    """The weight a merge maps is the base's: an update that is still beside it would be left out without a word."""
    config = LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    lora = get_peft_model(build("llama"), config).eval()
    if merged:
        lora.merge_adapter()
    plain = logits(lora, "llama")
    model = lora.base_model.model
    inject_adapter_in_model(CloverConfig(target_modules=["k_proj", "v_proj"]), model, adapter_name="clover")
    assert torch.equal(logits(lora, "llama"), plain)
    perturb(model)
    expected = logits(lora, "llama")
    if merged:
        for layer in layers(model):
            layer.merge()
        assert relative(logits(lora, "llama"), expected) < TOLERANCE[torch.float32]
    else:
        for layer in layers(model):
            with pytest.raises(ValueError, match="merge"):
                layer.merge()
        assert torch.equal(logits(lora, "llama"), expected)


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_casting_the_model_keeps_s_and_the_bases_in_float32(cast):
    model = adapted("qwen2")
    expected = logits(model, "qwen2")
    values = {n: t.clone() for n, t in model.state_dict().items() if ".clover_" in n}
    dtype = torch.float16 if cast == "half" else torch.bfloat16
    model = model.to(dtype) if cast == "to" else getattr(model, cast)()
    kept = {n: t for n, t in model.state_dict().items() if ".clover_" in n}
    assert {t.dtype for t in kept.values()} == {torch.float32}
    assert all(torch.equal(t, values[n]) for n, t in kept.items())
    assert {t.dtype for n, t in model.state_dict().items() if ".clover_" not in n} == {dtype}
    output = logits(model, "qwen2")
    assert output.dtype == dtype
    assert relative(output, expected) < 3 * TOLERANCE[dtype]


def test_an_adapter_on_a_float64_model_is_float64_and_survives_a_round_trip():
    model = adapted(dtype=torch.float64)
    tensors = [t for n, t in model.state_dict().items() if ".clover_" in n]
    assert {t.dtype for t in tensors} == {torch.float64}
    values = [t.clone() for t in tensors]
    model.half().double()
    assert same([t for n, t in model.state_dict().items() if ".clover_" in n], values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_s_is_float32_unless_asked_otherwise_and_the_bases_always_are(dtype):
    for autocast_adapter_dtype in (True, False):
        model = get_peft_model(build("llama", dtype), CloverConfig(), autocast_adapter_dtype=autocast_adapter_dtype)
        state = model.state_dict().items()
        trained = {t.dtype for n, t in state if ".clover_S." in n}
        assert trained == {torch.float32 if autocast_adapter_dtype else dtype}
        assert {t.dtype for n, t in state if ".clover_" in n and ".clover_S." not in n} == {torch.float32}
        perturb(model)
        unmerged = logits(model, "llama")
        model.merge_adapter()
        assert relative(logits(model, "llama"), unmerged) < TOLERANCE[dtype]


def test_autocast_folds_the_map_in_float32():
    model = adapted("qwen2")
    for layer in layers(model):
        plain = layer.maps(["default"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            folded = layer.maps(["default"])
        assert all(torch.equal(a.matrix, b.matrix) for a, b in zip(plain, folded, strict=True))


def test_autocast_stays_within_its_precision_of_float32():
    model = adapted("qwen2").train()
    loss, grads = loss_and_grads(model, "qwen2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough_loss, rough_grads = loss_and_grads(model, "qwen2")
    assert relative(rough_loss, loss) < TOLERANCE[torch.bfloat16]
    assert rough_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert rough_grads[name].dtype == torch.float32
        assert relative(rough_grads[name], grad) < 2 * TOLERANCE[torch.bfloat16]


# ---------------------------------------------------------------------- checkpointing, compiling, copying


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, dropout):
    model = adapted(clover_dropout=dropout).train()
    torch.manual_seed(7)
    loss, grads = loss_and_grads(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    layers(model)[0].register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(7)
    again, checkpointed = loss_and_grads(model)
    assert len(calls) == 2
    assert torch.equal(again, loss)
    assert all(torch.equal(checkpointed[name], grad) for name, grad in grads.items())


def compiled_agrees(family: str, backend: str, **config) -> None:
    torch._dynamo.reset()
    model = adapted(family, **config)
    loss, grads = loss_and_grads(model, family)
    compiled = torch.compile(model.base_model.model, backend=backend, fullgraph=True)
    again, compiled_grads = loss_and_grads(compiled, family)
    assert relative(again, loss) <= TOLERANCE[torch.float32]
    compiled_grads = {name.removeprefix("_orig_mod."): grad for name, grad in compiled_grads.items()}
    assert len(compiled_grads) == len(grads)
    for name, grad in grads.items():
        assert relative(compiled_grads[name.removeprefix("base_model.model.")], grad) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(("family", "form"), [("llama", "full"), ("llama", "leading"), ("gpt2", "diagonal")])
def test_torch_compile_takes_the_model_as_one_graph(family, form):
    compiled_agrees(family, "eager", **FORMS[form])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_torch_compile_differentiates_ahead_of_time(family):
    compiled_agrees(family, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_torch_compile_with_inductor_agrees(family):
    compiled_agrees(family, "inductor")


def test_switching_adapters_in_a_compiled_model_takes_effect():
    torch._dynamo.reset()
    model = several({"a": {}, "b": {"r": 4}})
    expected = {}
    for name in ("a", "b"):
        expected[name] = logits(activate(model, name), "llama")
    compiled = torch.compile(model, backend="eager")
    for name in ("a", "b", "a"):
        activate(model, name)
        assert relative(logits(compiled, "llama"), expected[name]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_copy_computes_the_same_and_is_independent(how, merged):
    model = adapted("qwen2")
    before = base_tensors(model)
    if merged:
        model.merge_adapter()
    expected = logits(model, "qwen2")
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(other, "qwen2"), expected)
    if merged:
        other.unmerge_adapter()
        assert same(base_tensors(other), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, "qwen2"), expected)
    if merged:
        model.unmerge_adapter()
        assert same(base_tensors(model), before)


# ---------------------------------------------------------------------- reports, refusals, sharing


def test_layer_and_model_status_tell_the_state():
    model = several({"a": {}, "b": {"r": 4}})
    status = model.get_layer_status()
    assert len(status) == 6
    for entry in status:
        assert entry.module_type == "clover.CloverLayer"
        assert entry.enabled is True
        assert entry.active_adapters == ["a"]
        assert entry.merged_adapters == []
        assert entry.requires_grad == {"a": True, "b": False}
        assert entry.available_adapters == ["a", "b"]
        assert entry.devices == {"a": ["cpu"], "b": ["cpu"]}
    whole = model.get_model_status()
    assert whole.adapter_model_type == "CloverModel"
    assert whole.peft_types == {"a": "CLOVER", "b": "CLOVER"}
    assert whole.num_adapter_layers == 6
    assert (whole.trainable_params, whole.total_params) == model.get_nb_trainable_parameters()
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["a"]
    model.base_model.disable_adapter_layers()
    assert model.get_model_status().enabled is False


def test_the_printed_model_says_what_is_paired():
    text = repr(adapted("gpt2"))
    assert "(default) v: 4 blocks of 12, r=12, full, pair with transformer.h.0.attn.c_proj" in text
    assert "(default) k: 4 blocks of 12, r=12, full, pair with transformer.h.0.attn.c_attn" in text


def test_a_mixed_model_is_refused_before_the_model_changes():
    model = build("llama")
    before = logits(model, "llama")
    with pytest.raises(ValueError, match="CLOVER"):
        get_peft_model(model, CloverConfig(), mixed=True)
    assert not layers(model)
    assert torch.equal(logits(model, "llama"), before)


def test_two_peft_models_share_one_base():
    base = build("llama")
    plain = logits(base, "llama")
    first = get_peft_model(base, CloverConfig(), adapter_name="first")
    perturb(first)
    expected = logits(first, "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about a second adapter on one model
        second = get_peft_model(base, CloverConfig(s_matrix="diagonal"), adapter_name="second")
    for layer in layers(base):
        for parameter in layer.clover_S["second"].parameters():
            nn.init.constant_(parameter, 0.1)
    first.set_adapter("first")
    assert torch.equal(logits(first, "llama"), expected)
    second.set_adapter("second")
    assert relative(logits(second, "llama"), plain) > 1e-3
    assert not torch.equal(logits(second, "llama"), expected)
    with second.disable_adapter():
        assert torch.equal(logits(second, "llama"), plain)
    unloaded = second.unload()
    assert torch.equal(logits(unloaded, "llama"), plain)


def test_generation_uses_the_adapter_and_the_cache():
    model = adapted()
    prompt = {name: value[1:] for name, value in inputs("llama").items()}
    cached = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert cached.shape[1] > prompt["input_ids"].shape[1]
    assert int(cached.max()) < VOCAB
    assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=False), cached)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(**prompt, max_new_tokens=6, do_sample=False), cached)
