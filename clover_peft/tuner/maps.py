"""Maps of blocks onto themselves, applied to features by the plain formula.

With `z_h` the features of block h and M_h its folded map, `E dS C` (ours; W_o y is the paper's V S U^T x):

    y_h = z_h + M_h z_h
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..base_model.slices import HeadSlice
from ..runtime.tracing import takes_writes


class Place(NamedTuple):
    """The features that a map acts on, H blocks of d, and whether it replaces them.

    Attributes:
        heads: the features.
        size: features of a block, d.
        replaces: y = M z instead of y = z + M z.
    """

    heads: HeadSlice
    size: int
    replaces: bool

    def tokens(self, features: Tensor) -> Tensor:
        """The blocks of (..., features) as (H, tokens, d); a view if `heads.has_views(size)`."""
        blocks = self.heads.blocks(features, self.size)
        return blocks.reshape(-1, *blocks.shape[-2:]).transpose(0, 1)

    def add_(self, result: Tensor, tokens: Tensor, matrix: Tensor) -> None:
        """Add `tokens @ matrix`, (H, tokens, d) by (H, d, d), to the features of a contiguous `result`."""
        target = self.tokens(result)
        target.baddbmm_(tokens, matrix)
        if not self.heads.has_views(self.size):
            heads = self.heads.heads(result)
            heads.copy_(target.transpose(0, 1).reshape(heads.shape))


class Inversion(NamedTuple):
    """What a backward pass needs to use y = (I + M) z in the place of z (`fused_maps`).

    Attributes:
        square: a bound on the norms of M^2; infinite if inverting I + M would amplify rounding too much.
        shared: returns the inverse for M rounded to a dtype, (H, d, d), if other layers' are computed with it.
    """

    square: float
    shared: Callable[[torch.dtype], Tensor] | None = None


class HeadMap(NamedTuple):
    """A map M of every block of a place.

    Attributes:
        place: the features, (H, d).
        matrix: (H, d, d), M; with `c` (H, d, r), its left factor E dS.
        c: (H, r, d), C, of a map in two stages, M = (E dS) C; None for a folded map.
        dropout: a module that is applied to the map's input.
        inversion: of a folded map; None if `fused_maps` has to find it out itself.
    """

    place: Place
    matrix: Tensor
    c: Tensor | None = None
    dropout: nn.Module | None = None
    inversion: Inversion | None = None

    @property
    def is_folded(self) -> bool:
        """Whether it adds one product with a d x d matrix, and nothing else."""
        return self.c is None and self.dropout is None and not self.place.replaces

    def to(self, dtype: torch.dtype) -> HeadMap:
        """The map with its matrices in `dtype`."""
        c = None if self.c is None else self.c.to(dtype)
        return self._replace(matrix=self.matrix.to(dtype), c=c)

    def mapped(self, tokens: Tensor) -> Tensor:
        """`M z`, (H, tokens, d), of features of the same shape."""
        tokens = tokens if self.dropout is None else self.dropout(tokens)
        if self.c is not None:
            tokens = torch.bmm(tokens, self.c.to(tokens.dtype).mT)
        return torch.bmm(tokens, self.matrix.to(tokens.dtype).mT)


class StagedMap(NamedTuple):
    """A map as its factors, which are less work for a few tokens.

    Attributes:
        place: the features, (H, d).
        mapped: `M z`, (H, tokens, d), of features of the same shape.
    """

    place: Place
    mapped: Callable[[Tensor], Tensor]


def formula(z: Tensor, maps: Sequence[HeadMap | StagedMap]) -> Tensor:
    """`apply_maps` in plain operations of torch, which autograd differentiates; every map reads the same z."""
    if len(maps) == 1 and maps[0].place.heads.covers(z.shape[-1]):
        [m] = maps
        tokens = m.place.tokens(z)
        mapped = m.mapped(tokens)
        # The sum has the memory layout of its first operand, so the reshape does not copy.
        return (mapped if m.place.replaces else tokens + mapped).transpose(0, 1).reshape(z.shape)
    result = z.clone()
    for m in maps:
        tokens = m.place.tokens(z)
        mapped = m.mapped(tokens)
        change = (mapped - tokens if m.place.replaces else mapped).transpose(0, 1)
        if takes_writes():
            target = m.place.heads.heads(result)
            target.add_(change.reshape(target.shape))
        else:
            index = torch.tensor(m.place.heads.indices(), device=z.device)
            result = result.index_add(-1, index, change.reshape(*z.shape[:-1], -1))
    return result
