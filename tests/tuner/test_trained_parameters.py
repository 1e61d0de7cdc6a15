"""What an adapter trains beside its own numbers: biases, whole modules, tokens; and in which layers."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model

from clover_peft import CloverConfig
from clover_peft.tuner.bases import clover_layers
from tests.support.adapters import activate, adapted, same, several
from tests.support.tiny import TOLERANCE, build, inputs, logits, perturb, relative


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
