"""`slice_hidden_size`: a narrower residual stream, with one basis for the model or one for each block."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import pytest
import torch
import transformers
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import AutoModelForCausalLM

import clover_peft
from clover_peft.convert import slicing
from tests.support.other_process import stock_answers, without_clover
from tests.support.pruning import batches, iter_fails, prune, unchanged
from tests.support.tiny import VOCAB, build, logits, relative

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "deepseek_v2", "deepseek_v3", "opt")
ROTATIONS = ("shared", "per_block")
IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
EAGER = {"experts_implementation": "eager"}  # not saved with a config


def sliced(family: str, ratio: float, rotation: str, **config):
    """A tiny model whose hidden size of 48 is sliced, and the report."""
    model = build(family, **config)
    return model, cut(model, ratio, rotation, batches(family))


def cut(model, ratio: float, rotation: str, data, multiple: int = 4):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*tokens for 48 dimensions are few")
        return clover_peft.slice_hidden_size(model, ratio, data, rotation=rotation, multiple=multiple)


def load(folder, family: str):
    same = EAGER if "deepseek" in family else {}
    return AutoModelForCausalLM.from_pretrained(folder, **same).eval()


def tokens(model) -> torch.Tensor:
    """What follows `IDS`, with and without a cache, which must not matter."""
    same = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    with_cache, without = (model.generate(input_ids=IDS, use_cache=cached, **same) for cached in (True, False))
    assert torch.equal(with_cache, without)
    return with_cache


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_zero_changes_no_output(family, rotation):
    for config in ({}, {"tie_word_embeddings": True}):
        model = build(family, **config)
        expected = logits(model, family)
        report = cut(model, 0, rotation, batches(family))
        assert relative(logits(model, family), expected) < 1e-5
        assert report.width == (48, 48)
        assert min(report.energy.values()) > 1 - 1e-6


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_zero_everywhere_can_go(family, rotation):
    """A model that uses 36 of its 48 dimensions, turned so that nobody sees it: slicing finds them, and is exact."""
    model = build(family)
    stream = clover_peft.convert.stream.STREAMS[model.config.model_type]
    trunk, keep = clover_peft.convert.stream.trunk_of(model), torch.eye(48)
    keep[35 if stream.centred else 36 :] = 0
    if stream.centred:  # LayerNorm takes one dimension, which the stream need not have
        turn = slicing._without_ones(48).float()
        keep = turn @ keep[:47, :47] @ turn.mT
    else:
        turn = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0))).Q
        keep = turn @ keep @ turn.mT
    with torch.no_grad():
        for name in stream.embeddings:
            weight = getattr(trunk, name).weight
            weight.copy_(weight @ keep)
        for layer in trunk.layers:
            for block in stream.blocks:
                for module, name in clover_peft.convert.stream.present(layer, block.writes):
                    getattr(module, name).copy_(keep @ getattr(module, name))
                    if getattr(module, "bias", None) is not None:
                        module.bias.copy_(keep @ module.bias)
    expected = logits(model, family)
    report = cut(model, 0.25, rotation, batches(family))
    assert report.width == (48, 36)
    assert relative(logits(model, family), expected) < 2e-5
    assert report.parameters[1] == sum(p.numel() for p in model.parameters())


def test_shared_is_a_stock_model(tmp_path):
    """Logits, tokens and cache in a process that cannot import `clover_peft`; all families whose class has sizes."""
    folders, expected = [], []
    for family in [name for name in FAMILIES if name != "opt"]:
        model, report = sliced(family, 0.25, "shared", tie_word_embeddings=family == "llama")
        assert report.stock
        assert model.config.hidden_size == 36
        model.save_pretrained(tmp_path / family)
        folders.append(tmp_path / family)
        expected.append((logits_of(model), tokens(model)))
    for folder, found, (values, following) in zip(folders, stock_answers(folders, IDS), expected, strict=True):
        assert relative(found["logits"], values) < 1e-5, folder.name
        assert torch.equal(found["tokens"][: len(IDS)], following), folder.name


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(("family", "rotation"), [*((name, "per_block") for name in FAMILIES), ("opt", "shared")])
def test_saved_and_loaded(family, rotation, tmp_path):
    model, report = sliced(family, 0.25, rotation)
    assert not report.stock
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, family)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert torch.equal(tokens(loaded), tokens(model))
    trunk = transformers.AutoModel.from_pretrained(tmp_path, **(EAGER if "deepseek" in family else {})).eval()
    states = loaded.base_model(input_ids=IDS).last_hidden_state
    assert torch.equal(trunk(input_ids=IDS).last_hidden_state, states)
    for made in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(logits_of(made), logits_of(model))


def test_a_class_without_shortcuts_stops(tmp_path):
    """It must not load the other tensors and compute something else, whatever the width."""
    code = ""
    for family in ("llama", "opt"):
        for ratio in (0, 0.25):
            folder = tmp_path / f"{family}-{ratio}"
            sliced(family, ratio, "per_block")[0].save_pretrained(folder)
            code += f"""
try:
    transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})
except Exception as error:
    assert "size" in str(error) or "shape" in str(error), error
else:
    raise SystemExit("loaded")
"""
    without_clover(code)


def test_another_head_is_refused(tmp_path):
    model, _ = sliced("llama", 0.25, "per_block")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification: expected a causal language model"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    model.config.clover_slicing["version"] = 2
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected version 1, found 2"):
        load(tmp_path, "llama")


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("family", ["llama", "opt", "deepseek_v3"])
def test_pruned_on_top(family, rotation, tmp_path):
    """CLOVER on top of slicing: the result loads, and a DeepSeek or a rotary model may stay stock."""
    model, _ = sliced(family, 0.25, rotation)
    before = logits_of(model)
    report = prune(model, {"vo": 0.5}, calibration=batches(family), ranks="uniform")
    assert report.parameters[1] < report.parameters[0]
    assert relative(logits_of(model), before) > 1e-3
    model.save_pretrained(tmp_path / "narrow")
    assert torch.equal(logits_of(load(tmp_path / "narrow", family)), logits_of(model))
    assert torch.equal(tokens(load(tmp_path / "narrow", family)), tokens(model))
    if (family, rotation) == ("llama", "shared"):
        clover_peft.save_stock(model, tmp_path / "stock")
        assert relative(logits_of(load(tmp_path / "stock", family)), logits_of(model)) < 1e-5
    elif family == "llama":
        with pytest.raises(ValueError, match="expected layers of its class"):
            clover_peft.save_stock(model, tmp_path / "stock")


def test_a_pruned_model_is_sliced(tmp_path):
    model = build("llama")
    prune(model, {"vo": 0.5}, calibration=batches("llama"))
    expected = logits_of(model)
    cut(model, 0, "per_block", batches("llama"))
    assert relative(logits_of(model), expected) < 1e-5
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path, "llama")), logits_of(model))


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_half_precision(rotation, tmp_path):
    model = build("llama", torch.bfloat16)
    expected = logits_of(model)
    cut(model, 0, rotation, batches("llama"))
    assert model.dtype == torch.bfloat16
    assert relative(logits_of(model), expected) < 3e-2
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_trained_and_adapted():
    """Gradients with and without checkpointing, hidden states, and an adapter."""
    model, _ = sliced("llama", 0.25, "per_block")
    model.requires_grad_(True).train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    assert all(bool(gradient.any()) for gradient in plain)
    model.gradient_checkpointing_enable()
    for found, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(found, expected)
    model.gradient_checkpointing_disable()
    model.eval()
    assert [h.shape[-1] for h in model(input_ids=IDS, output_hidden_states=True).hidden_states] == [36] * 3
    import peft

    adapted = peft.get_peft_model(model, clover_peft.CloverConfig())
    assert torch.equal(logits_of(adapted), logits_of(model))


def test_padding_does_not_count():
    """Rows with padding give the bases of the same rows without."""
    ids = batches("llama", 1)[0]["input_ids"]
    padded = torch.cat([ids, torch.zeros_like(ids)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], dim=1)
    for rotation in ROTATIONS:
        plain, other = build("llama"), build("llama")
        report = cut(plain, 0.25, rotation, [{"input_ids": ids}])
        found = cut(other, 0.25, rotation, [{"input_ids": padded, "attention_mask": mask}])
        assert found.tokens == report.tokens == ids.numel()
        for name, share in report.energy.items():
            assert found.energy[name] == pytest.approx(share, abs=1e-6)
        assert relative(logits_of(other), logits_of(plain)) < 1e-4


def test_later_blocks_are_measured_behind_sliced_ones(monkeypatch):
    """If the last MLP adds nothing, what the sliced blocks leave in front of the last norm fits into their basis."""
    monkeypatch.setattr(slicing, "PULL", 0.0)
    for rotation, whole in (("per_block", True), ("shared", False)):  # "shared" measures the model as it is
        model = build("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.zero_()
        report = cut(model, 0.5, rotation, batches("llama"))
        assert list(report.energy)[-1] == "model.norm"
        assert (report.energy["model.norm"] > 1 - 1e-6) == whole
        assert report.energy["model.layers.1.post_attention_layernorm"] < 1 - 1e-3


def test_bases_are_drawn_to_the_shared_one(monkeypatch):
    """With a strong pull, a basis for each block is the one for the model; with none, they differ."""
    shared = logits_of(sliced("llama", 0.25, "shared")[0])
    distances = []
    for pull in (0.0, 1e9):
        monkeypatch.setattr(slicing, "PULL", pull)
        distances.append(relative(logits_of(sliced("llama", 0.25, "per_block")[0]), shared))
    assert distances[0] > 0.1
    assert distances[1] < 1e-4


def test_the_report(tmp_path):
    model, report = sliced("llama", 0.25, "per_block")
    assert report.parameters[1] == sum(p.numel() for p in model.parameters())
    assert report.tokens == 456  # 24 of 480 are padding
    assert len(report.energy) == 5
    assert all(0 < share < 1 for share in report.energy.values())
    assert "| hidden size | 48 | 36 | 25.0% |" in report.summary()
    report.save(tmp_path / "slicing.json")
    assert json.loads((tmp_path / "slicing.json").read_text()) == json.loads(json.dumps(report.to_dict()))


def test_widths():
    config = {"tie_word_embeddings": False}
    for rotation, multiple, expected in (
        ("shared", 1, 44),
        ("shared", 8, 40),
        ("per_block", 1, 43),
        ("per_block", 8, 40),
    ):
        model = build("llama", **config)
        report = cut(model, 0.1, rotation, batches("llama"), multiple)
        assert report.width == (48, expected)  # Llama's config wants a multiple of 4 heads
    model = build("llama")
    with pytest.raises(
        ValueError,
        match=r"ratio=0.05: expected a hidden size below 48, found 48 as the multiple of 8 .*multiple=1, .* it is 46$",
    ):
        cut(model, 0.05, "per_block", iter_fails(), 8)


def with_parameter(family: str) -> nn.Module:
    model = build(family)
    model.model.layers[1].register_parameter("layer_scale", nn.Parameter(torch.ones(48)))
    return model


def quantised() -> nn.Module:
    model = build("llama")
    layer = model.model.layers[1].mlp
    layer.up_proj = type("Linear8bit", (nn.Linear,), {})(48, 80, bias=False)
    return model


def refusals() -> list:
    flagged = build("llama")
    flagged.is_quantized = True
    adapted = clover_peft.CloverModel(build("llama"), {"default": clover_peft.CloverConfig()}, "default")
    return [
        (build("bloom"), "BloomForCausalLM: expected one of .* not in the table"),
        (build("gemma2"), "norms stand behind attention or MLP"),
        (build("gpt_neox"), "in parallel, which is not implemented"),
        (build("gemma"), "scaled in a way of its own"),
        (build("llama").model, "expected a causal language model with lm_head"),
        (build("opt", do_layer_norm_before=False), "do_layer_norm_before=False: norms stand behind"),
        (build("opt", word_embed_proj_dim=24), "no projection of embeddings"),
        (build("opt", enable_bias=False), "expected projections with biases"),
        (with_parameter("llama"), r"layers\.1\.layer_scale: expected no parameters but those"),
        (quantised(), r"layers\.1: expected nn.Linear, found Linear8bit"),
        (adapted, "expected a model without adapters"),
        (flagged, "LlamaForCausalLM: expected weights that are not quantised, found some; use the model as it was"),
        (build("llama").to("meta"), "expected all weights in memory"),
    ]


def test_what_cannot_be_sliced_is_refused_before_data_are_read():
    for model, message in refusals():
        with pytest.raises(ValueError, match=message):
            cut(model, 0.25, "per_block", iter_fails())
    twice, _ = sliced("llama", 0.25, "per_block")
    with pytest.raises(ValueError, match="expected a model that was not sliced yet"):
        cut(twice, 0.25, "per_block", iter_fails())
    with pytest.raises(ValueError, match="expected all weights in memory"):
        cut(cpu_offload(build("llama")), 0.25, "per_block", iter_fails())
    hooked = build("llama")
    add_hook_to_module(hooked.model.layers[1].mlp, ModelHook())
    with pytest.raises(ValueError, match=r"model.layers.1.mlp: .* found a hook on it"):
        cut(hooked, 0.25, "per_block", iter_fails())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ratio": 1}, ValueError, "ratio: expected a share from 0 to below 1, found 1"),
        ({"ratio": -0.1}, ValueError, "ratio: expected a share"),
        ({"ratio": float("nan")}, ValueError, "ratio: expected a share"),
        ({"ratio": "half"}, ValueError, "ratio: expected a share"),
        ({"ratio": 0.99}, ValueError, "expected a hidden size below 48, found 0"),
        ({"multiple": 0}, ValueError, "multiple: expected a positive whole number"),
        ({"rotation": "each"}, ValueError, "rotation: expected 'per_block' or 'shared', found 'each'"),
        ({"calibration": {"input_ids": IDS}}, TypeError, "found one batch; pass a list"),
        ({"calibration": []}, ValueError, "expected batches to run the model on, found none"),
        ({"calibration": ["text"]}, TypeError, "expected a list of batches"),
        ({"calibration": None}, TypeError, "expected a list of batches, found NoneType"),
        ({"calibration": 5}, TypeError, "expected a list of batches, found int"),
        (
            {"calibration": [{"input_ids": IDS, "attention_mask": 0 * IDS}]},
            ValueError,
            "expected tokens, found only padding",
        ),
    ],
)
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_bad_input_changes_nothing(change, error, message, rotation):
    model = build("llama", tie_word_embeddings=True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = model.config.to_dict()
    arguments = {"ratio": 0.25, "calibration": batches("llama"), "rotation": rotation, "multiple": 4, **change}
    with pytest.raises(error, match=message):
        clover_peft.slice_hidden_size(model, **arguments)
    assert unchanged(model, before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("when", ["data", "bases", "layers", "not finite"])
def test_interrupted(when, rotation, monkeypatch):
    """Before the new layers are put in place, the model is as it was; it then answers as before."""
    model = build("llama", tie_word_embeddings=True).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config, expected, layers = model.config.to_dict(), logits_of(model), list(model.model.layers)

    def interrupt(*args):
        raise KeyboardInterrupt

    def data():
        yield from batches("llama", 3)
        if when == "data":
            interrupt()

    if when in ("bases", "layers"):
        monkeypatch.setattr(slicing.Slicer, {"bases": "basis", "layers": "_slice_head"}[when], interrupt)
    if when == "not finite":
        with torch.no_grad():
            model.model.embed_tokens.weight[5] = torch.inf
        before["model.embed_tokens.weight"][5] = torch.inf
    kind = ValueError if when == "not finite" else KeyboardInterrupt
    with pytest.raises(kind, match="finite" if when == "not finite" else None):
        cut(model, 0.25, rotation, data())
    assert unchanged(model, before)
    assert model.config.to_dict() == config
    assert list(model.model.layers) == layers
    assert model.training
    assert when == "not finite" or torch.equal(logits_of(model), expected)


def test_few_tokens_give_a_warning():
    with pytest.warns(UserWarning, match="38 tokens for 48 dimensions are few; pass at least 480"):
        clover_peft.slice_hidden_size(build("llama"), 0.25, batches("llama", 1))


def test_adapters_are_not_loaded_onto_the_original(tmp_path):
    build("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    cut(model, 0.25, "shared", batches("llama"))
    assert model.name_or_path.endswith("(sliced: save it, and load it from there)")
