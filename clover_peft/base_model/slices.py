"""`HeadSlice`: which features of a projection belong to heads, and which projection they meet."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


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
