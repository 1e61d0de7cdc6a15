"""`BlockSpec`: how one slice of a target is adapted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..base_model.slices import WITHOUT_HEADS, HeadSlice, Partner, TargetSlice
from ..io.user_warning import warn
from ..linalg.decomposition import fold
from .config import CloverConfig
from .maps import Place


class BlockTensors(NamedTuple):
    """The tensors of one slice, with H blocks of d features and r directions.

    Attributes:
        s: (H, r, r) or (H, r), the trained offset dS. In an adapter that was saved folded: (H, d, d), the whole map.
        c: (H, r, d), C, stored as `clover_U`; None in a folded adapter.
        e: (H, d, r), E, stored as `clover_V`; None for the identity.
        s0: (H, r), the frozen singular values; None in a folded adapter.
        norm: (H, d), the fingerprint of the base weights (`bases.row_norms`).
    """

    s: Tensor
    c: Tensor | None
    e: Tensor | None
    s0: Tensor | None
    norm: Tensor | None

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> BlockTensors:
        """From a layer's names to tensors."""
        c, e, s0, norm = (found.get(name) for name in ("clover_U", "clover_V", "clover_S0", "clover_norm"))
        return cls(found["clover_S"], c, e, s0, norm)

    def promoted(self) -> BlockTensors:
        """With S in the dtype of the bases: S has the base's without peft's `autocast_adapter_dtype`."""
        return self if self.norm is None else self._replace(s=self.s.to(self.norm.dtype))


@dataclass(frozen=True)
class BlockSpec:
    """How one slice of a target is adapted: everything except the numbers.

    Equality ignores `partner` and `output_is_kept`. Adapters with equal specs can share bases.

    Attributes:
        name: name of the slice's tensors ("weight" for the only slice of a target).
        part: the part that the slice computes ("k", "v", "up", ...).
        heads: its features.
        size: features of a block, d.
        r: directions trained in each block.
        s_matrix: "full" (S is r x r) or "diagonal".
        basis: "pair", "qr", "svd", or "folded" (no bases: S is the whole map of an adapter that was saved folded).
        truncate: drop the directions beyond r; of a folded adapter: it was trained so.
        from_activations: the bases were computed from moments of activations.
        balanced_updates: `balance_updates` scaled C.
        max_condition: limit of the condition numbers of the bases; None for none, and where r < d.
        partner: the other projection of the pair.
        output_is_kept: the next operation may keep the slice's output for its backward pass, and does not write into
            it. Attention keeps values (and keys, but after the rotation); an activation or the product with the gate
            keeps the output of an up-projection.
    """

    name: str
    part: str
    heads: HeadSlice
    size: int
    r: int
    s_matrix: Literal["full", "diagonal"]
    basis: Literal["pair", "qr", "svd", "folded"]
    truncate: bool
    from_activations: bool = False
    balanced_updates: bool = False
    max_condition: float | None = None
    partner: Partner | None = field(default=None, compare=False)
    output_is_kept: bool = field(default=False, compare=False)

    @property
    def blocks(self) -> int:
        """Number of blocks, H."""
        return self.heads.features // self.size

    @property
    def place(self) -> Place:
        """The features that the map acts on, and whether it replaces them."""
        return Place(self.heads, self.size, self.replaces)

    @property
    def replaces(self) -> bool:
        """Whether the map is that of the truncated block, and not added to the block: y = M z."""
        return self.truncate and self.basis != "folded"

    @property
    def s_shape(self) -> tuple[int, ...]:
        """Shape of S: (H, r, r) or (H, r)."""
        return (self.blocks, self.r, self.r) if self.s_matrix == "full" else (self.blocks, self.r)

    @property
    def is_factored(self) -> bool:
        """Whether to keep the map as C and E dS: if that saves numbers for the backward pass, or most of the work."""
        keeps_only_output = self.output_is_kept and not self.replaces  # which the layers behind keep anyway
        return self.r < self.size and (not keeps_only_output or self.r <= self.size // 4)

    @property
    def base_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the frozen tensors by attribute; an identity is not stored."""
        shapes: dict[str, tuple[int, ...]] = {"clover_norm": (self.blocks, self.size)}
        if self.basis == "folded":
            return shapes
        shapes.update(clover_S0=(self.blocks, self.r), clover_U=(self.blocks, self.r, self.size))
        if self.basis != "qr":
            shapes["clover_V"] = (self.blocks, self.size, self.r)
        return shapes

    @property
    def packed_shape(self) -> tuple[int, int] | None:
        """Shape of C's lower triangles, where C is lower triangular: `C = R^-T`, for whole blocks in the QR basis."""
        return (self.blocks, self.size * (self.size + 1) // 2) if self.basis == "qr" else None

    def map(self, tensors: BlockTensors) -> Tensor:
        """The folded map of each block, (H, d, d): `E dS C`, or with `truncate` `E (S0 + dS) C`.

        Without `c`, its left factor alone, (H, d, r).
        """
        s, c, e, *_ = self._with_frozen_part(tensors)
        return fold(s, c, e)

    def mapped(self, tensors: BlockTensors, tokens: Tensor) -> Tensor:
        """The map of features, (H, tokens, d), as `E (dS (C z))`, computed in the dtype of the tensors."""
        s, c, e, *_ = self._with_frozen_part(tensors)
        result = tokens.to(s.dtype) if c is None else torch.bmm(tokens.to(s.dtype), c.mT)
        result = result * s.unsqueeze(1) if s.ndim == 2 else torch.bmm(result, s.mT)
        return (result if e is None else torch.bmm(result, e.mT)).to(tokens.dtype)

    def _with_frozen_part(self, tensors: BlockTensors) -> BlockTensors:
        """In one dtype, and with `truncate` S0 + dS in the place of dS."""
        tensors = tensors.promoted()
        s, s0 = tensors.s, tensors.s0
        if self.truncate and s0 is not None:
            s = s + (s0 if self.s_matrix == "diagonal" else torch.diag_embed(s0))
        return tensors._replace(s=s)

    def residual_map(self, tensors: BlockTensors) -> Tensor:
        """(H, d, d), to be added to the features: the map, or with `truncate` the map minus the identity."""
        folded = self.map(tensors)
        return folded - torch.eye(self.size, dtype=folded.dtype, device=folded.device) if self.replaces else folded


def block_specs(
    config: CloverConfig, key: str, targets: tuple[TargetSlice, ...], rank: int | None
) -> tuple[BlockSpec, ...]:
    """Apply a config to the slices of a target, whose path is `key`.

    `rank` directions of each block are trained, all of a block that has fewer; None stands for all.

    Raises:
        ValueError: if the config does not fit a slice, or no block has as many directions.
    """
    specs = tuple(_block_spec(config, key, target, rank) for target in targets)
    widest = max(specs, key=lambda spec: spec.size)
    if rank is not None and rank > widest.size:
        head = "" if widest.part in WITHOUT_HEADS else f", head_dim {widest.heads.dim}"
        raise ValueError(
            f"{key}: r={rank} is larger than a block of {widest.size} features ({widest.part}{head}); r counts "
            "directions inside a block and is not LoRA's rank: leave it out to train whole blocks, lower it, or give "
            "this module its own with rank_pattern"
        )
    return specs


def warn_of_useless_block_size(config: CloverConfig, specs: Sequence[BlockSpec]) -> None:
    """Warn of block sizes without effect: for heads if there are none, and of more features than a projection has."""
    if config.block_size is not None and specs and all(spec.part in WITHOUT_HEADS for spec in specs):
        warn(
            f"block_size={config.block_size} cuts attention heads, and no target has any: it is without effect; cut "
            "these with mlp_block_size, or describe the heads with head_dim=... or num_heads=...",
        )
    widest = max((spec.size for spec in specs if spec.part in WITHOUT_HEADS), default=None)
    if widest is not None and config.mlp_block_size is not None and widest < config.mlp_block_size:
        warn(
            f"mlp_block_size={config.mlp_block_size} is more than any of these projections has features: each is one "
            f"block, of {widest} features at most; pass {widest} or less",
        )


def _block_spec(config: CloverConfig, key: str, target: TargetSlice, rank: int | None) -> BlockSpec:
    """Apply a config to one slice of a target."""
    heads, is_attention = target.heads, target.has_heads
    partner = target.partner if config.cross_layer else None
    given = config.block_size if is_attention else config.mlp_block_size
    size = given or target.default_block_size
    size = size if is_attention else min(size, heads.dim)
    if not is_attention and given is None and size < min(8, heads.dim):
        warn(
            f"{key}: {heads.dim} features have no divisor between 8 and 64, blocks are of {size}, which trains "
            "little; pass mlp_block_size, or leave the module out with exclude_modules",
        )
    if heads.features % size or (heads.dim % size and (size % heads.dim or not is_attention)):
        raise ValueError(f"{key}: {_misfit(config, target, size)}")
    if partner is not None and heads.dim % size:
        raise ValueError(
            f"{key}: block_size={size} spans several heads of {heads.dim}, but heads of a pair attend with different "
            "weights; pass cross_layer=False or a divisor of the head"
        )
    r = size if rank is None else min(rank, size)
    basis = config.basis if partner is None else "pair"
    if basis is None:
        basis = "qr" if config.s_matrix == "full" and r == size else "svd"
    elif basis == "qr" and r < size:
        raise ValueError(
            f"{key}: r={r} trains the leading directions of {size}, but the QR basis has no order; use "
            "basis='svd' or r=None"
        )
    if partner is not None and partner.heads.count % heads.count:
        raise ValueError(
            f"{key}: {partner.path} has {partner.heads.count} heads, which {heads.count} key-value heads "
            "cannot share evenly; pass cross_layer=False"
        )
    if config.folded and not config.unfolds:
        common = (target.name, target.part, heads, size, size)
        return BlockSpec(*common, "full", "folded", config.truncate, partner=partner)
    return BlockSpec(
        target.name,
        target.part,
        heads,
        size,
        r,
        config.s_matrix,
        basis,
        config.truncate and r < size,
        config.from_activations,
        config.balanced_updates,
        config.max_condition if r == size else None,  # a limit would mix the leading directions with others
        partner,
        output_is_kept=target.part == "up" or (target.part == "v" and target.partner is not None),
    )


def _misfit(config: CloverConfig, target: TargetSlice, size: int) -> str:
    """Why blocks of `size` features do not fit a slice, and the sizes that do."""
    heads = target.heads
    owner = "the projection's" if target.name == "weight" else f"its part {target.name}'s"
    if not target.has_heads:
        return (
            f"mlp_block_size={size} does not divide {owner} {heads.dim} features; choose a divisor of {heads.dim}, "
            f"such as {target.default_block_size}"
        )
    problem = (
        f"neither divides a head's {heads.dim} features nor is a multiple of them"
        if heads.dim % size and size % heads.dim
        else f"does not divide {owner} {heads.features} features"
    )
    joined = [n * heads.dim for n in range(2, heads.count + 1) if heads.count % n == 0]
    nearest = min(joined, key=lambda choice: abs(choice - size), default=None)
    option = "" if nearest is None else f", or {nearest}{' with cross_layer=False' if config.cross_layer else ''}"
    return f"block_size={size} {problem}; choose {heads.dim}, a divisor of it{option}"
