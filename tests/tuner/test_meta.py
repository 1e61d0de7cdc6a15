"""Planning without weights: a base on the meta device gets a meta adapter of the right size."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from clover_peft import CloverConfig

LLAMA_2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)
LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)


def _planned(config: LlamaConfig, **choices):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return get_peft_model(model, CloverConfig(**choices))


@pytest.mark.parametrize(
    ("config", "choices", "trainable"),
    [
        # (32 heads x 128^2 twice, and 172 blocks x 64^2) x 32 layers: the paper's appendix A.2
        (LLAMA_2_7B, {}, 56_098_816),
        (LLAMA_3_8B, {}, 37_748_736),
        (LLAMA_2_7B, {"s_matrix": "diagonal"}, (2 * 32 * 128 + 172 * 64) * 32),
        (LLAMA_2_7B, {"r": 64}, (2 * 32 * 64**2 + 172 * 64**2) * 32),
        (LLAMA_2_7B, {"mlp_block_size": 32, "block_size": 64}, (2 * 64 * 64**2 + 344 * 32**2) * 32),
    ],
    ids=["llama-2-7b", "llama-3-8b", "diagonal", "r=64", "blocks"],
)
def test_trainable_parameters_without_weights(config, choices, trainable):
    model = _planned(config, **choices)
    assert model.get_nb_trainable_parameters()[0] == trainable
    assert all(p.is_meta for p in model.parameters())
    assert all(b.is_meta for name, b in model.named_buffers() if "clover_" in name)
