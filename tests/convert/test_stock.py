"""`save_stock`: pruned models in a class that transformers loads without `clover_peft`."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.mimo_v2_flash.modeling_mimo_v2_flash import MiMoV2FlashRotaryEmbedding

import clover_peft
from clover_peft.io.hub_models import DEFAULT_MODEL, find_model
from tests.support.other_process import stock_answers
from tests.support.pruning import batches, prune, unchanged
from tests.support.tiny import VOCAB, build, relative

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True}),
    "llama-llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama-dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 24},
    ),
    "llama-mqa-gelu": ("llama", {"num_key_value_heads": 1, "hidden_act": "gelu"}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
}


def pruned(family: str, **config):
    model = build(family, **config)
    prune(model, {"vo": 0.5}, calibration=batches(family), ranks="uniform")
    return model


@torch.no_grad()
def answer(model) -> tuple[torch.Tensor, torch.Tensor, int]:
    out = model(input_ids=IDS, use_cache=True)
    cache = out.past_key_values if "past_key_values" in out else out.cache
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    same = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    tokens = [model.generate(input_ids=IDS, use_cache=cached, **same) for cached in (True, False)]
    return out.logits, torch.cat(tokens), size


def test_the_same_model_without_clover_peft(tmp_path):
    """Logits, tokens with and without a cache, and a smaller cache; transformers' own loading finds every tensor."""
    folders, expected, whole = [], [], []
    for name, (family, config) in CASES.items():
        whole.append(answer(build(family, **config))[2])
        model = pruned(family, **config)
        before = {n: p.clone() for n, p in model.named_parameters()}
        clover_peft.save_stock(model, tmp_path / name)
        assert unchanged(model, before)
        expected.append(answer(model))
        folders.append(tmp_path / name)
    for i, found in enumerate(stock_answers(folders, IDS)):
        logits, tokens, size = expected[i]
        assert found["kind"] == "MiMoV2FlashForCausalLM"
        assert relative(found["logits"], logits) < 1e-5, folders[i].name
        assert torch.equal(found["tokens"], tokens), folders[i].name
        # A constant behind attention takes one dimension of each value, 12 of which were pruned to 6.
        holds_constants = folders[i].name in ("llama-biases", "qwen2", "qwen2-tied")
        assert found["cache"] == whole[i] * (12 + 6 + holds_constants) / 24
        assert found["cache"] == size or holds_constants


def test_bfloat16_and_the_generation_config_are_kept(tmp_path):
    model = pruned("llama").to(torch.bfloat16)
    model.generation_config.max_new_tokens = 3
    clover_peft.save_stock(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.max_new_tokens == 3
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_keys_of_the_hub(tmp_path):
    """vLLM's and SGLang's classes read other keys, and do not tie the head's weights."""
    model = pruned("qwen2", tie_word_embeddings=True)
    clover_peft.save_stock(model, tmp_path / "stock", hub_keys=True)
    keys = json.loads((tmp_path / "stock/config.json").read_text())
    expected = {
        "hybrid_layer_pattern": [0, 0],
        "moe_layer_freq": [0, 0],
        "layernorm_epsilon": model.config.rms_norm_eps,
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "partial_rotary_factor": 1.0,
        "attention_value_scale": None,
        "tie_word_embeddings": False,
        "v_head_dim": 7,
        "swa_v_head_dim": 7,
        "attention_bias": True,
    }
    assert {key: keys[key] for key in expected} == expected
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    assert relative(answer(loaded)[0], answer(model)[0]) < 1e-5
    scaled = pruned("llama", rope_parameters=_LLAMA3)
    with pytest.raises(ValueError, match="found 'llama3'; leave hub_keys out"):
        clover_peft.save_stock(scaled, tmp_path / "no", hub_keys=True)
    with pytest.raises(ValueError, match="found 'gelu'; leave hub_keys out"):
        clover_peft.save_stock(pruned("llama", hidden_act="gelu"), tmp_path / "no", hub_keys=True)
    assert not (tmp_path / "no").exists()


def test_what_the_class_cannot_hold_is_refused(tmp_path, monkeypatch):
    def refused(model, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            clover_peft.save_stock(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    ragged = build("llama")
    names = [f"model.layers.{i}.self_attn.v_proj (vo)" for i in range(2)]
    prune(ragged, ranks={names[0]: [6, 6], names[1]: [4, 4]})
    refused(ragged, r'layers\.1\.self_attn: expected values of 6 .* found 4; prune .*ranks="uniform"')
    refused(pruned("qwen3"), "Qwen3ForCausalLM: expected one of LlamaForCausalLM")
    refused(pruned("gemma"), "GemmaForCausalLM: expected one of")
    refused(build("deepseek_v3"), "DeepseekV3ForCausalLM: expected one of")
    refused(pruned("mistral", sliding_window=8), "sliding_window: expected attention to all tokens")
    refused(pruned("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1), "found a window of 8")
    refused(pruned("llama", mlp_bias=True), "mlp_bias: expected an MLP without biases")
    refused(build("llama").to("meta"), "expected all weights in memory")
    refused(clover_peft.CloverModel(build("llama"), {"default": clover_peft.CloverConfig()}, "default"), "adapters")
    other = staticmethod(lambda config, device=None, **kwargs: (torch.ones(6), 1.0))
    with monkeypatch.context() as patched:
        patched.setattr(MiMoV2FlashRotaryEmbedding, "compute_default_rope_parameters", other)
        refused(pruned("llama"), "rope_parameters: expected MiMoV2FlashForCausalLM to compute the model's angles")
    with pytest.raises(TypeError, match="expected a module, found str"):
        clover_peft.save_stock("my-model", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.safetensors").write_text("precious")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        clover_peft.save_stock(pruned("llama"), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_text() == "precious"


def test_a_window_as_long_as_the_positions_is_none(tmp_path):
    model = pruned("mistral", sliding_window=64)
    clover_peft.save_stock(model, tmp_path)
    assert relative(answer(AutoModelForCausalLM.from_pretrained(tmp_path).eval())[0], answer(model)[0]) < 1e-5


@pytest.mark.slow
def test_smollm2(tmp_path):
    """The real model: logits, tokens and cache of half the value width, with no calibration."""
    path = find_model(DEFAULT_MODEL).path
    same = dict(dtype=torch.float32, attn_implementation="eager")  # the class has no other attention
    model = AutoModelForCausalLM.from_pretrained(path, **same).eval()
    whole = answer(model)[2]
    prune(model, {"vo": 0.5}, ranks="uniform")
    clover_peft.save_stock(model, tmp_path / "stock")
    (found,) = stock_answers([tmp_path / "stock"], IDS)
    logits, tokens, size = answer(model)
    assert relative(found["logits"], logits) < 1e-5
    assert torch.equal(found["tokens"], tokens)
    assert found["cache"] == size == 0.75 * whole


@torch.no_grad()
def test_biases_of_zeros(tmp_path):
    """A bias behind attention that is all zeros needs no dimension, and the class has no place for it."""
    model = build("llama", attention_bias=True)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.zero_()
    clover_peft.save_stock(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert relative(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits) < 1e-5
