"""Attention whose heads are narrower than their model's `head_dim`: its forward, how it is made, where it is recorded.

A narrow block is the model's own attention module with smaller projections and another forward (a subclass that is
made when it is needed). Its softmax scale is the one it was built with, 1/sqrt(original head_dim). The widths are
kept in the model's config, and `PreTrainedModel.post_init` makes the blocks narrow before any weight is loaded.
"""

from __future__ import annotations

import functools
import importlib.util
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from ..architectures import WIDTHS, AttentionBlock, attention_block, has_module

# The entry of a model's config that says how it was pruned.
RECORD = "clover_pruning"
VERSION = 1


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
        forward: of the narrow module.
        output: attribute of the output projection; None if another module has it.
        scale: attribute of the softmax scale.
        scales_query: the scale is multiplied onto the query, before the dot product.
        dropout: attribute of the dropout on attention weights, a module or its probability.
        residual_dropout: attribute of the dropout behind the output projection.
        options: keyword of the attention function -> attribute of the module or, with a dot, below it.
    """

    forward: Callable[..., Any]
    output: str | None = "o_proj"
    scale: str = "scaling"
    scales_query: bool = False
    dropout: str = "attention_dropout"
    residual_dropout: str | None = None
    options: dict[str, str] = field(default_factory=dict)


def _heads(module: Any, x: Tensor, source: Tensor | None, keys: bool) -> dict[str, Tensor]:
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
    module: Any, x: Tensor, cache: Cache | None, source: Tensor | None, positions: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of all tokens so far, (batch, heads, tokens, width)."""
    layers, known = cache, False
    if isinstance(cache, EncoderDecoderCache):
        layers = cache.self_attention_cache if source is None else cache.cross_attention_cache
        known = source is not None and bool(cache.is_updated.get(module.layer_idx))
    heads = _heads(module, x, source, keys=not known)
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
        key, value = layers.update(key, value, module.layer_idx)
        if source is not None and isinstance(cache, EncoderDecoderCache):
            cache.is_updated[module.layer_idx] = True
    return query, key, value


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
    out = out.flatten(2).contiguous()
    if style.output is not None:
        out = getattr(module, style.output)(out)
    if style.residual_dropout is not None:
        out = getattr(module, style.residual_dropout)(out)
    return out, weights


def _forward(
    self: Any,
    hidden_states: Tensor,
    *,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    layer_past: Cache | None = None,
    key_value_states: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention and cross-attention, by the keywords that the models' layers use.

    Returns what the module returns, (batch, tokens, features), and the attention weights where there are some.
    """
    source = key_value_states if key_value_states is not None else encoder_hidden_states
    cache = past_key_values if past_key_values is not None else layer_past
    states = _query_key_value(self, hidden_states, cache, source, position_embeddings)
    mask = attention_mask if encoder_attention_mask is None else encoder_attention_mask
    return _attended(self, *states, mask, **kwargs)


def _image_forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The same for layers that pass the mask by its place."""
    return _forward(self, hidden_states, attention_mask=attention_mask, **kwargs)


def _t5_forward(
    self: Any,
    hidden_states: Tensor,
    *,
    mask: Tensor | None = None,
    key_value_states: Tensor | None = None,
    position_bias: Tensor | None = None,
    past_key_values: Cache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention with a bias by distance, which the first layer makes for all others (as `T5Attention.forward`)."""
    seen = past_key_values.get_seq_length(self.layer_idx) if past_key_values is not None else 0
    seen = seen.clone() if isinstance(seen, Tensor) else seen  # a static cache counts in place
    query, key, value = _query_key_value(self, hidden_states, past_key_values, key_value_states, None)
    if position_bias is None:
        length, key_length = hidden_states.shape[1], key.shape[2]
        if self.has_relative_attention_bias:
            position_bias = self.compute_bias(length, key_length, device=query.device, past_seen_tokens=seen)
        else:
            position_bias = query.new_zeros(1, self.n_heads, length, key_length)
            position_bias.requires_grad_(self.gradient_checkpointing and self.training)
    out, weights = _attended(self, query, key, value, mask, position_bias=position_bias, **kwargs)
    return out, position_bias, weights


def _bloom_forward(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Cache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with linear biases, (batch * heads, 1, tokens), residual added (as `BloomAttention.forward`)."""
    query, key, value = _query_key_value(self, hidden_states, layer_past, None, None)
    batch, heads, length, _ = query.shape
    scores = alibi.baddbmm(query.flatten(0, 1), key.flatten(0, 1).mT, beta=self.beta, alpha=self.inv_norm_factor)
    scores = scores.view(batch, heads, length, -1)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = self.attention_dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype))
    out = torch.bmm(weights.flatten(0, 1), value.flatten(0, 1)).view(batch, heads, length, -1)
    out = self.dense(out.transpose(1, 2).flatten(2))
    return self.clover_modeling.dropout_add(out, residual, self.hidden_dropout, self.training), weights


_BART_STYLE = Style(_forward, output="out_proj", dropout="dropout")
_BERT_STYLE = Style(_forward, output=None, dropout="dropout")
_SLIDING = {"sliding_window": "sliding_window"}
_TABLE: list[tuple[str, Style]] = [
    ("LlamaAttention GemmaAttention", Style(_forward)),
    ("ViTAttention", Style(_image_forward)),
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
    (
        "OPTAttention WhisperAttention",
        Style(_forward, output="out_proj", dropout="dropout", scales_query=True),
    ),
    ("CLIPAttention SiglipAttention", Style(_image_forward, output="out_proj", dropout="dropout", scale="scale")),
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
# Modules that read the sizes of their heads from attributes of their own: key, value, and what depends on them.
_SELF_DESCRIBED = ("DeepseekV2Attention", "DeepseekV3Attention")


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
        heads = _heads(attn, hidden_states, source, keys=True)
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


def check_projections(block: AttentionBlock) -> None:
    """Raises ValueError, naming the module, if weights of a block cannot be changed: adapters, quantised ones."""
    for path in (*(block.prefix + projection for projection in block.present()), block.prefix + block.family.output):
        projection = block.model.get_submodule(path)
        if type(projection) not in (nn.Linear, Conv1D):
            raise ValueError(
                f"{path}: expected nn.Linear or Conv1D, found {type(projection).__name__}; prune before adapters are "
                "added or weights quantised"
            )


def check_supported(block: AttentionBlock) -> None:
    """Raises ValueError, naming the module, if the block cannot be made narrow."""
    module: Any = block.modules[0]
    stock = _stock_class(module)
    owner = stock.__module__.partition(".")[0]
    known = {"transformers": (*STYLES, *_SELF_DESCRIBED), "diffusers": ("Attention",)}
    # A class of the same name in a model's own remote code may do anything.
    if stock.__name__ not in known.get(owner, ()):
        raise ValueError(
            f"{block.path}: expected attention that can be made narrow, found {stock.__name__} of {stock.__module__}; "
            "pass masked=True, which zeroes directions and keeps all shapes; those that can are "
            f"{', '.join(sorted(known['transformers']))}, and diffusers' Attention"
        )
    if getattr(module, "slow_but_exact", False) and module.pretraining_tp > 1:
        raise ValueError(f"{block.path}: expected an output projection in one piece, found slow_but_exact; unset it")
    if "forward" in vars(module):
        raise ValueError(
            f"{block.path}: expected a module whose forward is its class's, found one that hooks have replaced (by a "
            "device_map?); call accelerate.hooks.remove_hook_from_submodules(model) first, or load without device_map"
        )
    processor = type(getattr(module, "processor", None)).__name__
    if owner == "diffusers" and processor not in ("AttnProcessor", "AttnProcessor2_0", "NarrowAttnProcessor"):
        raise ValueError(
            f"{block.path}: expected diffusers' plain attention processor, found {processor}; call "
            "set_default_attn_processor() first"
        )


def _stock_class(module: nn.Module) -> type[nn.Module]:
    """The class of an attention module, of a narrow one that which it was made from."""
    return getattr(type(module), "clover_stock", type(module))


def narrow(block: AttentionBlock, key_width: int, value_width: int, output_bias: bool) -> None:
    """Give the heads of an attention block other widths. The projections are new, with weights yet to be filled.

    Args:
        block: one that `check_supported` does not refuse.
        key_width: dimensions of a query and key head, with those that are rotated.
        value_width: dimensions of a value head.
        output_bias: whether the output projection is to have a bias.
    """
    module: Any = block.modules[0]
    widths = {"q": key_width, "k": key_width, "v": value_width}
    if type(module).__name__ in _SELF_DESCRIBED:
        widths["q"] += module.qk_rope_head_dim
    projections = []
    for name in block.present():
        slices, by_head = block.layout(block.prefix + name, name), block.layout_of(name).order == "head"
        parts = tuple(Part(part, heads.count, widths[part]) for part, heads in slices.items())
        projections.append(Projection(name.rpartition(".")[2], parts, by_head))
    for name, projection in zip(block.present(), projections, strict=True):
        features = sum(part.count * part.width for part in projection.parts)
        _replace(block.model, block.prefix + name, out_features=features)
    heads = next(part.count for projection in projections for part in projection.parts if part.name == "q")
    _replace(block.model, block.prefix + block.family.output, heads * value_width, bias=output_bias)
    if type(module).__name__ in _SELF_DESCRIBED:
        module.qk_nope_head_dim, module.v_head_dim = key_width, value_width
        module.qk_head_dim = key_width + module.qk_rope_head_dim
        return
    setattr(module, WIDTHS, (key_width, value_width))
    module.clover_projections = tuple(projections)
    if hasattr(module, "set_processor"):
        module.set_processor(NarrowAttnProcessor())
    else:
        module.__class__ = _narrow_class(type(module))  # type: ignore[arg-type]  # a class is hashable


@functools.cache
def _narrow_class(stock: Any) -> type[nn.Module]:
    """A subclass of an attention class with the forward of its narrow form; narrow ones as they are."""
    if hasattr(stock, "clover_style"):
        return stock
    style = STYLES[stock.__name__]
    namespace = {
        "forward": style.forward,
        "clover_stock": stock,
        "clover_style": style,
        "clover_modeling": sys.modules[stock.__module__],
        "__module__": __name__,
        "__reduce_ex__": lambda self, protocol: (_new, (stock,), vars(self)),  # no name leads to this class
    }
    return type(f"Narrow{stock.__name__}", (stock,), namespace)


def _new(stock: type[nn.Module]) -> nn.Module:
    """A narrow module without content, for copies and pickles."""
    made = _narrow_class(stock)  # type: ignore[arg-type]
    return made.__new__(made)


def _replace(
    model: nn.Module,
    path: str,
    in_features: int | None = None,
    out_features: int | None = None,
    bias: bool | None = None,
) -> None:
    """Put a projection of other sizes, yet to be filled, in place of one: of the same class, dtype and device. One
    that has these sizes stays."""
    old: Any = model.get_submodule(path)
    weight = old.weight
    sizes = (old.nx, old.nf) if isinstance(old, Conv1D) else (old.in_features, old.out_features)
    read, written = in_features or sizes[0], out_features or sizes[1]
    has_bias = old.bias is not None if bias is None else bias
    if (read, written, has_bias) == (*sizes, old.bias is not None):
        return
    with torch.device("meta"):  # nothing is drawn at random
        new: Any = Conv1D(written, read) if isinstance(old, Conv1D) else nn.Linear(read, written, bias=has_bias)
    new = new.to(weight.dtype).to_empty(device=weight.device)
    for name, parameter in new.named_parameters():
        like = getattr(old, name)
        parameter.requires_grad_(weight.requires_grad if like is None else like.requires_grad)
    new.train(old.training)
    model.set_submodule(path, new)


def padded_width(block: AttentionBlock, kind: str, most: int) -> int:
    """The directions that all heads of a block are given room for when one keeps this many: at least one; an even
    number where DeepSeek-V2 turns pairs of features behind them."""
    if kind == "qk" and type(block.modules[0]).__name__ == "DeepseekV2Attention":
        return max(2, most + most % 2)
    return max(1, most)


@torch.no_grad()
def become_stock(model: Any, blocks: Mapping[str, AttentionBlock]) -> bool:
    """Where all blocks describe their heads themselves and have the same widths, enter these in the model's config, so
    that the model is one of its own class with nothing to record.

    The class derives the softmax scale from the widths: queries are rescaled to keep the product as it was.

    Args:
        model: the model.
        blocks: all its attention blocks by path.

    Returns:
        Whether it was possible.
    """
    described = all(type(block.modules[0]).__name__ in _SELF_DESCRIBED for block in blocks.values())
    config: Any = getattr(model, "config", None)
    own = all(block.config is config for block in blocks.values())  # not a part of a larger model
    if not described or not own or len({widths(block) for block in blocks.values()}) != 1:
        return False
    (key_width, value_width), before = widths(next(iter(blocks.values()))), config.qk_head_dim
    config.qk_nope_head_dim, config.v_head_dim = key_width, value_width
    config.qk_head_dim = key_width + config.qk_rope_head_dim
    factor = (config.qk_head_dim / before) ** 0.5
    for block in blocks.values():
        module: Any = block.modules[0]
        query = module.q_proj if module.q_proj is not None else module.q_b_proj
        query.weight.mul_(factor)
        module.scaling /= factor
    return True


def write_record(model: Any, record: Mapping[str, Any]) -> None:
    """Enter how a model was pruned in its config, which no longer names a base that adapters could be loaded onto."""
    name = getattr(model, "name_or_path", "")
    if name and hasattr(model, "config") and not name.endswith(")"):
        model.name_or_path = f"{name} (pruned: save it, and load it from there)"
        model.config._name_or_path = model.name_or_path
    if hasattr(model, "register_to_config"):
        model.register_to_config(**{RECORD: dict(record)})
    else:
        setattr(model.config, RECORD, dict(record))


def read_record(model: Any) -> dict[str, Any] | None:
    """How a model was pruned, from its config; None if it was not.

    Raises:
        ValueError: if the entry is none that `prune` writes.
    """
    config = getattr(model, "config", None)
    record = config.get(RECORD) if isinstance(config, Mapping) else getattr(config, RECORD, None)
    if record is None:
        return None
    if not isinstance(record, dict) or record.get("version") != VERSION:
        version = record.get("version") if isinstance(record, dict) else record
        raise ValueError(
            f"{RECORD} in the config: expected version {VERSION}, found {version!r}; use the clover_peft that the "
            "model was pruned with"
        )
    blocks = record.get("blocks")
    if not isinstance(blocks, dict) or not isinstance(record.get("steps"), list):
        raise ValueError(f"{RECORD} in the config: expected blocks and steps, found {sorted(record)}")
    for path, entry in blocks.items():
        kinds = [type(figure) for figure in entry] if isinstance(entry, (list, tuple)) else None
        if kinds != [int, int, bool] or min(entry[:2]) < 1:
            raise ValueError(
                f"{RECORD} in the config: {path}: expected two widths and whether there is a bias, found {entry!r}"
            )
    return record


def relative_base(model: nn.Module) -> nn.Module:
    """The trunk of a model, which it shares with models of other heads; itself if it is one."""
    return getattr(model, "base_model", model)


def relative_prefix(model: nn.Module) -> str:
    """The prefix of the paths in a model's trunk, "" where it is the trunk itself."""
    base = relative_base(model)
    name = next((name for name, module in model.named_modules() if module is base), "")
    return f"{name}." if name else ""


def apply_record(model: nn.Module) -> None:
    """Make the attention blocks narrow that the model's config says are. Those that are narrow, or that this part of
    the model does not have, are left alone."""
    record = read_record(model)
    if record and record.get("tower") not in (None, type(model).__name__):
        return
    prefix = relative_prefix(model) if record else ""
    for path, (key_width, value_width, output_bias) in (record or {}).get("blocks", {}).items():
        place = next((p for p in (path, prefix + path) if has_module(model, p)), None)
        block = None if place is None else _block_at(model, place)
        if block is None:
            continue
        there = (*widths(block), block.module_of(block.family.output).bias is not None)
        if there == (key_width, value_width, output_bias):
            continue
        check_supported(block)
        narrow(block, key_width, value_width, output_bias)


def widths(block: AttentionBlock) -> tuple[int, int]:
    """Dimensions of a key head, without the rotated ones that MLA has apart, and of a value head."""
    path = block.prefix + block.present()[0]
    return block.dim("k", path), block.dim("v", path)


def _block_at(model: nn.Module, path: str) -> AttentionBlock | None:
    """The attention block whose module is at `path`."""
    children = (name for name, _ in model.get_submodule(path).named_children())
    found = (attention_block(model, f"{path}.{name}") for name in children)
    return next((block for block in found if block is not None and block.path == path), None)


def install() -> None:
    """Let transformers and diffusers load pruned models; once."""
    if not getattr(PreTrainedModel.post_init, "clover", False):
        post_init = PreTrainedModel.post_init

        @functools.wraps(post_init)
        def narrow_first(self: PreTrainedModel) -> None:
            apply_record(self)
            post_init(self)

        narrow_first.clover = True  # type: ignore[attr-defined]
        PreTrainedModel.post_init = narrow_first
    if importlib.util.find_spec("diffusers") is None:
        return
    try:
        from diffusers.configuration_utils import ConfigMixin
    except (ImportError, RuntimeError):  # installed and broken: no reason to fail for those who do not use it
        return
    mixin: Any = ConfigMixin
    if not getattr(mixin.from_config, "clover", False):
        from_config = mixin.from_config.__func__

        @functools.wraps(from_config)
        def and_narrow(cls: type, config: Any = None, *args: Any, **kwargs: Any) -> Any:
            record = config.get(RECORD) if isinstance(config, Mapping) else None
            result = from_config(cls, config, *args, **kwargs)
            if record:
                model = result[0] if isinstance(result, tuple) else result
                write_record(model, record)
                apply_record(model)
            return result

        and_narrow.clover = True  # type: ignore[attr-defined]
        mixin.from_config = classmethod(and_narrow)
