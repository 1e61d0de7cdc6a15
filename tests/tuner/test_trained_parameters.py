"""What an adapter trains beside its own numbers: biases, whole modules, tokens; and in which layers."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from clover_peft import CloverConfig
from clover_peft.tuner.adapter_tensors import FROZEN, TRAINED
from clover_peft.tuner.layers import clover_layers
from tests.support.adapters import activate, adapted, same, several
from tests.support.saved_adapters import WEIGHTS, load, save_trained, trained_model
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


@pytest.mark.parametrize(
    ("name", "modules"),
    [("norm", 5), ("layernorm", 4), ("model.norm", 1)],  # peft takes every module whose name ends so
)
def test_norms_in_modules_to_save_are_trained_saved_loaded_and_merged(name, modules, tmp_path):
    save_trained(tmp_path / "plain")
    expected = save_trained(tmp_path / "norms", modules_to_save=[name])
    names, plain = (set(load_file(tmp_path / folder / WEIGHTS)) for folder in ("norms", "plain"))
    assert plain < names
    assert len(names - plain) == modules
    model = load(build("llama"), tmp_path / "norms")
    assert torch.equal(logits(model, "llama"), expected)
    model.add_adapter("other", CloverConfig(modules_to_save=[name]))
    model.delete_adapter("other")
    assert torch.equal(logits(model, "llama"), expected)
    assert relative(logits(model.merge_and_unload(), "llama"), expected) < TOLERANCE[torch.float32]


class Named(torch.nn.Module):
    """A model whose last module has a name of choice, and a width of its own."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.name = torch.nn.Linear(8, 8), name
        setattr(self, name, torch.nn.Embedding(8, 8))

    def forward(self, x):
        return self.first(x) @ getattr(self, self.name)(torch.arange(8))


@pytest.mark.parametrize("option", ["modules_to_save", "trainable_token_indices"])
@pytest.mark.parametrize("attribute", [*TRAINED, *FROZEN, "clover_dropout"])
def test_a_module_may_be_called_as_what_a_layer_holds(attribute, option, tmp_path):
    name = attribute.removeprefix("clover_")
    choices = {"modules_to_save": [name], "trainable_token_indices": {name: [1, 3]}}
    config = {"target_modules": ["first"], "mlp_block_size": 4, "low_rank": 2, option: choices[option]}
    x = torch.eye(8)
    model = trained_model(Named(name), **config)
    expected = model(x).detach()
    assert not torch.equal(expected, Named(name)(x))
    assert any(f".{name}." in n and p.requires_grad for n, p in model.named_parameters())
    model.save_pretrained(tmp_path)
    assert torch.equal(load(Named(name), tmp_path)(x), expected)
    assert relative(model.merge_and_unload()(x).detach(), expected) < TOLERANCE[torch.float32]


def test_the_head_of_a_classifier_and_its_norms_are_trained_and_saved(tmp_path):
    base = build("llama").config
    make = partial(hf.AutoModelForSequenceClassification.from_config, base)
    torch.manual_seed(0)
    states = make().state_dict()
    model = make()
    model.load_state_dict(states)
    model = trained_model(model, task_type="SEQ_CLS", modules_to_save=["norm"])
    expected = model(**inputs("llama")).logits
    model.save_pretrained(tmp_path)
    again = make()
    again.load_state_dict(states)
    assert torch.equal(load(again, tmp_path).eval()(**inputs("llama")).logits, expected)


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
