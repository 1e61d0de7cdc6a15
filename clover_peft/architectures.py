"""Where the heads are: `HeadSlice`, one table of architecture facts, and `resolve`, which reads them off a model.

The table is data. A family names its projections, the parts each of them computes, and what happens between query and
key; everything countable (head size, number of heads, rotated dimensions) is read from the module and its config.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class HeadSlice:
    """Features of a projection that belong to heads.

    Feature `start + (i // inner) * stride + offset + (i % inner) * inner_stride + j` is coordinate j of head i: a
    shard of `inner` heads every `stride` features. With `inner` 1 that is `start + i * stride + offset + j`.

    Attributes:
        start: first feature of the region.
        count: number of heads.
        stride: features from one shard to the next.
        offset: first coordinate of a shard's first head inside the stride.
        dim: coordinates per head.
        inner: heads in a shard.
        inner_stride: features from one head of a shard to the next; 0 where a shard is one head.
    """

    start: int
    count: int
    stride: int
    offset: int
    dim: int
    inner: int = 1
    inner_stride: int = 0

    @classmethod
    def plain(cls, count: int, dim: int, start: int = 0) -> HeadSlice:
        """`count` adjacent heads of `dim` features from `start` on."""
        return cls(start, count, dim, 0, dim)

    @property
    def features(self) -> int:
        """Number of features in the slice, `count * dim`."""
        return self.count * self.dim

    @property
    def stop(self) -> int:
        """One past the last feature of the region."""
        return self.start + self.count // self.inner * self.stride

    def part(self, offset: int, dim: int) -> HeadSlice:
        """The coordinates `offset ... offset + dim` of every head."""
        return replace(self, offset=self.offset + offset, dim=dim)

    def covers(self, features: int) -> bool:
        """Whether the slice is every one of `features` features, in order."""
        return self.start == 0 and self.offset == 0 and self.dim == self.stride and self.features == features

    def indices(self) -> list[int]:
        """The features, head by head."""
        firsts = (
            self.start + i // self.inner * self.stride + self.offset + i % self.inner * self.inner_stride
            for i in range(self.count)
        )
        return [first + j for first in firsts for j in range(self.dim)]

    def heads(self, x: Tensor) -> Tensor:
        """A view of `x` (..., features): (..., count, dim), or (..., count // inner, inner, dim) where shards have
        several heads."""
        region = x[..., self.start : self.stop].unflatten(-1, (-1, self.stride))
        if self.inner == 1:
            return region[..., self.offset : self.offset + self.dim]
        last = self.offset + (self.inner - 1) * self.inner_stride + self.dim
        return region[..., self.offset : last].unfold(-1, self.dim, self.inner_stride)

    def blocks(self, x: Tensor, size: int) -> Tensor:
        """(..., count * dim // size, size): the heads of `x` (..., features) split into, or joined to, blocks.

        A block of `size` features splits a head when it divides `dim`, and joins neighbours when `dim` divides it.
        """
        heads = x if self.covers(x.shape[-1]) else self.heads(x)
        return heads.reshape(*x.shape[:-1], self.features // size, size)

    def has_views(self, size: int) -> bool:
        """Whether `blocks` is a view of a contiguous `x`: its blocks lie at equal distances, each in one piece."""
        if self.inner > 1:
            return size == self.dim and self.stride == self.inner * self.inner_stride
        return size == self.dim or self.dim == self.stride


@dataclass(frozen=True)
class Partner:
    """The projection that meets the wrapped one inside a head.

    Attributes:
        path: module path, relative to the model.
        heads: its features; a multiple of the wrapped slice's heads under grouped-query attention.
        reads: True if it reads the heads (output projection: its input features), False if it writes heads that meet
            the wrapped ones in a dot product (query: its output features).
    """

    path: str
    heads: HeadSlice
    reads: bool


@dataclass(frozen=True)
class TargetSlice:
    """One slice of a target module and how it is to be treated.

    Attributes:
        name: "weight" if it is the target's only slice, else the part's name ("k", "k_rotary", "v", ...).
        part: what it computes: "q" (heads without a partner), "k", "k_rotary", "v", "up" or "linear" (no heads).
        heads: its features.
        partner: the projection it is paired with, or None for an intra-layer map.
    """

    name: str
    part: str
    heads: HeadSlice
    partner: Partner | None = None


@dataclass(frozen=True)
class If:
    """A fact that depends on the model: `then` if the attribute of an attention module or its config is true.

    Attributes:
        attribute: its name; missing counts as false.
        then: the fact if it is true; may depend on another attribute.
        otherwise: the fact if it is not.
    """

    attribute: str
    then: str | If
    otherwise: str | If


@dataclass(frozen=True)
class Family:
    """Facts about one architecture. Module names are suffixes of module paths; those of one attention block share the
    path before the suffix.

    Attributes:
        projections: module name -> how its features are laid out. "q k v": all heads of one part after those of the
            other; "q|k|v": head by head; "q*|k|v": for every key-value head its query heads, its key, its value;
            "4 x q v k": four shards, in each some heads of every part. "gate" is multiplied onto the attention's
            output. A part that a projection listed earlier computes in the same block (GPT-2's cross-attention has a
            `q_attn`) is absent from the later one.
        output: module name of the projection that reads the attention output.
        up: module name -> the parts of an up-projection ("up", or "gate up" where it is fused with the gate).
        positions: what sits between query and key: "rotary" (all dimensions), "partial" (the first rotated
            dimensions only), "decoupled" (query heads end in rotated dimensions that the key projection does not
            have), "disentangled" (query and key also meet projected positions, each on its own), "none" (absolute,
            ALiBi or relative-bias positions, which leave the product of query and key alone).
        head_dim: attribute that holds the dimensions of a key head.
        value_dim: attribute that holds the dimensions of a value head.
        key_value_heads: attribute that holds the number of key-value heads.
        heads: attribute that holds the number of query heads.
        between: "v" or "k" -> what else stands between it and its partner: "norm", "clip", "stream" (of tokens that
            attend along), "other" (features that the same projection reads) or "nothing". What a user reads before
            there is a model; `resolve` finds it on the modules themselves.
    """

    projections: dict[str, str | If]
    output: str
    up: dict[str, str]
    positions: str | If
    head_dim: str = "head_dim"
    value_dim: str | None = None
    key_value_heads: str = "num_key_value_heads"
    heads: str = "num_attention_heads"
    between: dict[str, str | If] = field(default_factory=dict)

    @property
    def target_modules(self) -> list[str]:
        """Default targets: the modules that compute key, value or up-projection."""
        wanted = [name for name, layout in self.projections.items() if {"k", "v"} & _any_parts(layout)]
        return wanted + list(self.up)


# What stands between a projection and its partner in some models: names of modules of an attention block. A norm of
# query or key parts the two; whatever else touches the heads' values parts value and output.
_QUERY_KEY_NORMS = ("q_norm", "k_norm", "qk_norm", "q_layernorm", "k_layernorm", "norm_q", "norm_k")
_VALUE_NORMS = ("v_norm", "attn_sub_norm")
# A second stream that attends together with the first, through projections and an output of its own, parts both.
_SECOND_STREAM = ("add_k_proj",)
# The attribute that clamps query, key and value where it is set.
_CLAMP = "clip_qkv"
# Attributes that count the rotated dimensions of a partially rotated head.
_ROTARY_DIMS = ("rotary_ndims", "rotary_dim")


def _any_parts(layout: str | If) -> set[str]:
    """The parts that a layout may have, whatever it depends on."""
    if isinstance(layout, If):
        return _any_parts(layout.then) | _any_parts(layout.otherwise)
    return set(_Layout.read(layout).parts)


@dataclass(frozen=True)
class _Layout:
    """A layout in words, taken apart: `parts` in order, `order` "all" (each part once, for all heads), "head" (again
    for every key-value head), or the number of shards; `grouped` if a shard holds a query group."""

    parts: tuple[str, ...]
    order: str | int
    grouped: bool = False

    @classmethod
    def read(cls, layout: str) -> _Layout:
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
_BART = replace(_LLAMA, output="out_proj", up={"fc1": "up"}, positions="none")
_VIT = replace(_LLAMA, up={"mlp.fc1": "up"}, positions="none")
_BERT = Family(
    projections={"self.query": "q", "self.key": "k", "self.value": "v"},
    output="output.dense",
    up={"intermediate.dense": "up"},
    positions="none",
    head_dim="attention_head_size",
)
_DIFFUSERS = Family(
    projections={
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "add_q_proj": "q",
        "add_k_proj": "k",
        "add_v_proj": "v",
    },
    output="to_out.0",
    up={"ff.net.0.proj": "up gate"},
    positions="none",
    heads="heads",
)
_GPT2 = Family(
    projections={"q_attn": "q", "c_attn": "q k v"},
    output="c_proj",
    up={"c_fc": "up"},
    positions="none",
)
_GPT_NEOX = Family(
    projections={"query_key_value": "q|k|v"},
    output="dense",
    up={"dense_h_to_4h": "up"},
    positions="partial",
)
_GPTJ = replace(_LLAMA, output="out_proj", up={"fc_in": "up"}, positions="partial")
_QWEN_VISION = Family(projections={"attn.qkv": "q k v"}, output="attn.proj", up={"mlp.fc1": "up"}, positions="rotary")

# The one table of architecture facts: families, and the `config.model_type` of the (sub)models that belong to them.
_TABLE: list[tuple[str, Family]] = [
    # Decoders.
    (
        "llama mistral ministral3 gemma gemma2 gemma3_text qwen2 qwen3 granite cohere olmo2 olmo3 exaone4 ernie4_5 "
        "seed_oss helium arcee mllama_text_model qwen2_vl_text qwen2_5_vl_text qwen3_vl_text qwen2_moe qwen3_moe "
        "internlm3",
        _LLAMA,
    ),
    ("gemma3n_text bitnet", replace(_LLAMA, between={"v": "norm"})),
    ("olmo", replace(_LLAMA, between={"v": _CLIPPED})),
    ("mixtral gpt_oss granitemoe", replace(_LLAMA, up={})),  # experts are stacks of matrices, no modules
    ("olmoe", replace(_LLAMA, up={}, between={"v": _CLIPPED})),
    ("qwen3_next", replace(_LLAMA, projections={**_LLAMA.projections, "q_proj": "q|gate"})),
    ("cohere2", replace(_LLAMA, positions=If("sliding_window", "rotary", "none"))),
    (
        "dbrx",  # whose attention does not run without clip_qkv
        Family(projections={"Wqkv": "q k v"}, output="out_proj", up={}, positions="rotary", between={"v": "clip"}),
    ),
    ("smollm3 llama4_text", replace(_LLAMA, positions=If("use_rope", "rotary", "none"))),
    ("starcoder2", replace(_LLAMA, up={"c_fc": "up"})),
    ("nemotron", replace(_LLAMA, positions="partial")),
    ("stablelm", replace(_LLAMA, positions="partial", between={"k": _NORMED})),
    ("phi", replace(_LLAMA, output="dense", up={"fc1": "up"}, positions="partial", between={"k": _NORMED})),
    ("glm glm4", replace(_LLAMA, up={"gate_up_proj": "gate up"}, positions="partial")),
    ("phi3", replace(_LLAMA, projections={"qkv_proj": "q k v"}, up={"gate_up_proj": "gate up"}, positions="partial")),
    ("gptj", _GPTJ),
    ("codegen", replace(_GPTJ, projections={"qkv_proj": "4 x q v k"})),
    ("gpt_neo", replace(_BART, up={"c_fc": "up"})),
    ("gpt2", _GPT2),
    (
        "gpt_bigcode",
        replace(
            _GPT2,
            projections={"q_attn": "q", "c_attn": If("multi_query", "q k v", "q|k|v")},
            key_value_heads="kv_heads",
        ),
    ),
    ("gpt_neox", replace(_GPT_NEOX, head_dim="head_size")),
    ("persimmon", replace(_GPT_NEOX, between={"k": _NORMED})),
    ("bloom", replace(_GPT_NEOX, positions="none")),
    (
        "falcon",
        replace(
            _GPT_NEOX,
            projections={
                "query_key_value": If("new_decoder_architecture", "q*|k|v", If("multi_query", "q k v", "q|k|v"))
            },
            positions=If("alibi", "none", "rotary"),
            key_value_heads="num_kv_heads",
        ),
    ),
    (
        "mpt",
        Family(
            projections={"Wqkv": "q k v"},
            output="out_proj",
            up={"ffn.up_proj": "up"},
            positions="none",
            between={"v": _CLIPPED, "k": _CLIPPED},
        ),
    ),
    (
        "deepseek_v2 deepseek_v3",
        Family(
            projections={"q_proj": "q", "q_b_proj": "q", "kv_b_proj": "k|v"},
            output="o_proj",
            up={"up_proj": "up"},
            positions="decoupled",
            head_dim="qk_nope_head_dim",
            value_dim="v_head_dim",
        ),
    ),
    # Encoders.
    ("bert roberta xlm-roberta xlm-roberta-xl camembert electra data2vec-text", _BERT),
    (
        "albert",
        replace(
            _BERT,
            projections={"attention.query": "q", "attention.key": "k", "attention.value": "v"},
            output="attention.dense",
            up={"ffn": "up"},
        ),
    ),
    (
        "distilbert",
        replace(
            _BERT, projections={"q_lin": "q", "k_lin": "k", "v_lin": "v"}, output="out_lin", up={"ffn.lin1": "up"}
        ),
    ),
    ("mpnet", replace(_BERT, projections={"attn.q": "q", "attn.k": "k", "attn.v": "v"}, output="attn.o")),
    (
        "deberta",
        replace(
            _BERT,
            projections={"self.in_proj": "q|k|v"},
            positions=If("relative_attention", "disentangled", "none"),
        ),
    ),
    (
        "deberta-v2",
        replace(
            _BERT,
            projections={"self.query_proj": "q", "self.key_proj": "k", "self.value_proj": "v"},
            # Where positions go through the same two projections, all that meets is a query and a key.
            positions=If("relative_attention", If("share_att_key", "none", "disentangled"), "none"),
        ),
    ),
    (
        "modernbert",
        Family(projections={"attn.Wqkv": "q k v"}, output="attn.Wo", up={"mlp.Wi": "gate up"}, positions="rotary"),
    ),
    # Decoders and encoder-decoders with Bart's names.
    ("opt biogpt whisper bart mbart pegasus marian m2m_100 blenderbot plbart", _BART),
    (
        "t5 mt5 umt5",
        Family(
            projections={"q": "q", "k": "k", "v": "v"},
            output="o",
            up={"wi": "up", "wi_1": "up"},
            positions="none",
            head_dim="key_value_proj_dim",
        ),
    ),
    # Vision, audio, and the towers of multimodal models.
    ("vit swin mllama_vision_model", _VIT),
    ("dinov2", replace(_VIT, up={"mlp.fc1": "up", "mlp.up_proj": "up"})),
    (
        "clip_text_model clip_vision_model siglip_text_model siglip_vision_model siglip2_text_model "
        "siglip2_vision_model",
        _BART,
    ),
    ("wav2vec2 hubert", replace(_BART, up={"feed_forward.intermediate_dense": "up"})),
    ("qwen2_vl_vision", _QWEN_VISION),
    ("qwen2_5_vl_vision", replace(_QWEN_VISION, up={"mlp.up_proj": "up"})),
    ("qwen3_vl_vision", replace(_QWEN_VISION, up={"mlp.linear_fc1": "up"})),
    # Diffusers' models have no model type and go by their class.
    ("Transformer2DModel", _DIFFUSERS),  # of which the UNets of Stable Diffusion and SDXL are made
    (
        "SD3Transformer2DModel",
        replace(
            _DIFFUSERS,
            up={"ff.net.0.proj": "up", "ff_context.net.0.proj": "up"},
            between={
                "v": If("added_kv_proj_dim", "stream", "nothing"),
                "k": If("added_kv_proj_dim", "stream", If("norm_q", "norm", "nothing")),
            },
        ),
    ),
    (
        "FluxTransformer2DModel",
        replace(
            _DIFFUSERS,
            up={"ff.net.0.proj": "up", "ff_context.net.0.proj": "up", "proj_mlp": "up"},
            positions="rotary",
            between={"v": If("added_kv_proj_dim", "stream", "other")},
        ),
    ),
]
# Model type -> family. A row that is added here counts from then on.
FAMILIES: dict[str, Family] = {model_type: family for types, family in _TABLE for model_type in types.split()}


def default_targets(model: nn.Module) -> dict[str, str]:
    """The modules of known families that compute key, value or up-projection.

    Args:
        model: any model; the towers of a multimodal one are told apart by their configs.

    Returns:
        Module path -> its name in the table. Empty if no part of the model is known.
    """
    found = {}
    for path, module in model.named_modules():
        if path and _is_projection(base_of(module)):
            family = family_of(model, path)
            name = None if family is None else _suffix(path, family.target_modules)
            if name is not None:
                found[path] = name
    return found


def resolve(
    model: nn.Module, path: str, *, head_dim: int | None = None, num_heads: int | None = None, described: bool = False
) -> tuple[TargetSlice, ...]:
    """The slices of the target at `path`.

    Args:
        model: the model the path is relative to.
        path: module path of an `nn.Linear`, a `Conv1D` or a tuner layer around one.
        head_dim: output features of a head; where the table knows the model it must agree.
        num_heads: heads of this module; only for a model that the table does not know.
        described: the caller says how to cut a module of an unknown family (by a block size).

    Returns:
        The slices that get a map. An up-projection or a module of no particular part is one "head" as wide as its
        output, which the caller cuts into blocks.

    Raises:
        ValueError: for a family that the table does not know, or sizes that do not fit the module.
        TypeError: if the module is no linear projection.
    """
    module = base_of(model.get_submodule(path))
    features = out_features(module, path)
    family, model_type, config = _owner_of(model, path)
    if family is None:
        if head_dim is not None or num_heads is not None:
            return (TargetSlice("weight", "q", _by_override(path, features, head_dim, num_heads)),)
        if model_type is not None and not described and not _wraps_known_models(model, path):
            raise ValueError(unknown_family_message(model_type, path))
        return (TargetSlice("weight", "linear", HeadSlice.plain(1, features)),)

    if num_heads is not None:
        raise ValueError(
            f"{path}: num_heads describes models that the table of architectures does not know, but {model_type!r} is "
            "in it; leave num_heads out"
        )
    if (name := _suffix(path, family.up)) is not None:
        parts = _Layout.read(family.up[name]).parts
        size = features // len(parts)
        return (TargetSlice("weight", "up", HeadSlice.plain(1, size, start=size * parts.index("up"))),)
    if (name := _suffix(path, family.projections)) is None:
        return (TargetSlice("weight", "linear", HeadSlice.plain(1, features)),)

    attention = AttentionBlock(model, path.removesuffix(name), family, config, head_dim)
    layout = attention.layout(path, name)
    slices: list[TargetSlice] = []
    adapted = [part for part in layout if part in ("k", "v")] or ["q"]
    for part in adapted:
        slices.extend(attention.slices(part, layout[part]))
    if len(slices) == 1:
        slices = [replace(slices[0], name="weight")]
    return tuple(slices)


# The attribute of an attention block whose heads were made narrower: dimensions of a key head and of a value head.
WIDTHS = "clover_widths"


def attention_block(model: nn.Module, path: str) -> AttentionBlock | None:
    """The attention block that the projection at `path` belongs to; None if the table does not know it as one."""
    family, _, config = _owner_of(model, path)
    name = None if family is None else _suffix(path, family.projections)
    if family is None or name is None:
        return None
    return AttentionBlock(model, path.removesuffix(name), family, config)


def attention_blocks(model: nn.Module) -> dict[str, AttentionBlock]:
    """All attention blocks of a model by the paths of their modules, those that layers share once."""
    blocks: dict[int, AttentionBlock] = {}
    for path in default_targets(model):
        if (block := attention_block(model, path)) is not None:
            blocks.setdefault(id(block.modules[0]), block)
    return {block.path: block for block in blocks.values()}


class AttentionBlock:
    """One attention block: the modules of a family under one path prefix."""

    def __init__(
        self, model: nn.Module, prefix: str, family: Family, config: Any, head_dim: int | None = None
    ) -> None:
        self.model, self.prefix, self.family, self.config, self.head_dim = model, prefix, family, config, head_dim
        # The block itself, and where it is another, the module right above the projections (BERT's `attention.self`).
        self.path = (prefix + self.present()[0]).rpartition(".")[0]
        self.modules = [model.get_submodule(path) for path in dict.fromkeys([self.path, prefix.rstrip(".")])]

    def present(self) -> list[str]:
        """The family's projections that this block has (DeepSeek has either `q_proj` or `q_b_proj`)."""
        return [name for name in self.family.projections if has_module(self.model, self.prefix + name)]

    def module_of(self, name: str) -> Any:
        """The projection of this name in the table."""
        return base_of(self.model.get_submodule(self.prefix + name))

    def fact(self, name: str) -> Any:
        """An attribute of the block, else of its config; None if neither has it."""
        return next((getattr(owner, name) for owner in (*self.modules, self.config) if hasattr(owner, name)), None)

    def decide(self, fact: str | If) -> str:
        """A fact of the family, for this block."""
        while isinstance(fact, If):
            fact = fact.then if self.fact(fact.attribute) else fact.otherwise
        return fact

    def has_any(self, names: tuple[str, ...]) -> bool:
        """Whether the block has a module of one of these names that does something."""
        found = [getattr(module, name, None) for module in self.modules for name in names]
        return any(isinstance(module, nn.Module) and not isinstance(module, nn.Identity) for module in found)

    def layout_of(self, name: str) -> _Layout:
        """How projection `name` is laid out in this block, without the parts that another one computes."""
        layout = _Layout.read(self.decide(self.family.projections[name]))
        if len(layout.parts) == 1:
            return layout
        present = self.present()
        elsewhere = {part for other in present[: present.index(name)] for part in self.layout_of(other).parts}
        return replace(layout, parts=tuple(part for part in layout.parts if part not in elsewhere))

    def read(self, name: str, path: str) -> int:
        """An integer fact, from the attention module, else from the config."""
        value = self.fact(name)
        if isinstance(value, int):
            return value
        raise ValueError(
            f"{path}: expected the attribute {name!r} on its attention module or config, found none; "
            "pass head_dim=... or num_heads=... with target_modules=[...]"
        )

    def layout(self, path: str, name: str) -> dict[str, HeadSlice]:
        """Part -> its whole heads in the module at `path`, whose name in the table is `name`."""
        layout = self.layout_of(name)
        features = out_features(base_of(self.model.get_submodule(path)), path)
        dims = {part: self.dim(part, path) for part in layout.parts}
        if layout.order == "all":
            counts = {part: self.count(part, path, layout.parts, features, dims) for part in layout.parts}
            sizes = {part: counts[part] * dims[part] for part in layout.parts}
            if sum(sizes.values()) != features:
                raise ValueError(
                    f"{path}: expected {sum(sizes.values())} output features ({' + '.join(map(str, sizes.values()))} "
                    f"for {', '.join(layout.parts)}), found {features}; pass head_dim=... or num_heads=... with "
                    "target_modules=[...]"
                )
            starts = _running(sizes)
            return {part: HeadSlice.plain(counts[part], dims[part], starts[part]) for part in layout.parts}
        # Shards that hold `inner` heads of every part.
        inner = dict.fromkeys(layout.parts, 1)
        if layout.grouped:
            inner["q"] = self.heads(path) // self.key_value_heads(path)
        elif isinstance(layout.order, int):
            inner = dict.fromkeys(layout.parts, self.heads(path) // layout.order)
        sizes = {part: inner[part] * dims[part] for part in layout.parts}
        stride = sum(sizes.values())
        shards = _divide(path, features, stride, "the heads' features " + "+".join(map(str, sizes.values())))
        offsets = _running(sizes)
        return {
            part: HeadSlice(
                0,
                shards * inner[part],
                stride,
                offsets[part],
                dims[part],
                inner[part],
                dims[part] if inner[part] > 1 else 0,
            )
            for part in layout.parts
        }

    def dim(self, part: str, path: str) -> int:
        """Coordinates of one head of `part`."""
        if (widths := self.fact(WIDTHS)) is not None:
            return widths[part == "v"]
        if part == "v" and self.family.value_dim is not None:
            return self.read(self.family.value_dim, path)
        if self.fact(self.family.head_dim) is None and isinstance(self.fact(self.family.heads), int):
            query = next(self.prefix + name for name in self.present() if "q" in self.layout_of(name).parts)
            dim = out_features(base_of(self.model.get_submodule(query)), query) // self.heads(path)
        else:
            dim = self.read(self.family.head_dim, path)
        if self.head_dim not in (None, dim):
            raise ValueError(
                f"{path}: expected head_dim={dim}, which this model's heads have, found head_dim={self.head_dim}; "
                "leave it out, or split or join heads with block_size"
            )
        if part == "q" and self.family.positions == "decoupled":
            dim += self.read("qk_rope_head_dim", path)
        return dim

    def heads(self, path: str) -> int:
        """Number of query heads."""
        return self.read(self.family.heads, path)

    def key_value_heads(self, path: str) -> int:
        """Number of key-value heads; those of the query where the model does not count them apart."""
        value = self.fact(self.family.key_value_heads)
        return value if isinstance(value, int) else self.heads(path)

    def count(self, part: str, path: str, parts: tuple[str, ...], features: int, dims: dict[str, int]) -> int:
        """Number of heads of `part` in a module that computes `parts` one after the other."""
        if len(parts) == 1:
            return _divide(path, features, dims[part], f"head_dim {dims[part]}")
        return self.heads(path) if part == "q" else self.key_value_heads(path)

    def cached_features(self, path: str) -> int:
        """Numbers that a cache keeps of a token: keys and values of all heads, or of Multi-head Latent Attention what
        they are computed from."""
        if self.family.positions == "decoupled":
            return self.read("kv_lora_rank", path) + self.read("qk_rope_head_dim", path)
        slices = [s for name in self.present() for s in self.layout(self.prefix + name, name).items()]
        return sum(heads.features for part, heads in slices if part in ("k", "v"))

    def slices(self, part: str, heads: HeadSlice) -> Iterator[TargetSlice]:
        """The slices of one part, with their partners by the true positions."""
        positions = self.decide(self.family.positions)
        if part == "v":
            yield TargetSlice("v", "v", heads, self.reader(heads))
        elif part == "q":
            yield TargetSlice("q", "q", heads)
        elif positions == "partial" and (rotary := self.rotary_dim(heads.dim)) < heads.dim:
            if rotary:
                yield TargetSlice("k_rotary", "k_rotary", heads.part(0, rotary))
            rest = heads.part(rotary, heads.dim - rotary)
            yield TargetSlice("k", "k", rest, self.query(rest.dim, rotary))
        elif positions in ("none", "decoupled"):
            yield TargetSlice("k", "k", heads, self.query(heads.dim, 0))
        else:
            yield TargetSlice("k", "k", heads)

    def rotary_dim(self, head_dim: int) -> int:
        """Rotated dimensions of a partially rotated head; they come first."""
        for name in _ROTARY_DIMS:
            if hasattr(self.modules[0], name):
                return getattr(self.modules[0], name) or head_dim  # None is all of them
        parameters = getattr(self.config, "rope_parameters", None) or {}
        return int(head_dim * parameters.get("partial_rotary_factor", 1.0))

    def is_gated(self) -> bool:
        """Whether a part of some projection is multiplied onto the heads' outputs."""
        return any("gate" in self.layout_of(name).parts for name in self.present())

    def reader(self, heads: HeadSlice) -> Partner | None:
        """The output projection, as the partner of the value heads; None if something stands between."""
        path = self.prefix + self.family.output
        if self.has_any((*_VALUE_NORMS, *_SECOND_STREAM)) or self.fact(_CLAMP) is not None or self.is_gated():
            return None
        if not has_module(self.model, path):  # the block above reads the heads, together with other features
            return None
        features = in_features(base_of(self.model.get_submodule(path)), path)
        count = _divide(path, features, heads.dim, f"the {heads.dim} dimensions of a value head")
        return Partner(path, HeadSlice.plain(count, heads.dim), reads=True)

    def query(self, dim: int, offset: int) -> Partner | None:
        """The coordinates `offset ... offset + dim` of the query heads, as the partner of the key's; None if something
        stands between."""
        if self.has_any((*_QUERY_KEY_NORMS, *_SECOND_STREAM)) or self.fact(_CLAMP) is not None:
            return None
        for name in self.present():
            if "q" in self.layout_of(name).parts:
                path = self.prefix + name
                return Partner(path, self.layout(path, name)["q"].part(offset, dim), reads=False)
        raise ValueError(f"{self.prefix}: found no query projection; expected one of {list(self.family.projections)}")


def base_of(module: nn.Module) -> nn.Module:
    """The projection inside tuner layers and `modules_to_save` wrappers."""
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def out_features(module: nn.Module, path: str) -> int:
    """Output features of a linear projection.

    Raises:
        TypeError: if it is none.
    """
    return _features(module, path)[1]


def in_features(module: nn.Module, path: str) -> int:
    """Input features of a linear projection.

    Raises:
        TypeError: if it is none.
    """
    return _features(module, path)[0]


def _is_projection(module: Any) -> bool:
    """Whether it is `nn.Linear`, `Conv1D` or one of the many quantised linears, whose weights have many names."""
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return isinstance(module, Conv1D) or (
        all(isinstance(size, int) for size in sizes) and not isinstance(module, (nn.Embedding, nn.MultiheadAttention))
    )


def _features(module: Any, path: str) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if not _is_projection(module):
        raise TypeError(
            f"{path}: expected a linear projection (nn.Linear, Conv1D or a quantised linear), "
            f"found {type(module).__name__}; leave it out of target_modules"
        )
    return int(module.in_features), int(module.out_features)


def unknown_family_message(model_type: str, path: str) -> str:
    """What to do about a model that the table does not know."""
    return (
        f"{path}: the model type {model_type!r} is not in clover_peft's table of architectures, so its heads cannot "
        "be found; name target_modules=[...] and describe them with head_dim=... or num_heads=... (or cut them with "
        "mlp_block_size=...), or add a row to clover_peft.architectures.FAMILIES; known: "
        + ", ".join(sorted(FAMILIES))
    )


def family_of(model: nn.Module, path: str) -> Family | None:
    """The family that the module at `path` belongs to, None if the table does not know it."""
    return _owner_of(model, path)[0]


def _owner_of(model: nn.Module, path: str) -> tuple[Family | None, str | None, Any]:
    """Family, model type and config of the nearest module above `path` whose config names a model type.

    The nearest one decides, so that the towers of a multimodal model are told apart.
    """
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        if (model_type := _type_of(module)) is not None:
            return FAMILIES.get(model_type), model_type, getattr(module, "config", None)
    return None, None, None


def _type_of(module: nn.Module) -> str | None:
    """The model type that a module's config names, a diffusers model's class; None for a module that is no model."""
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    if isinstance(model_type, str) and model_type:
        return model_type
    return type(module).__name__ if hasattr(module, "register_to_config") else None


def _wraps_known_models(model: nn.Module, path: str) -> bool:
    """Whether the model that owns `path` is a shell around models of known families (a projector joins two towers)."""
    parts = path.split(".")
    owners = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) - 1, -1, -1))
    owner = next(module for module in owners if _type_of(module) is not None)
    return any(_type_of(module) in FAMILIES for module in owner.modules())


def _suffix(path: str, names: Iterable[str]) -> str | None:
    return next((name for name in names if path == name or path.endswith("." + name)), None)


def has_module(model: nn.Module, path: str) -> bool:
    """Whether there is a module at this path."""
    try:
        return isinstance(model.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def _by_override(path: str, features: int, head_dim: int | None, num_heads: int | None) -> HeadSlice:
    if head_dim is not None:
        count = _divide(path, features, head_dim, f"head_dim {head_dim}", "pass the head_dim of this module")
        if num_heads is not None and num_heads != count:
            raise ValueError(
                f"{path}: {features} output features make {count} heads of head_dim {head_dim}, but num_heads is "
                f"{num_heads}; pass only one of the two"
            )
        return HeadSlice.plain(count, head_dim)
    assert num_heads is not None
    dim = _divide(path, features, num_heads, f"num_heads {num_heads}", "pass the num_heads of this module")
    return HeadSlice.plain(num_heads, dim)


def _divide(path: str, features: int, by: int, what: str, remedy: str = "pass head_dim=...") -> int:
    if features % by:
        raise ValueError(f"{path}: {features} features are not a multiple of {what}; {remedy}")
    return features // by


def _running(sizes: dict[str, int]) -> dict[str, int]:
    starts, total = {}, 0
    for name, size in sizes.items():
        starts[name] = total
        total += size
    return starts
