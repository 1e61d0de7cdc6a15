"""`HeadSlice`: the features of a projection that belong to heads. `Partner`: the projection that they meet."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

# The parts of projections that do not belong to attention.
WITHOUT_HEADS = ("up", "linear")


@dataclass(frozen=True)
class HeadSlice:
    """Features of a projection that belong to heads.

    Shards of `inner` heads follow each other every `stride` features. Coordinate j of head i is the feature
    `start + (i // inner) * stride + offset + (i % inner) * inner_stride + j`, or `start + i * stride + offset + j` if
    `inner` is 1.

    Attributes:
        start: first feature of the region.
        count: number of heads.
        stride: features from one shard to the next.
        offset: first coordinate of a shard's first head inside the stride.
        dim: coordinates per head.
        inner: heads in a shard.
        inner_stride: features from one head of a shard to the next; 0 if a shard is one head.
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
        """Whether the slice has all of `features` features, in order."""
        return self.start == 0 and self.offset == 0 and self.dim == self.stride and self.features == features

    def indices(self) -> list[int]:
        """The features, head by head."""
        firsts = (
            self.start + i // self.inner * self.stride + self.offset + i % self.inner * self.inner_stride
            for i in range(self.count)
        )
        return [first + j for first in firsts for j in range(self.dim)]

    def heads(self, x: Tensor) -> Tensor:
        """A view of `x` (..., features): (..., count, dim), or (..., count // inner, inner, dim) for `inner` > 1."""
        region = x[..., self.start : self.stop].unflatten(-1, (-1, self.stride))
        if self.inner == 1:
            return region[..., self.offset : self.offset + self.dim]
        last = self.offset + (self.inner - 1) * self.inner_stride + self.dim
        return region[..., self.offset : last].unfold(-1, self.dim, self.inner_stride)

    def blocks(self, x: Tensor, size: int) -> Tensor:
        """The blocks of `x` (..., features): (..., count * dim // size, size).

        A `size` that divides `dim` splits a head into blocks; a multiple of `dim` joins neighbouring heads to one.
        """
        heads = x if self.covers(x.shape[-1]) else self.heads(x)
        return heads.reshape(*x.shape[:-1], self.features // size, size)

    def has_views(self, size: int) -> bool:
        """Whether `blocks` of a contiguous `x` is a view, because each block is in one piece, at equal distances."""
        if self.inner > 1:
            return size == self.dim and self.stride == self.inner * self.inner_stride
        return size == self.dim or self.dim == self.stride


@dataclass(frozen=True)
class Partner:
    """The other projection of a pair: it meets the wrapped one inside a head.

    Attributes:
        path: module path, relative to the model.
        heads: its features; under grouped-query attention it has several heads for each wrapped one.
        reads: True for an output projection, whose input features are the heads; False for a query projection, whose
            output features meet the wrapped ones in a dot product.
    """

    path: str
    heads: HeadSlice
    reads: bool


@dataclass(frozen=True)
class TargetSlice:
    """One slice of a target module.

    Attributes:
        name: "weight" for a target's only slice, else the part's name.
        part: "q" (heads without a partner), "k", "k_rotary", "v", "up" or "linear" (no heads).
        heads: its features.
        partner: the other projection of its pair, or None for an intra-layer map.
    """

    name: str
    part: str
    heads: HeadSlice
    partner: Partner | None = None

    @property
    def has_heads(self) -> bool:
        return self.part not in WITHOUT_HEADS

    @property
    def default_block_size(self) -> int:
        """Features of a block if no size is given: a head, or else the largest divisor that is at most 64."""
        dim = self.heads.dim
        return dim if self.has_heads else max(n for n in range(1, 65) if dim % n == 0)
