"""A tiny model with random weights of (nearly) every model type that transformers knows, from its config alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB, LARGEST = 96, 8_000_000  # numbers in a model's parameters, at most
WAYS = (
    "CausalLM", "Seq2SeqLM", "ImageTextToText", "MaskedLM", "SpeechSeq2Seq", "CTC", "ImageClassification", "",
)  # fmt: skip
# Sizes by the names that configs use for them.
_SIZES = {
    VOCAB: "vocab_size vocab_size_per_layer_input",
    32: "hidden_size d_model n_embd embed_dim dim emb_dim projection_dim encoder_hidden_size embedding_size "
    "word_embed_proj_dim decoder_hidden_size entity_emb_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers depth "
    "num_key_value_heads encoder_num_hidden_layers decoder_num_hidden_layers encoder_num_key_value_heads "
    "decoder_num_key_value_heads num_experts_per_tok linear_num_key_heads num_codebooks eos_token_id mamba_expand "
    "moe_k",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts patch_size sliding_window attention_window rotary_dim "
    "encoder_num_attention_heads decoder_num_attention_heads linear_num_value_heads",
    8: "head_dim d_kv num_mel_bins qk_nope_head_dim qk_rope_head_dim v_head_dim mamba_d_state mamba_d_head "
    "mamba_n_heads state_size hidden_size_per_layer_input query_pre_attn_scalar linear_key_head_dim "
    "linear_value_head_dim",
    16: "image_size kv_lora_rank q_lora_rank",
    24: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_size shared_intermediate_size",
    48: "intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim hidden_dim d_ff d_inner ffn_hidden_size "
    "intermediate_size_mlp",
    30: "max_source_positions",
    50: "entity_vocab_size",
    64: "max_target_positions mamba_d_ssm codebook_size",
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_2d_position_embeddings",
    1: "n_group topk_group bos_token_id decoder_start_token_id mamba_n_groups first_k_dense_replace "
    "num_shared_experts",
    3: "local_radius",
    0: "pad_token_id layerdrop encoder_layerdrop decoder_layerdrop mask_time_prob use_mamba_kernels",
}
_BY_NAME = {name: size for size, names in _SIZES.items() for name in names.split()}
_OPTIONAL = ("sliding_window", "head_dim", "num_key_value_heads", "q_lora_rank", "rotary_dim")  # None means something
_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "moe_layers")


def small_config(cls: Any) -> Any:
    """A config of a class with small sizes, and of at most two kinds of layers."""
    base, choices = cls(), dict[str, Any]()
    aliases = getattr(base, "attribute_map", {})
    for name in vars(base).keys() - aliases.keys():
        old = getattr(base, name)
        if (
            name in _BY_NAME
            and not isinstance(old, list | tuple | dict)
            and (old is not None or name not in _OPTIONAL)
        ):
            kind = type(old) if isinstance(old, bool | float) else int  # configs check the types of their fields
            choices[name] = kind(_BY_NAME[name])
        if name in _LISTS and isinstance(old, list) and len(old) > 2:
            choices[name] = (list(dict.fromkeys(old)) * 2)[:2]
    for name in getattr(cls, "sub_configs", {}):
        if (part := getattr(base, name, None)) is not None:
            choices[name] = small_config(type(part)).to_dict()
    return cls(**choices)


def build_type(model_type: str) -> nn.Module:
    """A tiny model in evaluation mode, float32, of the first class that an `AutoModelFor...` has for it.

    Raises:
        Exception: any, if a config with these sizes makes no model.
    """
    config = small_config(CONFIG_MAPPING[model_type])
    autos = [getattr(hf, f"AutoModelFor{way}" if way else "AutoModel") for way in WAYS]
    auto = next((auto for auto in autos if type(config) in auto._model_mapping), None)
    if auto is None:
        raise ValueError("no AutoModel makes it")
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters with small sizes")
    model = auto.from_config(config).eval().float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            elif name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def inputs_of(model: Any) -> dict[str, Tensor]:
    """A batch of two for a model of `build_type`."""
    generator, config = torch.Generator().manual_seed(1), model.config
    ids = torch.randint(12, VOCAB, (2, 11), generator=generator)
    names, main = inspect.signature(model.forward).parameters, model.main_input_name
    image = getattr(config, "image_size", 16)
    image = image if isinstance(image, int) else 16
    bins = getattr(config, "num_mel_bins", 8) or 8
    shapes = {
        "pixel_values": (2, getattr(config, "num_channels", 3) or 3, image, image),
        "input_features": (2, bins, 60) if "whisper" in config.model_type else (2, 60, bins),
        "input_values": (2, 2000),
    }
    found = {main: ids if main == "input_ids" else torch.randn(shapes[main], generator=generator)}
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids[:, :7]
    if "clip" in type(model).__name__.lower() and main == "input_ids" and "pixel_values" in names:
        found["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    return found


@torch.no_grad()
def output_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """All numbers of a model's logits, or of its last hidden state, or else of its output, in one row."""
    torch.manual_seed(3)  # for models that draw
    output = model(**inputs)
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            output = found
            break
    return torch.cat([each.float().flatten() for each in _tensors(output)])


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from _tensors(each)
    elif isinstance(output, list | tuple):
        for each in output:
            yield from _tensors(each)
