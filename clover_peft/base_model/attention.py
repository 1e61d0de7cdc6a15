"""`AttentionBlock`: the facts of one attention block, read off its modules, its config and the table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

from torch import nn

from .families import CLAMP, QUERY_KEY_NORMS, ROTARY_DIMS, SECOND_STREAM, VALUE_NORMS, Family, If, Layout
from .slices import HeadSlice, Partner, TargetSlice
from .weight import base_of, feature_counts, has_module

# An attention block with narrower heads has this attribute: dimensions of a key head and of a value head.
WIDTHS = "clover_widths"


class AttentionBlock:
    """One attention block: the modules of a family under one path prefix."""

    def __init__(
        self, model: nn.Module, prefix: str, family: Family, config: Any, head_dim: int | None = None
    ) -> None:
        self.model, self.prefix, self.family, self.config, self.head_dim = model, prefix, family, config, head_dim
        # The module right above the projections, and the block if that is another (BERT's `attention.self`).
        self.path = (prefix + self.present()[0]).rpartition(".")[0]
        self.modules = [model.get_submodule(path) for path in dict.fromkeys([self.path, prefix.rstrip(".")])]

    def present(self) -> list[str]:
        """The family's projections that this block has (DeepSeek has either `q_proj` or `q_b_proj`)."""
        return [name for name in self.family.projections if has_module(self.model, self.prefix + name)]

    def module_of(self, name: str) -> Any:
        """The projection of this name in the table."""
        return base_of(self.model.get_submodule(self.prefix + name))

    def fact(self, name: str) -> Any:
        """An attribute of the block or else of its config; None if neither has it."""
        return next((getattr(owner, name) for owner in (*self.modules, self.config) if hasattr(owner, name)), None)

    @property
    def is_causal(self) -> bool:
        """Whether a token attends to earlier ones alone, as in a decoder's self-attention."""
        return getattr(self.modules[0], "is_causal", self.family.causal)

    def decide(self, fact: str | If) -> str:
        """A fact of the family that may depend on the block."""
        while isinstance(fact, If):
            fact = fact.then if self.fact(fact.attribute) else fact.otherwise
        return fact

    def has_any(self, names: tuple[str, ...]) -> bool:
        """Whether the block has a module of one of these names, other than an identity."""
        found = [getattr(module, name, None) for module in self.modules for name in names]
        return any(isinstance(module, nn.Module) and not isinstance(module, nn.Identity) for module in found)

    def layout_of(self, name: str) -> Layout:
        """The layout of projection `name` in this block, without parts that an earlier projection computes."""
        layout = Layout.read(self.decide(self.family.projections[name]))
        if len(layout.parts) == 1:
            return layout
        present = self.present()
        elsewhere = {part for other in present[: present.index(name)] for part in self.layout_of(other).parts}
        return replace(layout, parts=tuple(part for part in layout.parts if part not in elsewhere))

    def read(self, name: str, path: str) -> int:
        """An integer fact, read from the attention module or else from the config."""
        value = self.fact(name)
        if isinstance(value, int):
            return value
        raise ValueError(
            f"{path}: expected the attribute {name!r} on its attention module or config, found none; "
            "pass head_dim=... or num_heads=... with target_modules=[...]"
        )

    def layout(self, path: str, name: str) -> dict[str, HeadSlice]:
        """Part -> its whole heads, in the projection at `path` with this name in the table.

        A part without features is left out: keys without rotation, where latent attention rotates all of them.
        """
        layout = self.layout_of(name)
        _, features = self._features(path)
        dims = {part: self.dim(part, path) for part in layout.parts}
        if layout.order == "all":
            if len(dims) == 1:
                counts = {part: divide(path, features, dim, f"head_dim {dim}") for part, dim in dims.items()}
            else:
                counts = {part: self.heads(path) if part == "q" else self.key_value_heads(path) for part in dims}
            sizes = {part: counts[part] * dims[part] for part in layout.parts}
            if sum(sizes.values()) != features:
                raise ValueError(
                    f"{path}: expected {sum(sizes.values())} output features ({' + '.join(map(str, sizes.values()))} "
                    f"for {', '.join(layout.parts)}), found {features}; pass head_dim=... or num_heads=... with "
                    "target_modules=[...]"
                )
            starts = accumulate(sizes.values(), initial=0)
            parts = [(part, start) for part, start in zip(sizes, starts, strict=False) if dims[part]]
            return {part: HeadSlice.plain(counts[part], dims[part], start) for part, start in parts}
        # A shard holds `inner` heads of every part.
        inner = dict.fromkeys(layout.parts, 1)
        if layout.grouped:
            inner["q"] = self.heads(path) // self.key_value_heads(path)
        elif isinstance(layout.order, int):
            inner = dict.fromkeys(layout.parts, self.heads(path) // layout.order)
        sizes = {part: inner[part] * dims[part] for part in layout.parts}
        stride = sum(sizes.values())
        shards = divide(path, features, stride, "the heads' features " + "+".join(map(str, sizes.values())))
        result = {}
        for part, offset in zip(sizes, accumulate(sizes.values(), initial=0), strict=False):
            dim, heads = dims[part], inner[part]
            if not dim:
                continue
            result[part] = HeadSlice(0, shards * heads, stride, offset, dim, heads, dim if heads > 1 else 0)
        return result

    def _features(self, path: str) -> tuple[int, int]:
        return feature_counts(base_of(self.model.get_submodule(path)), path)

    def dim(self, part: str, path: str) -> int:
        """Coordinates of one head of `part`."""
        if (widths := self.fact(WIDTHS)) is not None:
            return widths[part == "v"]
        if part == "v" and self.family.value_dim is not None:
            return self.read(self.family.value_dim, path)
        if self.fact(self.family.head_dim) is None and isinstance(self.fact(self.family.heads), int):
            query = next(self.prefix + name for name in self.present() if "q" in self.layout_of(name).parts)
            dim = self._features(query)[1] // self.heads(path)
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
        """Number of key-value heads, which is the number of query heads in models without a count of their own."""
        value = self.fact(self.family.key_value_heads)
        return value if isinstance(value, int) else self.heads(path)

    def cached_features(self, path: str) -> int:
        """Numbers in the cache for each token: keys and values of all heads, or the latent of DeepSeek's attention."""
        if self.family.positions == "decoupled":
            return self.read("kv_lora_rank", path) + self.read("qk_rope_head_dim", path)
        slices = [s for name in self.present() for s in self.layout(self.prefix + name, name).items()]
        return sum(heads.features for part, heads in slices if part in ("k", "v"))

    def slices(self, part: str, heads: HeadSlice) -> Iterator[TargetSlice]:
        """The slices of one part. Only dimensions of a key that are not rotated have a partner."""
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
        """The number of rotated dimensions, which come first, of a partially rotated head."""
        for name in ROTARY_DIMS:
            if hasattr(self.modules[0], name):
                return getattr(self.modules[0], name) or head_dim  # None means all of them
        parameters = getattr(self.config, "rope_parameters", None) or {}
        return int(head_dim * parameters.get("partial_rotary_factor", 1.0))

    def is_gated(self) -> bool:
        """Whether a gate, part of some projection, multiplies the heads' outputs."""
        return any("gate" in self.layout_of(name).parts for name in self.present())

    def is_apart(self, part: str, norms: tuple[str, ...]) -> bool:
        """Whether something stands between a part and its partner: by the table, or by modules of known names."""
        in_table = self.decide(self.family.between.get(part, "nothing")) != "nothing"
        return in_table or self.has_any((*norms, *SECOND_STREAM)) or self.fact(CLAMP) is not None

    def reader(self, heads: HeadSlice) -> Partner | None:
        """The output projection, as the partner of the value heads; None if something stands between."""
        path = self.prefix + self.family.output
        if self.is_apart("v", VALUE_NORMS) or self.is_gated():
            return None
        if not has_module(self.model, path):  # a module above the block reads the heads together with other features
            return None
        count = divide(path, self._features(path)[0], heads.dim, f"the {heads.dim} dimensions of a value head")
        return Partner(path, HeadSlice.plain(count, heads.dim), reads=True)

    def query(self, dim: int, offset: int) -> Partner | None:
        """The coordinates `offset ... offset + dim` of the query heads, as the key's partner; None if something stands
        between."""
        if self.is_apart("k", QUERY_KEY_NORMS):
            return None
        for name in self.present():
            if "q" in self.layout_of(name).parts:
                path = self.prefix + name
                return Partner(path, self.layout(path, name)["q"].part(offset, dim), reads=False)
        raise ValueError(f"{self.prefix}: found no query projection; expected one of {list(self.family.projections)}")


def divide(path: str, features: int, by: int, what: str, remedy: str = "pass head_dim=...") -> int:
    if features % by:
        raise ValueError(f"{path}: {features} features are not a multiple of {what}; {remedy}")
    return features // by
