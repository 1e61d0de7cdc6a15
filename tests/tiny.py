"""Tiny random models of every family, built from configs, and what the tests need to run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn

# Largest relative error allowed, by dtype: the one table of tolerances for all tests.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

VOCAB = 96


@dataclass(frozen=True)
class Tiny:
    """How to build a tiny model, and which of its modules are paired.

    Attributes:
        build: makes the model from keyword arguments of the config.
        pairs: suffix of a target -> its paired parts; every other part is intra-layer.
        kind: which inputs it takes: "lm", "seq2seq", "audio" or "image".
    """

    build: Callable[..., nn.Module]
    pairs: dict[str, set[str]]
    kind: str = "lm"


def _causal(config_cls: type, **defaults) -> Callable[..., nn.Module]:
    return lambda **kwargs: hf.AutoModelForCausalLM.from_config(config_cls(**{**defaults, **kwargs}))


_LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_DEEPSEEK = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    kv_lora_rank=24,
    q_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    n_group=2,
    topk_group=1,
    experts_implementation="eager",  # the grouped kernel has no float64
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_V = {"v_proj": {"v"}}
_KV = {"k_proj": {"k"}, "v_proj": {"v"}}

FAMILIES: dict[str, Tiny] = {
    "llama": Tiny(_causal(hf.LlamaConfig, **_LLAMA), _V),
    "mistral": Tiny(_causal(hf.MistralConfig, **_LLAMA), _V),
    "qwen2": Tiny(_causal(hf.Qwen2Config, **{k: v for k, v in _LLAMA.items() if k != "head_dim"}), _V),
    "qwen3": Tiny(_causal(hf.Qwen3Config, **_LLAMA), _V),
    "gemma2": Tiny(_causal(hf.Gemma2Config, **_LLAMA, query_pre_attn_scalar=12), _V),
    "gemma3_text": Tiny(_causal(hf.Gemma3TextConfig, **_LLAMA, query_pre_attn_scalar=12), _V),
    "gpt2": Tiny(
        _causal(hf.GPT2Config, vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_inner=80, n_positions=64),
        {"c_attn": {"k", "v"}},
    ),
    "opt": Tiny(
        _causal(
            hf.OPTConfig,
            vocab_size=VOCAB,
            hidden_size=48,
            ffn_dim=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=48,
            activation_function="gelu",  # no unit of it is dead
            pad_token_id=0,
        ),
        _KV,
    ),
    "gpt_neox": Tiny(
        _causal(
            hf.GPTNeoXConfig,
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        {"query_key_value": {"k", "v"}},
    ),
    "phi3": Tiny(_causal(hf.Phi3Config, **{k: v for k, v in _LLAMA.items() if k != "head_dim"}), {"qkv_proj": {"v"}}),
    "whisper": Tiny(
        lambda **kwargs: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                **{
                    **dict(
                        vocab_size=VOCAB,
                        d_model=48,
                        encoder_layers=2,
                        decoder_layers=2,
                        encoder_attention_heads=4,
                        decoder_attention_heads=4,
                        encoder_ffn_dim=80,
                        decoder_ffn_dim=80,
                        num_mel_bins=8,
                        max_source_positions=20,
                        max_target_positions=64,
                        pad_token_id=0,
                        bos_token_id=1,
                        eos_token_id=2,
                        decoder_start_token_id=1,
                        suppress_tokens=None,
                        begin_suppress_tokens=None,
                    ),
                    **kwargs,
                }
            )
        ),
        _KV,
        "audio",
    ),
    "bart": Tiny(
        lambda **kwargs: hf.BartForConditionalGeneration(
            hf.BartConfig(
                **{
                    **dict(
                        vocab_size=VOCAB,
                        d_model=48,
                        encoder_layers=2,
                        decoder_layers=2,
                        encoder_attention_heads=4,
                        decoder_attention_heads=4,
                        encoder_ffn_dim=80,
                        decoder_ffn_dim=80,
                        max_position_embeddings=64,
                        pad_token_id=0,
                        bos_token_id=1,
                        eos_token_id=2,
                        decoder_start_token_id=1,
                        forced_eos_token_id=None,
                    ),
                    **kwargs,
                }
            )
        ),
        _KV,
        "seq2seq",
    ),
    "t5": Tiny(
        lambda **kwargs: hf.T5ForConditionalGeneration(
            hf.T5Config(
                **{
                    **dict(
                        vocab_size=VOCAB,
                        d_model=48,
                        d_kv=10,
                        d_ff=80,
                        num_layers=2,
                        num_heads=4,
                        pad_token_id=0,
                        eos_token_id=2,
                        decoder_start_token_id=0,
                    ),
                    **kwargs,
                }
            )
        ),
        {".k": {"k"}, ".v": {"v"}},
        "seq2seq",
    ),
    "bert": Tiny(
        lambda **kwargs: hf.BertForMaskedLM(
            hf.BertConfig(
                **{
                    **dict(
                        vocab_size=VOCAB,
                        hidden_size=48,
                        intermediate_size=80,
                        num_hidden_layers=2,
                        num_attention_heads=4,
                        max_position_embeddings=64,
                        pad_token_id=0,
                    ),
                    **kwargs,
                }
            )
        ),
        {"self.key": {"k"}, "self.value": {"v"}},
    ),
    "vit": Tiny(
        lambda **kwargs: hf.ViTForImageClassification(
            hf.ViTConfig(
                **{
                    **dict(
                        hidden_size=48,
                        intermediate_size=80,
                        num_hidden_layers=2,
                        num_attention_heads=4,
                        image_size=8,
                        patch_size=4,
                        num_labels=7,
                    ),
                    **kwargs,
                }
            )
        ),
        _KV,
        "image",
    ),
    "deepseek_v2": Tiny(
        _causal(hf.DeepseekV2Config, **{**_DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy"}),
        {"kv_b_proj": {"k", "v"}},
    ),
    "deepseek_v3": Tiny(_causal(hf.DeepseekV3Config, **_DEEPSEEK), {"kv_b_proj": {"k", "v"}}),
}


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **kwargs) -> nn.Module:
    """A tiny model in evaluation mode whose weights and biases are all random and large enough to matter."""
    torch.manual_seed(seed)
    model = FAMILIES[family].build(**kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name and "shared" not in name and "router" not in name and "gate.weight" not in name:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval()


def inputs(family: str, batch: int = 2, length: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random inputs with padding in one row."""
    generator = torch.Generator().manual_seed(1)
    kind = FAMILIES[family].kind
    if kind == "image":
        return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=generator).to(dtype)}
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    if kind == "audio":
        return {
            "input_features": torch.randn(batch, 8, 40, generator=generator).to(dtype),
            "decoder_input_ids": ids,
        }
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    if kind == "seq2seq":
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(-1)}
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: nn.Module, family: str) -> Tensor:
    """The model's logits on `inputs`."""
    return model(**inputs(family, dtype=next(model.parameters()).dtype)).logits


def perturb(model: nn.Module, scale: float = 0.05, seed: int = 3) -> None:
    """Give every S a random value, relative to the size of the singular values of its block."""
    from clover_peft import CloverLayer

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, CloverLayer):
                continue
            for adapter, specs in module.specs.items():
                for spec in specs:
                    s, size = module.tensors(adapter, spec).s, module.tensors(adapter, spec).s0.mean(-1)
                    noise = torch.randn(s.shape, generator=generator, dtype=s.dtype)
                    s.copy_(scale * noise * size.view(-1, *[1] * (s.ndim - 1)))


def relative(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius distance of `a` from `b`."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
