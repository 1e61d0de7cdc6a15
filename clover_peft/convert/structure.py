"""Which models can become latent attention: a check of what stands between the projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base_model.plain import check_plain, check_unquantised

_CHILDREN = {
    "": {"model", "lm_head"},
    "model": {"embed_tokens", "layers", "norm", "rotary_emb"},
    "layer": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
# What transformers' rotary embeddings read; another key, such as a scale of queries by position, is read elsewhere.
_ROPE_KEYS = {
    *("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "type"),
    *("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "short_factor", "long_factor"),
    *("low_freq_factor", "high_freq_factor", "partial_rotary_factor"),
}
_SCALINGS = ("default", "linear", "llama3", "yarn", "longrope")
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


@dataclass(frozen=True)
class Source:
    """A model that can be converted, and the facts that the conversion needs.

    Attributes:
        model: the model.
        layers: its decoder layers.
        heads: query heads, H.
        key_value_heads: h.
        head_dim: d.
        frequencies: (d/2,) float64, the inverse frequencies of the rotary embedding, in radians a token.
        scale: the softmax scale, with the squared factor that the rotary embedding multiplies queries and keys by.
        eps: of its norms.
    """

    model: PreTrainedModel
    layers: list[Any]
    heads: int
    key_value_heads: int
    head_dim: int
    frequencies: Tensor
    scale: float
    eps: float

    @property
    def groups(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.key_value_heads

    @property
    def pairs(self) -> int:
        """Pairs of rotated dimensions in the keys of all heads."""
        return self.key_value_heads * self.head_dim // 2


def read_source(model: Any) -> Source:
    """Check a model, and read its facts. The model is only read.

    Raises:
        ValueError, TypeError: if it cannot be converted, with the reason.
    """
    _check_weights(model)
    source = read_structure(model)
    _check_untied(model, source.layers)
    return source


def read_structure(model: Any) -> Source:
    """As `read_source`, for a model whose weights may be on the meta device.

    Raises:
        ValueError: if it cannot be converted, with the reason.
    """
    config, name = model.config, type(model).__name__
    for fact in _CAPS:
        if getattr(config, fact, None) is not None:
            raise ValueError(
                f"{name}: expected plain logits, found {fact}={getattr(config, fact)}, which latent "
                "attention in its stock class lacks"
            )
    _check_children(model, "", name)
    _check_children(model.model, "model", "model")
    layers = list(model.model.layers)
    for i, layer in enumerate(layers):
        path = f"model.layers.{i}"
        _check_children(layer, "layer", path)
        _check_attention(layer.self_attn, config, f"{path}.self_attn")
        _check_children(layer.mlp, "mlp", f"{path}.mlp")
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            if part.bias is not None:
                raise ValueError(f"{path}.mlp: expected no biases, found some, for which DeepseekV3 has no place")
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            _check_norm(norm, path)
    _check_norm(model.model.norm, "model.norm")
    if model.lm_head.bias is not None:
        raise ValueError("lm_head: expected no bias, found one, for which DeepseekV3 has no place")
    head_dim = layers[0].self_attn.head_dim
    rotary = model.model.rotary_emb
    if any(buffer.is_meta for buffer in rotary.buffers()):
        rotary = type(rotary)(config=config)
    frequencies = getattr(rotary, "inv_freq", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type")
    changing = kind == "longrope" and parameters.get("short_factor") != parameters.get("long_factor")
    if not isinstance(frequencies, Tensor) or kind not in _SCALINGS or changing:
        raise ValueError(
            f"model.rotary_emb: expected frequencies that do not depend on a text's length, found "
            f"rope_type={kind!r}, which DeepseekV3 cannot rotate by"
        )
    if unknown := sorted(key for key, value in parameters.items() if key not in _ROPE_KEYS and value):
        raise ValueError(
            f"model.rotary_emb: expected settings of rotary embeddings alone, found {unknown[0]}="
            f"{parameters[unknown[0]]}, which may depend on a text's length"
        )
    if 2 * len(frequencies) != head_dim:
        raise ValueError(
            f"model.rotary_emb: expected rotation of all {head_dim} dimensions of a head, found {2 * len(frequencies)}"
        )
    eps = {n.variance_epsilon for layer in layers for n in (layer.input_layernorm, layer.post_attention_layernorm)}
    eps.add(model.model.norm.variance_epsilon)
    if len(eps) > 1:
        raise ValueError(f"{name}: expected norms with one epsilon, found {sorted(eps)}")
    return Source(
        model=model,
        layers=layers,
        heads=layers[0].self_attn.q_proj.out_features // head_dim,
        key_value_heads=layers[0].self_attn.k_proj.out_features // head_dim,
        head_dim=head_dim,
        frequencies=frequencies.double().cpu(),
        scale=head_dim**-0.5 * float(rotary.attention_scaling) ** 2,
        eps=eps.pop(),
    )


def _check_weights(model: Any) -> None:
    check_plain(model)
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a causal language model of transformers, found {name}")
    check_unquantised(model, name)
    if getattr(model, "hf_device_map", None):
        raise ValueError(f"{name}: expected all weights on one device, found them spread; load it without device_map")
    kinds = {p.dtype for p in model.parameters()}
    if torch.float16 in kinds:
        raise ValueError(
            f"{name}: expected bfloat16 or float32 weights, found float16, whose range is too small to "
            "make the latent's norm linear; load it with dtype=torch.bfloat16 (--dtype bfloat16 in the shell)"
        )
    if len(kinds) > 1:
        raise ValueError(f"{name}: expected weights of one dtype, found {', '.join(sorted(map(str, kinds)))}")


def _check_children(module: Any, kind: str, path: str) -> None:
    expected, found = _CHILDREN[kind], {name for name, _ in module.named_children()}
    if odd := sorted(found ^ expected) or [name for name, _ in module.named_parameters(recurse=False)]:
        what = "lacks" if odd[0] in expected else "has"
        raise ValueError(
            f"{path}: expected {', '.join(sorted(expected))} and nothing else, but it {what} {odd[0]}, "
            "so it is no plain rotary model that DeepseekV3 can compute"
        )


def _check_attention(attention: Any, config: Any, path: str) -> None:
    _check_children(attention, "self_attn", path)
    head_dim = attention.head_dim
    if any(type(m) is not nn.Linear for m in attention.children()):
        raise ValueError(f"{path}: expected linear projections, found {type(attention.q_proj).__name__}")
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    kinds = getattr(config, "layer_types", None) or []
    if "sliding_attention" in kinds or (
        window is not None and not kinds and window < getattr(config, "max_position_embeddings", window + 1)
    ):
        raise ValueError(
            f"{path}: expected attention to all tokens, found a sliding window of {window}, which DeepseekV3 lacks"
        )
    if not getattr(attention, "use_rope", True):
        raise ValueError(f"{path}: expected rotated queries and keys in every layer, found a layer without rotation")
    scaling = getattr(attention, "scaling", None)
    if scaling is None or abs(scaling * head_dim**0.5 - 1) > 1e-6:
        raise ValueError(f"{path}: expected the softmax scale 1/sqrt({head_dim}), found {scaling}")
    if attention.v_proj.out_features != attention.k_proj.out_features:
        raise ValueError(f"{path}: expected values as wide as keys, found a model with pruned heads; prune afterwards")


def _check_norm(norm: Any, path: str) -> None:
    if not hasattr(norm, "variance_epsilon") or [name for name, _ in norm.named_parameters()] != ["weight"]:
        raise ValueError(f"{path}: expected RMSNorm with a gain, found {type(norm).__name__}")


def _check_untied(model: Any, layers: list[Any]) -> None:
    owners: dict[int, str] = {}
    for i, layer in enumerate(layers):
        for name, parameter in layer.named_parameters(remove_duplicate=False):
            other = owners.setdefault(parameter.data_ptr(), f"model.layers.{i}.{name}")
            if other != f"model.layers.{i}.{name}":
                raise ValueError(f"model.layers.{i}.{name}: expected weights of its own, found them tied to {other}")
