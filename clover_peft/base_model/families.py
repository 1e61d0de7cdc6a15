"""One table of architecture facts, and the lookup of a module's family.

The table is data. A family names its projections, the parts that each of them computes, and the positions between
query and key. Counts (head size, number of heads, rotated dimensions) are read from the module and its config.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class If:
    """A fact that depends on the model.

    Attributes:
        attribute: an attribute of the attention module or its config; a missing one counts as false.
        then: the fact if the attribute is true; it may depend on another attribute.
        otherwise: the fact if the attribute is false.
    """

    attribute: str
    then: str | If
    otherwise: str | If


@dataclass(frozen=True)
class Family:
    """Facts about one architecture. A module name is the end of a module's path; the projections of one attention
    block have the same path before it.

    Attributes:
        projections: module name -> the layout of its features. "q k v": all heads of q, then all of k, then all of v.
            "q|k|v": the parts of the first head, then of the next. "q*|k|v": for each key-value head its query heads,
            key and value. "4 x q v k": four shards, each with some heads of every part. "gate" multiplies the
            attention's output. If an earlier projection of the block computes a part (as `q_attn` in GPT-2's
            cross-attention), later ones do not have it.
        output: module name of the projection that reads the attention output.
        up: module name -> the parts of an up-projection: "up", or "gate up" if it is fused with the gate.
        positions: "rotary" (all dimensions are rotated), "partial" (only the first ones), "decoupled" (query heads end
            in rotated dimensions that the key projection does not have), "disentangled" (query and key also meet
            projected positions), "none" (absolute, ALiBi or relative-bias positions, which leave q k^T as a product).
        head_dim: attribute with the dimensions of a key head.
        value_dim: attribute with the dimensions of a value head.
        key_value_heads: attribute with the number of key-value heads.
        heads: attribute with the number of query heads.
        experts: parameter name (the end of its path) -> the layout of a stack of experts' weights, without the
            dimension of the experts: "in" stands for the input features, and "out", "gate up" or "gate|up"
            (interleaved) for the output features.
        between: "v" or "k" -> anything else between it and its partner: "norm", "clip", "stream" (tokens of another
            stream attend too), "other" (the output projection reads other features too) or "nothing". Modules of the
            names below count in every family.
        causal: whether a token attends to earlier ones alone, where the attention module has no `is_causal`.
    """

    projections: dict[str, str | If]
    output: str
    up: dict[str, str]
    positions: str | If
    head_dim: str = "head_dim"
    value_dim: str | None = None
    key_value_heads: str = "num_key_value_heads"
    heads: str = "num_attention_heads"
    experts: dict[str, str] = field(default_factory=dict)
    between: dict[str, str | If] = field(default_factory=dict)
    causal: bool = True

    @property
    def target_modules(self) -> list[str]:
        """Default targets: the modules that compute key, value or up-projection."""
        wanted = [name for name, layout in self.projections.items() if {"k", "v"} & _any_parts(layout)]
        return wanted + list(self.up)


# Modules of an attention block that stand between a projection and its partner, so that the two do not form a pair.
QUERY_KEY_NORMS = ("q_norm", "k_norm", "qk_norm", "q_layernorm", "k_layernorm", "norm_q", "norm_k")
VALUE_NORMS = ("v_norm", "attn_sub_norm")
# A second stream with its own projections attends together with the first; then neither kind of pair exists.
SECOND_STREAM = ("add_k_proj",)
# The attribute with the limit to which query, key and value are clamped.
CLAMP = "clip_qkv"
# Attributes that count the rotated dimensions of a partially rotated head.
ROTARY_DIMS = ("rotary_ndims", "rotary_dim")


def _any_parts(layout: str | If) -> set[str]:
    """All parts that a layout may have."""
    if isinstance(layout, If):
        return _any_parts(layout.then) | _any_parts(layout.otherwise)
    return set(Layout.read(layout).parts)


@dataclass(frozen=True)
class Layout:
    """A layout of the table, taken apart.

    Attributes:
        parts: the parts, in order.
        order: "all" (each part once, for all heads), "head" (all parts again for every key-value head), or the number
            of shards.
        grouped: each key-value head comes with all its query heads.
    """

    parts: tuple[str, ...]
    order: str | int
    grouped: bool = False

    @classmethod
    def read(cls, layout: str) -> Layout:
        if "|" in layout:
            return cls(tuple(layout.replace("*", "").split("|")), "head", "*" in layout)
        if " x " in layout:
            shards, _, parts = layout.partition(" x ")
            return cls(tuple(parts.split()), int(shards))
        return cls(tuple(layout.split()), "all")


_CLIPPED = If("clip_qkv", "clip", "nothing")
_NORMED = If("qk_layernorm", "norm", "nothing")

_LLAMA = Family(
    projections={"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    output="o_proj",
    up={"up_proj": "up"},
    positions="rotary",
)

# Stacks of experts as most families of transformers 5 have them.
_EXPERTS = {"experts.gate_up_proj": "gate up, in", "experts.down_proj": "out, in"}

_BART = replace(_LLAMA, output="out_proj", up={"fc1": "up"}, positions="none")

_VIT = replace(_LLAMA, up={"mlp.fc1": "up"}, positions="none")

_BERT = Family(
    projections={"self.query": "q", "self.key": "k", "self.value": "v"},
    output="output.dense",
    up={"intermediate.dense": "up"},
    positions="none",
    head_dim="attention_head_size",
    causal=False,
)

_DIFFUSERS = Family(
    projections={"to_q": "q", "to_k": "k", "to_v": "v", "add_q_proj": "q", "add_k_proj": "k", "add_v_proj": "v"},
    output="to_out.0",
    up={"ff.net.0.proj": "up gate"},
    positions="none",
    heads="heads",
)

_GPT2 = Family(projections={"q_attn": "q", "c_attn": "q k v"}, output="c_proj", up={"c_fc": "up"}, positions="none")

_GPT_NEOX = Family(
    projections={"query_key_value": "q|k|v"}, output="dense", up={"dense_h_to_4h": "up"}, positions="partial"
)

_GPTJ = replace(_LLAMA, output="out_proj", up={"fc_in": "up"}, positions="partial")

_QWEN_VISION = Family(projections={"attn.qkv": "q k v"}, output="attn.proj", up={"mlp.fc1": "up"}, positions="rotary")

# The one table of architecture facts: families, and the `config.model_type` of the (sub)models that belong to them.
_TABLE: dict[str, Family] = {
    # Decoders.
    (
        "llama mistral ministral3 gemma gemma2 gemma3_text qwen2 qwen3 granite cohere olmo2 olmo3 exaone4 ernie4_5 "
        "seed_oss helium arcee mllama_text_model qwen2_vl_text qwen2_5_vl_text qwen3_vl_text internlm3"
    ): _LLAMA,
    "qwen2_moe qwen3_moe": replace(_LLAMA, experts=_EXPERTS),
    "gemma3n_text bitnet": replace(_LLAMA, between={"v": "norm"}),
    "gemma4_text": replace(_LLAMA, between={"v": "norm"}, experts=_EXPERTS),
    "gemma4_vision": replace(
        _LLAMA,
        projections={"q_proj.linear": "q", "k_proj.linear": "k", "v_proj.linear": "v"},
        output="o_proj.linear",
        up={"up_proj.linear": "up"},
        between={"v": "norm"},
    ),
    "olmo": replace(_LLAMA, between={"v": _CLIPPED}),
    "mixtral granitemoe": replace(_LLAMA, up={}, experts=_EXPERTS),  # experts are stacks of matrices, no modules
    "gpt_oss": replace(_LLAMA, up={}, experts={"experts.gate_up_proj": "in, gate|up", "experts.down_proj": "in, out"}),
    "olmoe": replace(_LLAMA, up={}, between={"v": _CLIPPED}, experts=_EXPERTS),
    "qwen3_next": replace(_LLAMA, projections={**_LLAMA.projections, "q_proj": "q|gate"}),
    "cohere2": replace(_LLAMA, positions=If("sliding_window", "rotary", "none")),
    # Its attention does not run without clip_qkv.
    "dbrx": Family(projections={"Wqkv": "q k v"}, output="out_proj", up={}, positions="rotary", between={"v": "clip"}),
    "smollm3 llama4_text": replace(_LLAMA, positions=If("use_rope", "rotary", "none")),
    "starcoder2": replace(_LLAMA, up={"c_fc": "up"}),
    "nemotron": replace(_LLAMA, positions="partial"),
    "stablelm": replace(_LLAMA, positions="partial", between={"k": _NORMED}),
    "phi": replace(_LLAMA, output="dense", up={"fc1": "up"}, positions="partial", between={"k": _NORMED}),
    "glm glm4": replace(_LLAMA, up={"gate_up_proj": "gate up"}, positions="partial"),
    "phi3": replace(_LLAMA, projections={"qkv_proj": "q k v"}, up={"gate_up_proj": "gate up"}, positions="partial"),
    "gptj": _GPTJ,
    "codegen": replace(_GPTJ, projections={"qkv_proj": "4 x q v k"}),
    "gpt_neo": replace(_BART, up={"c_fc": "up"}),
    "gpt2": _GPT2,
    "gpt_bigcode": replace(
        _GPT2,
        projections={"q_attn": "q", "c_attn": If("multi_query", "q k v", "q|k|v")},
        key_value_heads="kv_heads",
    ),
    "gpt_neox": replace(_GPT_NEOX, head_dim="head_size"),
    "persimmon": replace(_GPT_NEOX, between={"k": _NORMED}),
    "bloom": replace(_GPT_NEOX, positions="none"),
    "falcon": replace(
        _GPT_NEOX,
        projections={"query_key_value": If("new_decoder_architecture", "q*|k|v", If("multi_query", "q k v", "q|k|v"))},
        positions=If("alibi", "none", "rotary"),
        key_value_heads="num_kv_heads",
    ),
    "mpt": Family(
        projections={"Wqkv": "q k v"},
        output="out_proj",
        up={"ffn.up_proj": "up"},
        positions="none",
        between={"v": _CLIPPED, "k": _CLIPPED},
    ),
    "deepseek_v2 deepseek_v3": Family(
        projections={"q_proj": "q", "q_b_proj": "q", "kv_b_proj": "k|v"},
        output="o_proj",
        up={"up_proj": "up"},
        positions="decoupled",
        head_dim="qk_nope_head_dim",
        value_dim="v_head_dim",
        experts=_EXPERTS,
    ),
    # Encoders.
    "bert roberta xlm-roberta xlm-roberta-xl camembert electra data2vec-text": _BERT,
    "albert": replace(
        _BERT,
        projections={"attention.query": "q", "attention.key": "k", "attention.value": "v"},
        output="attention.dense",
        up={"ffn": "up"},
    ),
    "distilbert": replace(
        _BERT, projections={"q_lin": "q", "k_lin": "k", "v_lin": "v"}, output="out_lin", up={"ffn.lin1": "up"}
    ),
    "mpnet": replace(_BERT, projections={"attn.q": "q", "attn.k": "k", "attn.v": "v"}, output="attn.o"),
    "deberta": replace(
        _BERT,
        projections={"self.in_proj": "q|k|v"},
        positions=If("relative_attention", "disentangled", "none"),
    ),
    "deberta-v2": replace(
        _BERT,
        projections={"self.query_proj": "q", "self.key_proj": "k", "self.value_proj": "v"},
        # Where positions go through the same two projections, all that meets is a query and a key.
        positions=If("relative_attention", If("share_att_key", "none", "disentangled"), "none"),
    ),
    "modernbert": Family(
        projections={"attn.Wqkv": "q k v"}, output="attn.Wo", up={"mlp.Wi": "gate up"}, positions="rotary"
    ),
    # Decoders and encoder-decoders with Bart's names.
    "opt biogpt whisper bart mbart pegasus marian m2m_100 blenderbot plbart": _BART,
    "t5 mt5 umt5": Family(
        projections={"q": "q", "k": "k", "v": "v"},
        output="o",
        up={"wi": "up", "wi_1": "up"},
        positions="none",
        head_dim="key_value_proj_dim",
    ),
    # Vision, audio, and the towers of multimodal models.
    "vit swin mllama_vision_model": _VIT,
    "dinov2": replace(_VIT, up={"mlp.fc1": "up", "mlp.up_proj": "up"}),
    (
        "clip_text_model clip_vision_model siglip_text_model siglip_vision_model siglip2_text_model "
        "siglip2_vision_model"
    ): _BART,
    "wav2vec2 hubert": replace(_BART, up={"feed_forward.intermediate_dense": "up"}),
    "qwen2_vl_vision": _QWEN_VISION,
    "qwen2_5_vl_vision": replace(_QWEN_VISION, up={"mlp.up_proj": "up"}),
    "qwen3_vl_vision": replace(_QWEN_VISION, up={"mlp.linear_fc1": "up"}),
    # Diffusers' models have no model type and go by their class.
    "Transformer2DModel": _DIFFUSERS,  # the transformer blocks in the UNets of Stable Diffusion and SDXL
    "SD3Transformer2DModel": replace(
        _DIFFUSERS,
        up={"ff.net.0.proj": "up", "ff_context.net.0.proj": "up"},
        between={
            "v": If("added_kv_proj_dim", "stream", "nothing"),
            "k": If("added_kv_proj_dim", "stream", If("norm_q", "norm", "nothing")),
        },
    ),
    "FluxTransformer2DModel": replace(
        _DIFFUSERS,
        up={"ff.net.0.proj": "up", "ff_context.net.0.proj": "up", "proj_mlp": "up"},
        positions="rotary",
        between={"v": If("added_kv_proj_dim", "stream", "other")},
    ),
}

# Model type -> family. A row that is added here counts from then on.
FAMILIES: dict[str, Family] = {model_type: family for types, family in _TABLE.items() for model_type in types.split()}


def unknown_family_message(model_type: str, path: str) -> str:
    """The error message for a model that the table does not know."""
    return (
        f"{path}: the model type {model_type!r} is not in clover_peft's table of architectures, so its heads cannot "
        "be found; name target_modules=[...] and describe them with head_dim=... or num_heads=... (or cut them with "
        "mlp_block_size=...), or add a row to clover_peft.base_model.families.FAMILIES; known: "
        + ", ".join(sorted(FAMILIES))
    )


def family_of(model: nn.Module, path: str) -> Family | None:
    """The family of the module at `path`; None if the table does not know it."""
    return owner_of(model, path)[0]


def owner_of(model: nn.Module, path: str) -> tuple[Family | None, str | None, Any]:
    """Family, model type and config of the nearest module above `path` whose config names a model type.

    Each tower of a multimodal model has a config of its own.
    """
    owner = _owner(model, path)
    if owner is None or (model_type := _type_of(owner)) is None:
        return None, None, None
    return FAMILIES.get(model_type), model_type, getattr(owner, "config", None)


def _owner(model: nn.Module, path: str) -> nn.Module | None:
    """The nearest module above `path` that is a model."""
    parts = path.split(".")
    above = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) - 1, -1, -1))
    return next((module for module in above if _type_of(module) is not None), None)


def _type_of(module: nn.Module) -> str | None:
    """The model type in a module's config, or the class of a diffusers model; None if the module is no model."""
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    if isinstance(model_type, str) and model_type:
        return model_type
    return type(module).__name__ if hasattr(module, "register_to_config") else None


def wraps_known_models(model: nn.Module, path: str) -> bool:
    """Whether the model that owns `path` contains models of known families, as one that joins two towers does."""
    owner = _owner(model, path)
    return owner is not None and any(_type_of(module) in FAMILIES for module in owner.modules())


def find_suffix(path: str, names: Iterable[str]) -> str | None:
    return next((name for name in names if path == name or path.endswith("." + name)), None)
