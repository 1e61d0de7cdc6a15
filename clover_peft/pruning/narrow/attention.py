"""The forward of attention whose heads have other widths than the model's `head_dim`, and what differs by class.

The softmax scale is the one that the module was built with, 1/sqrt(original head_dim).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class Part:
    """One part of a projection: `name` is "q", "k" or "v", for `count` heads of `width` features."""

    name: str
    count: int
    width: int


@dataclass(frozen=True)
class Projection:
    """A projection of a narrow block: the parts that it computes, head by head or one after the other."""

    name: str
    parts: tuple[Part, ...]
    by_head: bool


@dataclass(frozen=True)
class Style:
    """What differs between the attention modules of transformers that otherwise do the same.

    Attributes:
        forward: of the narrow module; takes the arguments of the stock forward by their roles (`calls.ROLES`), and as
            `rest` the keywords that go on to the attention function.
        output: attribute of the output projection; None if another module has it.
        scale: attribute of the softmax scale.
        scales_query: the scale is multiplied onto the query, before the dot product.
        dropout: attribute of the dropout on attention weights, a module or its probability.
        residual_dropout: attribute of the dropout behind the output projection.
        options: keyword of the attention function -> attribute of the module or, with a dot, below it.
        joins_sources: a larger batch of what keys and values are made from is read as a longer one, as the class does.
    """

    forward: Callable[..., Any]
    output: str | None = "o_proj"
    scale: str = "scaling"
    scales_query: bool = False
    dropout: str = "attention_dropout"
    residual_dropout: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    joins_sources: bool = False


def split_heads(module: Any, x: Tensor, source: Tensor | None, keys: bool) -> dict[str, Tensor]:
    """Part -> its heads, (batch, heads, tokens, width). Keys and values are of `source` where that is given, and left
    out without `keys`."""
    found = {}
    for projection in module.clover_projections:
        if not keys and projection.parts[0].name != "q":
            continue
        y = getattr(module, projection.name)(x if source is None or projection.parts[0].name == "q" else source)
        parts = projection.parts
        if len(parts) == 1:  # however many heads of it are here, under tensor parallelism
            found[parts[0].name] = y.unflatten(-1, (-1, parts[0].width)).transpose(1, 2)
            continue
        if projection.by_head:
            widths = [part.width for part in parts]
            pieces = y.unflatten(-1, (-1, sum(widths))).split(widths, dim=-1)
        else:
            split = y.split([part.count * part.width for part in parts], dim=-1)
            pieces = [piece.unflatten(-1, (-1, part.width)) for part, piece in zip(parts, split, strict=True)]
        for part, piece in zip(parts, pieces, strict=True):
            found[part.name] = piece.transpose(1, 2)
    return found


def _query_key_value(
    module: Any,
    x: Tensor,
    cache: Cache | None,
    source: Tensor | None,
    positions: tuple[Tensor, Tensor] | None,
    rest: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of all tokens so far, (batch, heads, tokens, width)."""
    layers, known = cache, False
    if isinstance(cache, EncoderDecoderCache):
        layers = cache.self_attention_cache if source is None else cache.cross_attention_cache
        known = source is not None and bool(cache.is_updated.get(module.layer_idx))
    if source is not None and module.clover_style.joins_sources:
        source = source.reshape(len(x), -1, source.shape[-1])
    heads = split_heads(module, x, source, keys=not known)
    query = heads["q"]
    if module.clover_style.scales_query:
        query = query * getattr(module, module.clover_style.scale)
    if known:
        assert layers is not None
        return query, layers.layers[module.layer_idx].keys, layers.layers[module.layer_idx].values
    key, value = heads["k"], heads["v"]
    if getattr(module, "q_norm", None) is not None:
        query, key = module.q_norm(query), module.k_norm(key)
    if positions is not None:
        query, key = module.clover_modeling.apply_rotary_pos_emb(query, key, *positions)
    if layers is not None:
        _check_cached(module, layers, key, value)
        # Where the parameter is called `cache`, it may also change what goes to the attention function.
        more = {"kwargs": rest} if "cache" in module.clover_call.own else {}
        key, value = layers.update(key, value, module.layer_idx, **more)
        if source is not None and isinstance(cache, EncoderDecoderCache):
            cache.is_updated[module.layer_idx] = True
    return query, key, value


def _check_cached(module: Any, cache: Cache, key: Tensor, value: Tensor) -> None:
    """Raises ValueError if a cache holds heads of another width, such as that in the config."""
    # A cache that holds pages for continuous batching has no layers.
    for layer in getattr(cache, "layers", [])[module.layer_idx : module.layer_idx + 1]:
        for kind, new in (("keys", key), ("values", value)):
            old = getattr(layer, kind, None)
            if isinstance(old, Tensor) and old.ndim == 4 and old.shape[-1] != new.shape[-1]:
                raise ValueError(
                    f"{module.clover_call.name}, layer {module.layer_idx}: expected a cache whose {kind} have "
                    f"{new.shape[-1]} dimensions, as the pruned heads have, found {old.shape[-1]}; use another "
                    "adapter than prefix tuning, and a cache that the model makes, or prune with masked=True"
                )


def _attended(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What the heads pass on, (batch, tokens, heads * width), behind the output projection where that is the module's
    own; and the attention weights, if the implementation returns them."""
    style, implementation = module.clover_style, module.config._attn_implementation
    if implementation == "eager" and getattr(module, "reorder_and_upcast_attn", False):
        out, weights = module._upcast_and_reordered_attn(query, key, value, mask)
    else:
        dropout = getattr(module, style.dropout)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, module.clover_modeling.eager_attention_forward)
        out, weights = attend(
            module,
            query,
            key,
            value,
            mask,
            dropout=getattr(dropout, "p", dropout) if module.training else 0.0,
            scaling=1.0 if style.scales_query else getattr(module, style.scale),
            **{keyword: operator.attrgetter(name)(module) for keyword, name in style.options.items()},
            **kwargs,
        )
    out = out.reshape(query.shape[0], query.shape[2], -1).contiguous()  # Batches that differ do not pass.
    if style.output is not None:
        out = getattr(module, style.output)(out)
    if style.residual_dropout is not None:
        out = getattr(module, style.residual_dropout)(out)
    return out, weights


def _forward(
    self: Any,
    *,
    hidden_states: Tensor,
    rest: dict[str, Any],
    mask: Tensor | None = None,
    cache: Cache | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
    source: Tensor | None = None,
    source_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention and cross-attention.

    Args:
        hidden_states: (batch, tokens, features).
        rest: other keywords of the attention function.
        mask: (batch, 1, tokens, tokens of keys), or what the attention function takes.
        cache: keys and values of the tokens before.
        positions: cosines and sines of rotary embeddings, (batch, tokens, width).
        source: what keys and values are made from in cross-attention, (batch, tokens of keys, features).
        source_mask: the mask in cross-attention.

    Returns:
        What the module returns, (batch, tokens, features), and the attention weights where there are some.
    """
    states = _query_key_value(self, hidden_states, cache, source, positions, rest)
    # A class with a parameter for the mask in cross-attention reads no other one there, also where it is None.
    has_own = source is not None and "encoder_attention_mask" in self.clover_call.own
    return _attended(self, *states, source_mask if has_own or source_mask is not None else mask, **rest)


def _t5_forward(
    self: Any,
    *,
    hidden_states: Tensor,
    rest: dict[str, Any],
    mask: Tensor | None = None,
    source: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Cache | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention with a bias by distance, which the first layer makes for all others (as `T5Attention.forward`)."""
    seen = cache.get_seq_length(self.layer_idx) if cache is not None else 0
    seen = seen.clone() if isinstance(seen, Tensor) else seen  # a static cache counts in place
    query, key, value = _query_key_value(self, hidden_states, cache, source, None, rest)
    if position_bias is None:
        length, key_length = hidden_states.shape[1], key.shape[2]
        if self.has_relative_attention_bias:
            position_bias = self.compute_bias(length, key_length, device=query.device, past_seen_tokens=seen)
        else:
            position_bias = query.new_zeros(1, self.n_heads, length, key_length)
            position_bias.requires_grad_(self.gradient_checkpointing and self.training)
    out, weights = _attended(self, query, key, value, mask, position_bias=position_bias, **rest)
    return out, position_bias, weights


def _bloom_forward(
    self: Any,
    *,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    mask: Tensor | None,
    rest: dict[str, Any],
    cache: Cache | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with linear biases, (batch * heads, 1, tokens), residual added (as `BloomAttention.forward`)."""
    query, key, value = _query_key_value(self, hidden_states, cache, None, None, rest)
    batch, heads, length, _ = query.shape
    scores = alibi.baddbmm(query.flatten(0, 1), key.flatten(0, 1).mT, beta=self.beta, alpha=self.inv_norm_factor)
    scores = scores.view(batch, heads, length, -1)
    if mask is not None:
        scores = scores + mask
    weights = self.attention_dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype))
    out = torch.bmm(weights.flatten(0, 1), value.flatten(0, 1)).view(batch, heads, length, -1)
    out = self.dense(out.transpose(1, 2).flatten(2))
    return self.clover_modeling.dropout_add(out, residual, self.hidden_dropout, self.training), weights


_BART_STYLE = Style(_forward, output="out_proj", dropout="dropout")
_OPT_STYLE = Style(_forward, output="out_proj", dropout="dropout", scales_query=True)
_BERT_STYLE = Style(_forward, output=None, dropout="dropout")
_SLIDING = {"sliding_window": "sliding_window"}
_TABLE: list[tuple[str, Style]] = [
    ("LlamaAttention GemmaAttention ViTAttention", Style(_forward)),
    ("MistralAttention", Style(_forward, options={"sliding_window": "config.sliding_window"})),
    ("Qwen2Attention Qwen3Attention Gemma3Attention", Style(_forward, options=_SLIDING)),
    ("Gemma2Attention", Style(_forward, options={**_SLIDING, "softcap": "attn_logit_softcapping"})),
    ("GPTNeoXAttention", Style(_forward, output="dense")),
    (
        "GPT2Attention",
        Style(_forward, output="c_proj", dropout="attn_dropout", residual_dropout="resid_dropout"),
    ),
    ("BartAttention MBartAttention PegasusAttention MarianAttention PLBartAttention BlenderbotAttention", _BART_STYLE),
    ("M2M100Attention", _BART_STYLE),
    ("OPTAttention", _OPT_STYLE),
    ("WhisperAttention", replace(_OPT_STYLE, joins_sources=True)),
    ("CLIPAttention SiglipAttention", Style(_forward, output="out_proj", dropout="dropout", scale="scale")),
    (
        "BertSelfAttention BertCrossAttention RobertaSelfAttention RobertaCrossAttention XLMRobertaSelfAttention "
        "XLMRobertaCrossAttention CamembertSelfAttention CamembertCrossAttention ElectraSelfAttention "
        "ElectraCrossAttention",
        _BERT_STYLE,
    ),
    ("T5Attention MT5Attention", Style(_t5_forward, output="o", dropout="dropout")),
    ("BloomAttention", Style(_bloom_forward, output="dense", dropout="attention_dropout")),
]
# Class of an attention module -> how its narrow form differs.
STYLES: dict[str, Style] = {name: style for names, style in _TABLE for name in names.split()}


class NarrowAttnProcessor:
    """What diffusers' `Attention` calls, for heads of unequal widths (as its `AttnProcessor2_0`, but for that).

    The scale is that of the original heads. Hidden states are (batch, tokens, features) or (batch, features, H, W).
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).mT
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.mT).mT
        source = encoder_hidden_states
        if source is not None and attn.norm_cross:
            source = attn.norm_encoder_hidden_states(source)
        heads = split_heads(attn, hidden_states, source, keys=True)
        query, key, value = (heads[part] for part in "qkv")
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[2], len(key))
            attention_mask = attention_mask.view(len(key), attn.heads, -1, attention_mask.shape[-1])
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        out = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=attn.scale)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2).to(query.dtype)))
        if len(shape) == 4:
            out = out.mT.reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor
