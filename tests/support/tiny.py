"""Tiny random models of every family, built from configs, and what the tests need to run them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
import transformers as hf
from packaging.version import Version
from torch import Tensor, nn
from transformers.integrations import peft as integrations

# Largest relative error allowed, by dtype: the one table of tolerances for all tests.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

VOCAB = 96


@dataclass(frozen=True)
class Tiny:
    """How to build a tiny model, and which of its modules are paired.

    Attributes:
        build: makes the model from keyword arguments of the config.
        pairs: suffix of a target -> its paired parts; every other part is intra-layer.
        kind: which inputs it takes, see `inputs`.
        zero: suffixes of parameters to set to zero.
    """

    build: Callable[..., nn.Module]
    pairs: dict[str, set[str]]
    kind: str = "lm"
    zero: tuple[str, ...] = ()


def _auto(auto: type, model_type: str, **defaults) -> Callable[..., nn.Module]:
    return lambda **kwargs: auto.from_config(hf.AutoConfig.for_model(model_type, **{**defaults, **kwargs}))


def _causal(model_type: str, **defaults) -> Callable[..., nn.Module]:
    return _auto(hf.AutoModelForCausalLM, model_type, **defaults)


def _of(model_cls: type, **defaults) -> Callable[..., nn.Module]:
    return lambda **kwargs: model_cls(model_cls.config_class(**{**defaults, **kwargs}))


def _diffusers(name: str, **defaults) -> Callable[..., nn.Module]:
    def build(**kwargs) -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**{**defaults, **kwargs})

    return build


_IDS = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_LAYERS = dict(num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
_LLAMA = dict(**_IDS, **_LAYERS, hidden_size=48, num_key_value_heads=2, head_dim=12, max_position_embeddings=64)
_HIDDEN = {key: value for key, value in _LLAMA.items() if key != "head_dim"}  # the head's size follows from the rest
_LARGER = {**_HIDDEN, "hidden_size": 64}
# The grouped kernel for experts has no float64. All experts are used: a choice among them jumps with rounding.
_MOE = dict(experts_implementation="eager", moe_intermediate_size=32, num_experts=4, num_experts_per_tok=4)
_LOCAL_MOE = dict(experts_implementation="eager", num_local_experts=4, num_experts_per_tok=4)
_GPT2 = dict(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_inner=80, n_positions=64)
_DEEPSEEK = dict(
    **_IDS,
    **_LAYERS,
    hidden_size=48,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    num_key_value_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=4,
    n_shared_experts=1,
    kv_lora_rank=24,
    q_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    n_group=2,
    topk_group=2,
    experts_implementation="eager",
)
_BART = dict(
    **_IDS,
    d_model=48,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=80,
    decoder_ffn_dim=80,
    max_position_embeddings=64,
    decoder_start_token_id=1,
    forced_eos_token_id=None,
    activation_function="gelu",
    encoder_layerdrop=0.0,
    decoder_layerdrop=0.0,
)
_T5 = dict(
    vocab_size=VOCAB,
    d_model=48,
    d_kv=10,
    d_ff=80,
    num_layers=2,
    num_heads=4,
    pad_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=0,
)
_BERT = dict(vocab_size=VOCAB, **_LAYERS, hidden_size=48, max_position_embeddings=64, pad_token_id=0)
_IMAGE = dict(**_LAYERS, hidden_size=48, image_size=8, patch_size=4)
_SPEECH = dict(
    **_IDS,
    **_LAYERS,
    hidden_size=48,
    conv_dim=(16, 16),
    conv_stride=(2, 2),
    conv_kernel=(3, 3),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    mask_time_prob=0.0,
    layerdrop=0.0,
    hidden_act="gelu",
)
_QWEN_VISION = dict(depth=2, num_heads=4, patch_size=2, temporal_patch_size=1, spatial_merge_size=2, in_channels=3)
_QWEN_VL = dict(
    image_token_id=5,
    video_token_id=6,
    vision_start_token_id=7,
    vision_end_token_id=8,
    text_config={
        **_HIDDEN,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
    },
)
_QWEN_PAIRS = {"self_attn.v_proj": {"v"}, "attn.qkv": {"v"}}
_V = {"v_proj": {"v"}}
_KV = {"k_proj": {"k"}, "v_proj": {"v"}}
_SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4)
# The heads of full attention are wider than those of sliding attention.
_GEMMA4 = dict(
    **{**_LLAMA, **_SLIDING},
    global_head_dim=24,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=VOCAB,
)

FAMILIES: dict[str, Tiny] = {
    # Rotary everywhere: only value and output are paired.
    **{name: Tiny(_causal(name, **_LLAMA), _V) for name in ("llama", "mistral", "gemma", "qwen3", "helium", "arcee")},
    **{name: Tiny(_causal(name, **_LLAMA), _V) for name in ("ernie4_5", "seed_oss", "ministral3")},
    **{
        name: Tiny(_causal(name, **_HIDDEN), _V)
        for name in ("qwen2", "granite", "cohere", "olmo", "olmo2", "starcoder2")
    },
    "olmo3": Tiny(_causal("olmo3", **_HIDDEN), _V),
    **{name: Tiny(_causal(name, **_LLAMA, query_pre_attn_scalar=12), _V) for name in ("gemma2", "gemma3_text")},
    "exaone4": Tiny(_causal("exaone4", **_LLAMA, **_SLIDING), _V),
    "qwen2_moe": Tiny(_causal("qwen2_moe", **_HIDDEN, **_MOE, shared_expert_intermediate_size=40), _V),
    "qwen3_moe": Tiny(_causal("qwen3_moe", **_LLAMA, **_MOE, mlp_only_layers=[0]), _V),
    "mixtral": Tiny(_causal("mixtral", **_LLAMA, **_LOCAL_MOE), _V),
    "gpt_oss": Tiny(_causal("gpt_oss", **_LLAMA, **_LOCAL_MOE), _V),
    "olmoe": Tiny(_causal("olmoe", **_HIDDEN, **_MOE), _V),
    "granitemoe": Tiny(_causal("granitemoe", **_HIDDEN, **_LOCAL_MOE), _V),
    "phi3": Tiny(_causal("phi3", **_HIDDEN), {"qkv_proj": {"v"}}),
    # A norm or a gate between value and output: nothing is paired.
    "bitnet": Tiny(_causal("bitnet", **_HIDDEN), {}),
    "gemma3n_text": Tiny(
        _causal(
            "gemma3n_text",
            **{**_LLAMA, "num_hidden_layers": 4},
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=8,
            altup_num_inputs=2,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        {},
    ),
    "gemma4_text": Tiny(_causal("gemma4_text", **_GEMMA4), {}),
    "gemma4": Tiny(
        _auto(
            hf.AutoModelForImageTextToText,
            "gemma4",
            text_config=_GEMMA4,
            vision_config=dict(
                **_LAYERS,
                hidden_size=48,
                head_dim=12,
                num_key_value_heads=4,
                patch_size=2,
                pooling_kernel_size=2,
                position_embedding_size=8,
            ),
            audio_config=None,
            image_token_id=5,
            video_token_id=6,
            audio_token_id=7,
            boi_token_id=8,
            eoi_token_id=8,
        ),
        {},
        kind="gemma4",
    ),
    "qwen3_next": Tiny(
        _causal(
            "qwen3_next",
            **_LLAMA,
            **_MOE,
            shared_expert_intermediate_size=40,
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        {},
    ),
    # Some layers without rotary embeddings.
    "cohere2": Tiny(_causal("cohere2", **_HIDDEN, **_SLIDING), {"layers.1.self_attn.k_proj": {"k"}, **_V}),
    "internlm3": Tiny(_causal("internlm3", **_LLAMA), _V),
    "dbrx": Tiny(
        _causal(
            "dbrx",
            vocab_size=VOCAB,
            d_model=48,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            attn_config={"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 4},
        ),
        {},
    ),
    "llama4_text": Tiny(
        _causal(
            "llama4_text",
            **_LLAMA,
            **_LOCAL_MOE,
            intermediate_size_mlp=80,
            interleave_moe_layer_step=2,
            no_rope_layers=[1, 0],
        ),
        {"layers.1.self_attn.k_proj": {"k"}, **_V},
    ),
    "biogpt": Tiny(_causal("biogpt", **_LARGER), _KV),
    "smollm3": Tiny(_causal("smollm3", **_HIDDEN, no_rope_layers=[1, 0]), {"layers.1.self_attn.k_proj": {"k"}, **_V}),
    # Partial rotary: the unrotated part of the key is paired.
    **{name: Tiny(_causal(name, **_LLAMA), _KV) for name in ("glm", "glm4", "nemotron")},
    "stablelm": Tiny(_causal("stablelm", **_LARGER), _KV),
    "phi": Tiny(_causal("phi", **_LARGER), _KV),
    "gptj": Tiny(_causal("gptj", **_GPT2, rotary_dim=4), _KV),
    "codegen": Tiny(
        _causal("codegen", **{**_GPT2, "n_embd": 64, "n_head": 8}, rotary_dim=4), {"qkv_proj": {"k", "v"}}
    ),
    "gpt_neox": Tiny(
        _causal("gpt_neox", **{k: v for k, v in _LARGER.items() if k != "num_key_value_heads"}),
        {"query_key_value": {"k", "v"}},
    ),
    "persimmon": Tiny(
        _causal("persimmon", **{k: v for k, v in _LARGER.items() if k != "num_key_value_heads"}, qk_layernorm=False),
        {"query_key_value": {"k", "v"}},
    ),
    # Learned or ALiBi positions: both are paired.
    "gpt2": Tiny(_causal("gpt2", **_GPT2), {"c_attn": {"k", "v"}}),
    "gpt_bigcode": Tiny(_causal("gpt_bigcode", **_GPT2), {"c_attn": {"k", "v"}}),
    "gpt_neo": Tiny(
        _causal(
            "gpt_neo",
            vocab_size=VOCAB,
            hidden_size=48,
            num_layers=2,
            num_heads=4,
            intermediate_size=80,
            max_position_embeddings=64,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
        ),
        _KV,
    ),
    "bloom": Tiny(
        _causal("bloom", vocab_size=VOCAB, hidden_size=80, n_layer=2, n_head=4), {"query_key_value": {"k", "v"}}
    ),
    "falcon": Tiny(
        _causal(
            "falcon",
            **{k: v for k, v in _HIDDEN.items() if k not in ("intermediate_size", "num_key_value_heads")},
            ffn_hidden_size=80,
            new_decoder_architecture=True,
            num_kv_heads=2,
            bias=True,
        ),
        {"query_key_value": {"v"}},
    ),
    "mpt": Tiny(
        _causal("mpt", vocab_size=VOCAB, d_model=80, n_layers=2, n_heads=4, max_seq_len=64), {"Wqkv": {"k", "v"}}
    ),
    "opt": Tiny(
        _causal(
            "opt",
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
    # Decoupled rotary.
    "deepseek_v2": Tiny(
        _causal("deepseek_v2", **{**_DEEPSEEK, "q_lora_rank": None}, topk_method="greedy"), {"kv_b_proj": {"k", "v"}}
    ),
    "deepseek_v3": Tiny(_causal("deepseek_v3", **_DEEPSEEK), {"kv_b_proj": {"k", "v"}}),
    # Encoders.
    **{
        name: Tiny(_auto(hf.AutoModelForMaskedLM, name, **_BERT), {"self.key": {"k"}, "self.value": {"v"}})
        for name in ["bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "electra", "data2vec-text"]
    },
    "albert": Tiny(
        _auto(hf.AutoModelForMaskedLM, "albert", **_BERT, embedding_size=24),
        {"attention.key": {"k"}, "attention.value": {"v"}},
    ),
    "distilbert": Tiny(
        _auto(
            hf.AutoModelForMaskedLM,
            "distilbert",
            vocab_size=VOCAB,
            dim=48,
            hidden_dim=80,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=64,
        ),
        {"k_lin": {"k"}, "v_lin": {"v"}},
    ),
    "mpnet": Tiny(_auto(hf.AutoModelForMaskedLM, "mpnet", **_BERT), {"attn.k": {"k"}, "attn.v": {"v"}}),
    "deberta": Tiny(
        _auto(
            hf.AutoModelForMaskedLM,
            "deberta",
            **_BERT,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
        ),
        {"self.in_proj": {"v"}},
        zero=("q_bias", "v_bias"),  # added behind the projection, so no part of what it computes
    ),
    "deberta-v2": Tiny(
        _auto(
            hf.AutoModelForMaskedLM,
            "deberta-v2",
            **_BERT,
            relative_attention=True,
            share_att_key=True,
            pos_att_type=["c2p", "p2c"],
        ),
        {"self.key_proj": {"k"}, "self.value_proj": {"v"}},
    ),
    "modernbert": Tiny(
        _auto(hf.AutoModelForMaskedLM, "modernbert", **_BERT, cls_token_id=1, sep_token_id=2), {"attn.Wqkv": {"v"}}
    ),
    # Encoder-decoders.
    **{
        name: Tiny(_auto(hf.AutoModelForSeq2SeqLM, name, **_BART), _KV, "seq2seq")
        for name in ["bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "plbart"]
    },
    **{
        name: Tiny(_auto(hf.AutoModelForSeq2SeqLM, name, **_T5), {".k": {"k"}, ".v": {"v"}}, "seq2seq")
        for name in ("t5", "mt5", "umt5")
    },
    "whisper": Tiny(
        _of(
            hf.WhisperForConditionalGeneration,
            **{k: v for k, v in _BART.items() if k not in ("max_position_embeddings", "forced_eos_token_id")},
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=64,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        _KV,
        "audio",
    ),
    # Vision, audio, multimodal.
    "vit": Tiny(_of(hf.ViTForImageClassification, **_IMAGE, num_labels=7), _KV, "image"),
    "dinov2": Tiny(_of(hf.Dinov2ForImageClassification, **{**_IMAGE, "mlp_ratio": 2}, num_labels=7), _KV, "image"),
    "swin": Tiny(
        _of(
            hf.SwinForImageClassification,
            image_size=8,
            patch_size=2,
            embed_dim=24,
            depths=[2, 1],
            num_heads=[2, 4],
            window_size=2,
            mlp_ratio=0.75,
            num_labels=7,
        ),
        _KV,
        "image",
    ),
    **{name: Tiny(_auto(hf.AutoModelForCTC, name, **_SPEECH), _KV, "speech") for name in ("wav2vec2", "hubert")},
    "clip": Tiny(
        _of(
            hf.CLIPModel,
            text_config=dict(_BERT, eos_token_id=2),
            vision_config=dict(_IMAGE),
            projection_dim=32,
        ),
        _KV,
        "contrast",
    ),
    "siglip": Tiny(_of(hf.SiglipModel, text_config=dict(_BERT), vision_config=dict(_IMAGE)), _KV, "contrast"),
    "siglip2": Tiny(
        _of(
            hf.Siglip2Model,
            text_config=dict(_BERT),
            vision_config={k: v for k, v in _IMAGE.items() if k != "image_size"} | {"num_patches": 4},
        ),
        _KV,
        "patches",
    ),
    "llava": Tiny(
        _of(
            hf.LlavaForConditionalGeneration,
            text_config=dict(_LLAMA, model_type="llama"),
            vision_config=dict(_IMAGE, model_type="clip_vision_model"),
            image_token_id=5,
            vision_feature_layer=-1,
        ),
        {"language_model.layers.0.self_attn.v_proj": {"v"}, "language_model.layers.1.self_attn.v_proj": {"v"}}
        | {f"vision_tower.encoder.layers.{i}.self_attn.{name}_proj": {name} for i in range(2) for name in "kv"},
        "llava",
    ),
    "qwen2_vl": Tiny(
        _of(
            hf.Qwen2VLForConditionalGeneration,
            **_QWEN_VL,
            vision_config=dict(**_QWEN_VISION, embed_dim=80, hidden_size=48, mlp_ratio=1),
        ),
        _QWEN_PAIRS,
        "qwen_vl",
    ),
    "qwen2_5_vl": Tiny(
        _of(
            hf.Qwen2_5_VLForConditionalGeneration,
            **_QWEN_VL,
            vision_config=dict(
                **_QWEN_VISION,
                hidden_size=48,
                out_hidden_size=48,
                intermediate_size=80,
                window_size=8,
                fullatt_block_indexes=[1],
            ),
        ),
        _QWEN_PAIRS,
        "qwen_vl",
    ),
    "qwen3_vl": Tiny(
        _of(
            hf.Qwen3VLForConditionalGeneration,
            **{**_QWEN_VL, "text_config": {**_QWEN_VL["text_config"], "head_dim": 12}},
            vision_config=dict(
                **_QWEN_VISION,
                hidden_size=48,
                out_hidden_size=48,
                intermediate_size=80,
                num_position_embeddings=16,
                deepstack_visual_indexes=[0],
            ),
        ),
        _QWEN_PAIRS,
        "qwen_vl",
    ),
    "mllama": Tiny(
        _of(
            hf.MllamaForConditionalGeneration,
            text_config=dict(
                _HIDDEN, cross_attention_layers=[1], rope_parameters={"rope_type": "default", "rope_theta": 1e4}
            ),
            vision_config=dict(
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=2,
                num_global_layers=1,
                attention_heads=4,
                image_size=8,
                patch_size=4,
                max_num_tiles=1,
                vision_output_dim=96,
                intermediate_layers_indices=[0],
                supported_aspect_ratios=[[1, 1]],
            ),
        ),
        {"v_proj": {"v"}}
        | {
            f"vision_model.{name}.self_attn.k_proj": {"k"}
            for name in ("transformer.layers.0", "transformer.layers.1", "global_transformer.layers.0")
        },
        "mllama",
    ),
    "unet": Tiny(
        _diffusers(
            "UNet2DConditionModel",
            sample_size=8,
            block_out_channels=(64, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=4,  # of diffusers' making: the number of heads
            norm_num_groups=8,
        ),
        {"to_k": {"k"}, "to_v": {"v"}},
        "unet",
    ),
    "sd3": Tiny(
        _diffusers(
            "SD3Transformer2DModel",
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=24,
            caption_projection_dim=64,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
        ),
        {"attn2.to_k": {"k"}, "attn2.to_v": {"v"}},
        "sd3",
    ),
    "flux": Tiny(
        _diffusers(
            "FluxTransformer2DModel",
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
        {},
        "flux",
    ),
}


def is_older(version: str) -> bool:
    """Whether the installed transformers is older."""
    return Version(hf.__version__) < Version(version)


# transformers 5.24 asks for peft 0.22: all its own functions but `load_adapter` refuse every adapter below that.
_ASKED = getattr(integrations, "MIN_PEFT_VERSION", "0")
through_transformers = pytest.mark.skipif(
    Version(peft.__version__) < Version(_ASKED),
    reason=f"transformers {hf.__version__} refuses to add an adapter with peft below {_ASKED}",
)

# Peft reads a method of the model that transformers no longer has.
seq_2_seq_by_peft = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21.2"),
    reason=f"peft {peft.__version__} makes no adapter of the task SEQ_2_SEQ_LM, of any method",
)

# The first transformers in which a family has passed; before it, the family is missing or has other modules.
SINCE = {"internlm3": "5.20", "gemma4": "5.23", "gemma4_text": "5.23"}
MISSING = {name for name, version in SINCE.items() if is_older(version)}
for _name in MISSING:
    del FAMILIES[_name]


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **kwargs) -> nn.Module:
    """A tiny model in evaluation mode whose weights and biases are all random and large enough to matter."""
    if family in MISSING:
        pytest.skip(f"{family} needs transformers {SINCE[family]}")
    torch.manual_seed(seed)
    model = FAMILIES[family].build(**kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name and "shared" not in name and "router" not in name and "gate.weight" not in name:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
            if name.endswith(FAMILIES[family].zero):
                parameter.zero_()
    # As an adapter leaves it: torch's own attention (Siglip's pooling) computes other bits for weights it may freeze.
    return model.requires_grad_(False).to(dtype).eval()


def inputs(family: str, batch: int = 2, length: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random inputs with padding in one row."""
    generator = torch.Generator().manual_seed(1)
    kind = FAMILIES[family].kind
    image = torch.randn(batch, 3, 8, 8, generator=generator).to(dtype)
    if kind == "image":
        return {"pixel_values": image}
    if kind == "speech":
        return {"input_values": torch.randn(batch, 10 * length, generator=generator).to(dtype)}
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
    if kind == "contrast":
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": image}
    if kind == "patches":
        patches = image.reshape(batch, 4, 48)
        shapes = torch.tensor([[2, 2]] * batch)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(batch, 4, dtype=torch.long),
            "spatial_shapes": shapes,
        }
    if kind == "mllama":
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": image.view(batch, 1, 1, 3, 8, 8),
            "aspect_ratio_ids": torch.ones(batch, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(batch, 1, 1, dtype=torch.long),
            "cross_attention_mask": torch.ones(batch, length, 1, 1, dtype=torch.long),
        }
    if kind in ("unet", "sd3", "flux"):
        inputs = {"timestep": torch.tensor([3.0, 500.0][:batch] * (batch // 2)).to(dtype)}
        text = torch.randn(batch, length, 24, generator=generator).to(dtype)
        inputs["encoder_hidden_states"] = text
        if kind == "unet":
            return {**inputs, "sample": torch.randn(batch, 4, 8, 8, generator=generator).to(dtype)}
        inputs["pooled_projections"] = torch.randn(batch, 16, generator=generator).to(dtype)
        if kind == "sd3":
            return {**inputs, "hidden_states": torch.randn(batch, 4, 8, 8, generator=generator).to(dtype)}
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        positions = torch.stack([torch.zeros(4, 4), rows, columns], dim=-1).flatten(0, 1)
        return {
            **inputs,
            "timestep": inputs["timestep"] / 1000,
            "hidden_states": torch.randn(batch, 16, 4, generator=generator).to(dtype),
            "img_ids": positions.to(dtype),
            "txt_ids": torch.zeros(length, 3, dtype=dtype),
        }
    if kind in ("llava", "qwen_vl", "gemma4"):  # four tokens of an image
        ids = ids.clamp(min=9)
        ids[:, 1:5] = 5
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": image}
        if kind == "gemma4":
            inputs["pixel_values"] = image.reshape(batch, 16, 12)
            inputs["image_position_ids"] = torch.tensor([[[i % 4, i // 4] for i in range(16)]] * batch)
        if kind == "qwen_vl":
            inputs["pixel_values"] = image.reshape(batch * 16, 12)
            inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * batch)
            inputs["mm_token_type_ids"] = (ids == 5).long()
        return inputs
    return {"input_ids": ids, "attention_mask": mask}


def output(model: nn.Module, family: str, **kwargs) -> Tensor:
    """The model's logits on `inputs`, or what it has for them: embeddings, one below the other."""
    result = model(**inputs(family, dtype=next(model.parameters()).dtype, **kwargs))
    if "text_embeds" in result:
        return torch.cat([result.text_embeds, result.image_embeds])
    return result.logits if "logits" in result else result.sample


@torch.no_grad()
def logits(model: nn.Module, family: str) -> Tensor:
    """`output`, without gradients."""
    return output(model, family)


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


def load_script(name: str) -> ModuleType:
    """The module of a subcommand, or a script of `scripts/` that is none."""
    if importlib.util.find_spec(f"clover_peft.cli.{name}") is not None:
        return importlib.import_module(f"clover_peft.cli.{name}")
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
