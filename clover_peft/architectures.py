"""Where the heads are: `HeadSlice`, one table of architecture facts, and `resolve`, which reads them off a model.

The table is data. A family names its projections, the parts each of them computes, and what happens between query and
key; everything countable (head size, number of heads, rotated dimensions) is read from the module and its config.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class HeadSlice:
    """Features of a projection that belong to heads.

    Feature `start + i * stride + offset + j` is coordinate j of head i.

    Attributes:
        start: first feature of the region.
        count: number of heads.
        stride: features from one head to the next.
        offset: first coordinate inside a head's stride.
        dim: coordinates per head, `offset + dim <= stride`.
    """

    start: int
    count: int
    stride: int
    offset: int
    dim: int

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
        return self.start + self.count * self.stride

    def part(self, offset: int, dim: int) -> HeadSlice:
        """The coordinates `offset ... offset + dim` of every head."""
        return replace(self, offset=self.offset + offset, dim=dim)

    def covers(self, features: int) -> bool:
        """Whether the slice is every one of `features` features, in order."""
        return self.start == 0 and self.offset == 0 and self.dim == self.stride and self.features == features

    def heads(self, x: Tensor) -> Tensor:
        """A view (..., count, dim) of `x` (..., features)."""
        region = x[..., self.start : self.stop].unflatten(-1, (self.count, self.stride))
        return region[..., self.offset : self.offset + self.dim]

    def blocks(self, x: Tensor, size: int) -> Tensor:
        """(..., count * dim // size, size): the heads of `x` (..., features) split into, or joined to, blocks.

        A block of `size` features splits a head when it divides `dim`, and joins neighbours when `dim` divides it.
        """
        heads = self.heads(x)
        return heads.reshape(*heads.shape[:-2], self.features // size, size)


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
class Family:
    """Facts about one architecture. Module names are suffixes of module paths; those of one attention block share the
    path before the suffix.

    Attributes:
        projections: module name -> the parts it computes; "q k v" lie one after the other for all heads, "q|k|v"
            repeat head by head. A part that a projection listed earlier computes in the same block (GPT-2's
            cross-attention has a `q_attn`) is absent from the later one.
        output: module name of the projection that reads the attention output.
        up: module name -> the parts of an up-projection ("up", or "gate up" where it is fused with the gate).
        positions: what sits between query and key: "rotary" (all dimensions), "partial" (the first rotated
            dimensions only), "decoupled" (query heads end in rotated dimensions that the key projection does not
            have), "none" (absolute or relative-bias positions, which leave the product of query and key alone).
        qk_norm: query or key is normalised after projection, so that they cannot be paired.
        head_dim: attribute that holds the dimensions of a key head.
        value_dim: attribute that holds the dimensions of a value head.
    """

    projections: dict[str, str]
    output: str
    up: dict[str, str]
    positions: str
    qk_norm: bool = False
    head_dim: str = "head_dim"
    value_dim: str | None = None

    @property
    def target_modules(self) -> list[str]:
        """Default targets: the modules that compute key, value or up-projection."""
        wanted = [name for name, parts in self.projections.items() if {"k", "v"} & set(_split(parts)[0])]
        return wanted + list(self.up)


def _split(parts: str) -> tuple[list[str], bool]:
    """The parts, and whether they are interleaved head by head."""
    return (parts.split("|"), True) if "|" in parts else (parts.split(), False)


_LLAMA = Family(
    projections={"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    output="o_proj",
    up={"up_proj": "up"},
    positions="rotary",
)
_LLAMA_QK_NORM = replace(_LLAMA, qk_norm=True)
_BART = replace(_LLAMA, output="out_proj", up={"fc1": "up"}, positions="none")
_DEEPSEEK = Family(
    projections={"q_proj": "q", "q_b_proj": "q", "kv_b_proj": "k|v"},
    output="o_proj",
    up={"up_proj": "up"},
    positions="decoupled",
    head_dim="qk_nope_head_dim",
    value_dim="v_head_dim",
)

# The one table of architecture facts: `config.model_type` of the (sub)model that owns a module -> its family.
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA_QK_NORM,
    "gemma2": _LLAMA,
    "gemma3": _LLAMA_QK_NORM,
    "gemma3_text": _LLAMA_QK_NORM,
    "gpt2": Family(
        projections={"q_attn": "q", "c_attn": "q k v"},
        output="c_proj",
        up={"c_fc": "up"},
        positions="none",
    ),
    "opt": _BART,
    "gpt_neox": Family(
        projections={"query_key_value": "q|k|v"},
        output="dense",
        up={"dense_h_to_4h": "up"},
        positions="partial",
        head_dim="head_size",
    ),
    "phi3": Family(
        projections={"qkv_proj": "q k v"},
        output="o_proj",
        up={"gate_up_proj": "gate up"},
        positions="partial",
    ),
    "whisper": _BART,
    "bart": _BART,
    "t5": Family(
        projections={"q": "q", "k": "k", "v": "v"},
        output="o",
        up={"wi": "up", "wi_1": "up"},
        positions="none",
        head_dim="key_value_proj_dim",
    ),
    "bert": Family(
        projections={"self.query": "q", "self.key": "k", "self.value": "v"},
        output="output.dense",
        up={"intermediate.dense": "up"},
        positions="none",
        head_dim="attention_head_size",
    ),
    "vit": replace(_LLAMA, up={"mlp.fc1": "up"}, positions="none"),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
}


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
        if model_type is not None and not described:
            raise ValueError(unknown_family_message(model_type, path))
        return (TargetSlice("weight", "linear", HeadSlice.plain(1, features)),)

    if num_heads is not None:
        raise ValueError(
            f"{path}: num_heads describes models that the table of architectures does not know, but {model_type!r} is "
            "in it; leave num_heads out"
        )
    if (name := _suffix(path, family.up)) is not None:
        parts, _ = _split(family.up[name])
        size = features // len(parts)
        return (TargetSlice("weight", "up", HeadSlice.plain(1, size, start=size * parts.index("up"))),)
    if (name := _suffix(path, family.projections)) is None:
        return (TargetSlice("weight", "linear", HeadSlice.plain(1, features)),)

    attention = _Attention(model, path.removesuffix(name), family, config, head_dim)
    layout = attention.layout(path, name)
    slices: list[TargetSlice] = []
    for part in layout if len(layout) == 1 else [part for part in layout if part != "q"]:
        slices.extend(attention.slices(part, layout[part]))
    if len(slices) == 1:
        slices = [replace(slices[0], name="weight")]
    return tuple(slices)


class _Attention:
    """One attention block: the modules of a family under one path prefix."""

    def __init__(
        self, model: nn.Module, prefix: str, family: Family, config: Any, head_dim: int | None = None
    ) -> None:
        self.model, self.prefix, self.family, self.config, self.head_dim = model, prefix, family, config, head_dim

    def present(self) -> list[str]:
        """The family's projections that this block has (DeepSeek has either `q_proj` or `q_b_proj`)."""
        return [name for name in self.family.projections if _has(self.model, self.prefix + name)]

    def parts(self, name: str) -> tuple[list[str], bool]:
        """The parts that projection `name` computes in this block, and whether they are interleaved."""
        parts, interleaved = _split(self.family.projections[name])
        present = self.present()
        elsewhere = {part for other in present[: present.index(name)] for part in self.parts(other)[0]}
        return [part for part in parts if part not in elsewhere], interleaved

    def read(self, name: str, path: str) -> int:
        """An integer fact, from the attention module itself or one of its direct parents, else from the config."""
        parts = self.prefix.rstrip(".").split(".")
        candidates = [path.rpartition(".")[0], ".".join(parts)]
        for owner in [*(self.model.get_submodule(p) for p in candidates), self.config]:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
        raise ValueError(
            f"{path}: expected the attribute {name!r} on its attention module or config, found none; "
            "pass head_dim=... or num_heads=... with target_modules=[...]"
        )

    def layout(self, path: str, name: str) -> dict[str, HeadSlice]:
        """Part -> its whole heads in the module at `path`, whose name in the table is `name`."""
        parts, interleaved = self.parts(name)
        module = base_of(self.model.get_submodule(path))
        features = out_features(module, path)
        dims = {part: self.dim(part, path) for part in parts}
        if interleaved:
            stride = sum(dims.values())
            count = _divide(path, features, stride, "the heads' features " + "+".join(map(str, dims.values())))
            offsets = _running(dims)
            return {part: HeadSlice(0, count, stride, offsets[part], dims[part]) for part in parts}
        counts = {part: self.count(part, path, parts, features, dims) for part in parts}
        sizes = {part: counts[part] * dims[part] for part in parts}
        if sum(sizes.values()) != features:
            raise ValueError(
                f"{path}: expected {sum(sizes.values())} output features ({' + '.join(map(str, sizes.values()))} for "
                f"{', '.join(parts)}), found {features}; pass head_dim=... or num_heads=... with target_modules=[...]"
            )
        starts = _running(sizes)
        return {part: HeadSlice.plain(counts[part], dims[part], starts[part]) for part in parts}

    def dim(self, part: str, path: str) -> int:
        """Coordinates of one head of `part`."""
        if part == "v" and self.family.value_dim is not None:
            return self.read(self.family.value_dim, path)
        dim = self.read(self.family.head_dim, path)
        if self.head_dim not in (None, dim):
            raise ValueError(
                f"{path}: expected head_dim={dim}, which this model's heads have, found head_dim={self.head_dim}; "
                "leave it out, or split or join heads with block_size"
            )
        if part == "q" and self.family.positions == "decoupled":
            dim += self.read("qk_rope_head_dim", path)
        return dim

    def count(self, part: str, path: str, parts: list[str], features: int, dims: dict[str, int]) -> int:
        """Number of heads of `part` in a module that computes `parts` one after the other."""
        if len(parts) == 1:
            return _divide(path, features, dims[part], f"head_dim {dims[part]}")
        heads = self.read("num_attention_heads", path)
        key_value_heads = getattr(self.config, "num_key_value_heads", None)
        return heads if part == "q" or key_value_heads is None else key_value_heads

    def slices(self, part: str, heads: HeadSlice) -> Iterator[TargetSlice]:
        """The slices of one part, with their partners by the true positions."""
        if part == "v":
            yield TargetSlice("v", "v", heads, self.reader(heads))
        elif part == "q":
            yield TargetSlice("q", "q", heads)
        elif self.family.positions == "partial" and (rotary := self.rotary_dim(heads.dim)) < heads.dim:
            if rotary:
                yield TargetSlice("k_rotary", "k_rotary", heads.part(0, rotary))
            rest = heads.part(rotary, heads.dim - rotary)
            yield TargetSlice("k", "k", rest, self.query(rest.dim, rotary))
        elif self.family.positions in ("none", "decoupled"):
            yield TargetSlice("k", "k", heads, self.query(heads.dim, 0))
        else:
            yield TargetSlice("k", "k", heads)

    def rotary_dim(self, head_dim: int) -> int:
        """Rotated dimensions of a partially rotated head; they come first."""
        parameters = getattr(self.config, "rope_parameters", None) or {}
        return int(head_dim * parameters.get("partial_rotary_factor", 1.0))

    def reader(self, heads: HeadSlice) -> Partner:
        """The output projection, as the partner of the value heads."""
        path = self.prefix + self.family.output
        features = in_features(base_of(self.model.get_submodule(path)), path)
        count = _divide(path, features, heads.dim, f"the {heads.dim} dimensions of a value head")
        return Partner(path, HeadSlice.plain(count, heads.dim), reads=True)

    def query(self, dim: int, offset: int) -> Partner | None:
        """The coordinates `offset ... offset + dim` of the query heads, as the partner of the key's; None if a norm
        stands between."""
        if self.family.qk_norm:
            return None
        for name in self.present():
            if "q" in self.parts(name)[0]:
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


def _features(module: Any, path: str) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, (nn.Embedding, nn.MultiheadAttention)) or not (
        isinstance(getattr(module, "in_features", None), int)
        and isinstance(getattr(module, "out_features", None), int)
    ):
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
        config = getattr(model.get_submodule(".".join(parts[:depth])), "config", None)
        model_type = getattr(config, "model_type", None)
        if isinstance(model_type, str) and model_type:
            return FAMILIES.get(model_type), model_type, config
    return None, None, None


def _suffix(path: str, names: dict[str, str]) -> str | None:
    return next((name for name in names if path == name or path.endswith("." + name)), None)


def _has(model: nn.Module, path: str) -> bool:
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
