"""`save_stock`: save a model with pruned values in a class of transformers that has a value width of its own.

`MiMoV2FlashForCausalLM` is Llama with separate `head_dim` and `v_head_dim`, once all its layers attend to all tokens,
none has experts, and no factor scales the values. Its attention then has no sinks, and Llama's scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base_model.attention import WIDTHS
from ..base_model.plain import check_plain, check_unquantised
from ..io.atomic import check_new_folder
from .sliced_models import RECORD

# Models whose layers are Llama's: the same modules, names and order of operations, with plain RMSNorms.
_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
# What both configs mean alike.
_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"),
)
_ROPE = "full_attention"  # the entry for layers of this type


@torch.no_grad()
def save_stock(model: nn.Module, folder: str | PathLike[str], *, hub_keys: bool = False) -> None:
    """Save a rotary model with pruned V-O so that transformers loads it without `clover_peft` (ours).

    The result is a checkpoint of `MiMoV2FlashForCausalLM` with the same logits and the same small cache. That class
    has no bias behind attention. A constant that pruning left there becomes one more dimension of all values: it is 1
    in the first key-value head and 0 in the others, and attention weights sum to 1.

    The class computes attention by matrix products (`eager`), its softmax in the dtype of the weights. The model is
    not changed, and no weight is copied but those that get another dimension.

    Args:
        model: a Llama, Mistral or Qwen2 for causal language modelling, pruned with `ranks="uniform"`.
        folder: new or empty; gets the weights, the config and the generation config. Save the tokenizer beside it.
        hub_keys: also write the keys of the config that vLLM's and SGLang's own classes read, and the head's weights
            apart from the embedding's, which these classes do not tie.

    Raises:
        ValueError: if the class cannot hold the model, or `folder` has files in it.
        TypeError: if `model` is not a model.
    """
    from transformers import MiMoV2FlashForCausalLM

    width = check_stock(model)
    path = Path(folder)
    check_new_folder(path)
    source: Any = model
    tensors = {name: tensor for name, tensor in source.state_dict().items() if not name.endswith("o_proj.bias")}
    if constants := _constants(source):
        width += 1
        _hold_constants(source, tensors, constants)
    tied = bool(source.config.tie_word_embeddings)
    config = _config(
        source.config, width, tied and not hub_keys, any(name.endswith("k_proj.bias") for name in tensors)
    )
    if hub_keys:
        _add_hub_keys(config)
        if tied:
            tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    with torch.device("meta"):
        stock = MiMoV2FlashForCausalLM(config)
    stock.load_state_dict(tensors, assign=True)
    _check_rotation(source, config)
    stock.tie_weights()
    if source.generation_config is not None:
        stock.generation_config = source.generation_config
    stock.save_pretrained(path)


def check_stock(model: Any) -> int:
    """Check that `save_stock` can save a model, pruned or yet to be pruned.

    Args:
        model: the model.

    Returns:
        The width of its value heads.

    Raises:
        ValueError, TypeError: as `save_stock`.
    """
    check_plain(model)
    kind = type(model)
    if kind.__name__ not in _CLASSES or not kind.__module__.startswith("transformers."):
        raise ValueError(
            f"{kind.__name__}: expected one of {', '.join(_CLASSES)}, whose layers are those of "
            "MiMoV2FlashForCausalLM, found another class; save it with save_pretrained, and import clover_peft before "
            "it is loaded"
        )
    check_unquantised(model, kind.__name__)
    config = model.config
    if hasattr(config, RECORD):
        raise ValueError(
            f"{kind.__name__}: expected layers of its class, found some with matrices on their shortcuts; slice with "
            'rotation="shared"'
        )
    if getattr(config, "mlp_bias", False):
        raise ValueError("mlp_bias: expected an MLP without biases, which MiMoV2FlashForCausalLM has, found some")
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window is not None and sliding and window < config.max_position_embeddings:
        raise ValueError(
            f"sliding_window: expected attention to all tokens, which MiMoV2FlashForCausalLM has without sinks, found "
            f"a window of {window}; set config.max_position_embeddings={window} if no longer text is read"
        )
    widths = {}
    for name, module in model.named_modules():
        if hasattr(module, "v_proj"):
            widths[name] = getattr(module, WIDTHS, (module.head_dim, module.head_dim))[1]
    first, width = next(iter(widths.items()))
    if other := next((name for name, found in widths.items() if found != width), None):
        raise ValueError(
            f"{other}: expected values of {width} dimensions a head as in {first}, because MiMoV2FlashForCausalLM has "
            f'one width for all layers, found {widths[other]}; prune the whole model with prune(..., ranks="uniform")'
        )
    return int(width)


def _constants(model: Any) -> dict[int, Tensor]:
    """Layer -> the bias behind its attention, (D,), where it is not zero."""
    biases = {i: layer.self_attn.o_proj.bias for i, layer in enumerate(model.model.layers)}
    return {i: bias for i, bias in biases.items() if bias is not None and bool(bias.any())}


def _hold_constants(model: Any, tensors: dict[str, Tensor], constants: Mapping[int, Tensor]) -> None:
    """Add a dimension to all values, in `tensors`, that carries what the output projections have as a bias."""
    heads = model.config.num_key_value_heads
    for i in range(len(model.model.layers)):
        path = f"model.layers.{i}.self_attn."
        for name in "qkv":  # the class has all three biases, or none
            weight = tensors[f"{path}{name}_proj.weight"]
            tensors.setdefault(f"{path}{name}_proj.bias", weight.new_zeros(len(weight)))
        value, bias, output = (tensors[path + name] for name in ("v_proj.weight", "v_proj.bias", "o_proj.weight"))
        rows = value.unflatten(0, (heads, -1))
        tensors[path + "v_proj.weight"] = torch.cat([rows, torch.zeros_like(rows[:, :1])], dim=1).flatten(0, 1)
        entries = bias.unflatten(0, (heads, -1))
        one = torch.zeros_like(entries[:, :1])
        columns = output.unflatten(1, (model.config.num_attention_heads, -1))
        column = torch.zeros_like(columns[..., :1])
        if i in constants:
            one[0], column[:, 0, 0] = 1, constants[i]
        tensors[path + "v_proj.bias"] = torch.cat([entries, one], dim=1).flatten()
        tensors[path + "o_proj.weight"] = torch.cat([columns, column], dim=2).flatten(1)


def _config(source: Any, width: int, tied: bool, biases: bool) -> Any:
    from transformers import MiMoV2FlashConfig

    layers = source.num_hidden_layers
    head_dim = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    return MiMoV2FlashConfig(
        **{name: getattr(source, name) for name in _SHARED},
        tie_word_embeddings=tied,
        head_dim=head_dim,
        v_head_dim=width,
        attention_bias=biases,
        attention_value_scale=None,
        layer_types=["full_attention"] * layers,
        mlp_layer_types=["dense"] * layers,
        rope_parameters={_ROPE: {"partial_rotary_factor": 1.0, **source.rope_parameters}},
    )


def _add_hub_keys(config: Any) -> None:
    """Add the keys that vLLM's and SGLang's classes read; ValueError if these would compute something else."""
    rope = config.rope_parameters[_ROPE]
    if rope["rope_type"] != "default":
        raise ValueError(
            f"hub_keys: expected rotary embeddings of type 'default', the only ones of vLLM's class, found "
            f"{rope['rope_type']!r}; leave hub_keys out"
        )
    if config.hidden_act != "silu":
        raise ValueError(
            f"hub_keys: expected hidden_act 'silu', the only one of vLLM's class, found {config.hidden_act!r}; leave "
            "hub_keys out"
        )
    none = [0] * config.num_hidden_layers
    keys = {"hybrid_layer_pattern": none, "moe_layer_freq": none, "layernorm_epsilon": config.rms_norm_eps}
    keys |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": 1.0, "swa_rope_theta": rope["rope_theta"]}
    keys |= {"add_full_attention_sink_bias": False, "add_swa_attention_sink_bias": False}
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"):
        keys[f"swa_{name}"] = getattr(config, name)
    for name, value in keys.items():
        setattr(config, name, value)


def _check_rotation(model: Any, config: Any) -> None:
    """ValueError if the class would turn queries and keys by other angles."""
    from transformers.models.mimo_v2_flash.modeling_mimo_v2_flash import MiMoV2FlashRotaryEmbedding

    own = type(model.model.rotary_emb)(model.config)  # as it is when loaded: a cast has rounded the model's own
    other = MiMoV2FlashRotaryEmbedding(config)
    expected, found = own.original_inv_freq, getattr(other, f"{_ROPE}_original_inv_freq")
    if (
        expected.shape != found.shape
        or not torch.allclose(expected, found, rtol=1e-6, atol=0)
        or own.attention_scaling != getattr(other, f"{_ROPE}_attention_scaling")
    ):
        raise ValueError(
            f"rope_parameters: expected MiMoV2FlashForCausalLM to compute the model's angles, found others for "
            f"{config.rope_parameters[_ROPE]}; save it with save_pretrained instead, and report this"
        )
