"""Second moments of activations, in one d x d matrix for every block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .decomposition import per_key_value_head


@dataclass
class Moments:
    """Mean and scatter of the tokens of H blocks of d features.

    Each batch is centred before its products are computed in float32; the sums are merged in float64 (Chan, Golub and
    LeVeque, 1983). So a feature with a large mean does not drown the others, and the order of batches hardly matters.

    Attributes:
        scatter: (H, d, d) float64, sum of `(z - mean) (z - mean)^T`.
        mean: (H, d) float64.
        tokens: number of tokens.
        precision: machine epsilon of the activations' dtype.
        half: those of every second batch alone, which tell what is noise; None if they were not collected.
    """

    scatter: Tensor
    mean: Tensor
    tokens: int = 0
    precision: float = 0.0
    half: Moments | None = None

    @classmethod
    def empty(cls, shape: torch.Size, device: torch.device) -> Moments:
        """Moments of no tokens yet, of blocks of shape (H, d)."""
        return cls(
            torch.zeros(*shape, shape[-1], dtype=torch.float64, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
        )

    def add(self, blocks: Tensor) -> None:
        """Add tokens: (tokens, H, d), any floating dtype. Costs tokens H d^2, in at least float32."""
        count = len(blocks)
        if not count:
            return
        self.precision = max(self.precision, torch.finfo(blocks.dtype).eps)
        with torch.autocast(blocks.device.type, enabled=False):
            rows = blocks.permute(1, 2, 0)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            near = rows.mean(-1)
            rows = rows - near.unsqueeze(-1)
            rest = rows.mean(-1).to(self.mean)  # the rounding error of `near`
            scatter = torch.bmm(rows, rows.mT).to(self.scatter) - count * _square(rest)
        away = near.to(self.mean) + rest - self.mean
        self.scatter += scatter + count * self.tokens / (self.tokens + count) * _square(away)
        self.mean += count / (self.tokens + count) * away
        self.tokens += count

    def split(self, blocks: Tensor, second: bool) -> None:
        """`add` tokens, those of every second batch (`second`) to `half` too."""
        self.add(blocks)
        if second:  # A single batch needs no second matrix.
            self.half = self.half or Moments.empty(self.mean.shape, self.mean.device)
            self.half.add(blocks)

    @property
    def sums(self) -> Tensor:
        """(H, d, d), what was summed over the tokens."""
        return self.scatter

    def parts(self, count: int) -> Moments:
        """The moments of `count` equal parts of one block, as of that many blocks."""
        scatter = diagonal_blocks(self.scatter[0], count)
        return Moments(scatter, self.mean.view(count, -1), self.tokens, self.precision)

    @property
    def second(self) -> Tensor:
        """(H, d, d) float64, the mean of `z z^T`."""
        return self.about(torch.zeros_like(self.mean))

    def about(self, point: Tensor) -> Tensor:
        """(H, d, d) float64, the mean of `(z - p) (z - p)^T`; p (H, d) float64."""
        return self.covariance + _square(self.mean - point)

    @property
    def covariance(self) -> Tensor:
        """(H, d, d) float64, the mean of `(z - mean) (z - mean)^T`."""
        return self.scatter / max(1, self.tokens)

    def exceeds_rounding(self, moment: Tensor) -> Tensor:
        """(H,) bool, whether a moment of these blocks is more than the rounding error of their activations."""
        around, whole = (m.diagonal(dim1=-2, dim2=-1).sum(-1) for m in (moment, self.second))
        return around > (4 * self.precision) ** 2 * whole


@dataclass
class SecondMoment:
    """Sum of `z z^T` over the tokens of H blocks of d features.

    It has half the bytes of `Moments` and adds a batch in one product, which matters where d is thousands.

    Attributes:
        sums: (H, d, d) float32.
        tokens: number of tokens.
    """

    sums: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, shape: torch.Size, device: torch.device) -> SecondMoment:
        """Of no tokens yet, of blocks of shape (H, d)."""
        return cls(torch.zeros(*shape, shape[-1], device=device))

    def add(self, blocks: Tensor) -> None:
        """Add tokens: (tokens, H, d), any floating dtype. Costs tokens H d^2 in float32."""
        with torch.autocast(blocks.device.type, enabled=False):
            rows = blocks.transpose(0, 1).to(self.sums)
            self.sums.baddbmm_(rows.mT, rows)
        self.tokens += len(blocks)

    @property
    def second(self) -> Tensor:
        """(H, d, d) float64, the mean of `z z^T`."""
        return self.sums.double() / max(1, self.tokens)


def check_finite(sums: Tensor, name: str) -> None:
    """Raise `ValueError`, naming the module, if a sum over activations is NaN or infinite."""
    if not torch.isfinite(sums).all():
        raise ValueError(f"{name}: expected finite activations, found NaN or infinite ones; check model and data")


def _square(vectors: Tensor) -> Tensor:
    """(H, d) to (H, d, d), `v v^T`."""
    return vectors.unsqueeze(-1) * vectors.unsqueeze(-2)


def diagonal_blocks(matrix: Tensor, count: int) -> Tensor:
    """The blocks on the diagonal of an (n, n) matrix, a view of (count, n / count, n / count)."""
    size = len(matrix) // count
    return matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def centred(moments: Moments, weight_gram: Tensor) -> Tensor:
    """The covariance, shrunk towards the weights' Gram matrix; the latter alone for blocks that do not vary.

    Shapes and dtypes as in `shrink`.
    """
    found = shrink(moments.covariance.to(weight_gram), weight_gram, moments.tokens)
    varies = moments.exceeds_rounding(moments.covariance).to(found.device)
    return torch.where(varies.view(-1, 1, 1), found, weight_gram)


def shrink(moment: Tensor, weight_gram: Tensor, tokens: int) -> Tensor:
    """A moment, shrunk towards the weights' Gram matrix; more so for fewer tokens (ours).

    `(1 - a) M + a t G` with `a = d / (d + tokens)`, and t that gives G the trace of M.

    Args:
        moment: M, (H, d, d) float64.
        weight_gram: G, (H, d, d) float64, the Gram of the weights that compute the same features.
        tokens: that M was made of.

    Returns:
        (H, d, d) float64.
    """
    size = moment.shape[-1]
    share = size / (size + tokens)
    trace, weight_trace = (g.diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, 1, 1) for g in (moment, weight_gram))
    relative = weight_gram / weight_trace.clamp(min=torch.finfo(weight_gram.dtype).tiny)
    return (1 - share) * moment + share * trace * relative


class PairGrams(NamedTuple):
    """The Grams that a pair is decomposed by, `pair_bases(g_in, g_out)`.

    Attributes:
        g_in: (H, d, d) float64, of the value or key. If moments of what the output projection reads replace it, their
            sum over the query heads that share a key-value head.
        g_out: (H, d, d) float64, of the output or query, summed over the query heads that share a key-value head.
        read: (G, d, d) float64, what the output projection reads of every query head: its moments drawn towards
            the weights. None for a query and key, and without moments.
    """

    g_in: Tensor
    g_out: Tensor
    read: Tensor | None


def pair_grams(
    g_in: Tensor,
    g_out: Tensor,
    heads: int,
    *,
    reads: bool,
    own: Moments | None = None,
    partner: Moments | None = None,
    constant: Tensor | None = None,
) -> PairGrams:
    """The Grams of a pair, in which moments of activations replace the Grams of the weights that compute them (ours).

    Value and output meet in what the output projection reads: its moments, one for every query head, replace `g_in`.
    Key and query meet in a dot product: the key's covariance replaces `g_in`, because softmax ignores a vector that is
    added to all keys, and the query's second moments replace `g_out`. Every moment is drawn towards the Gram that it
    replaces (`shrink`).

    Args:
        g_in: (H, d, d) float64, Gram of the weights that compute the pair's own features, value or key.
        g_out: (G, d, d) float64, Gram of the partner's weights, output or query, for every query head. G is a multiple
            of H.
        heads: key-value heads; a divisor of H, which is larger where a head is split into several blocks.
        reads: whether the partner reads the features (output projection) or meets them in a dot product (query).
        own: moments of the pair's own features, H blocks of d; of a key only.
        partner: moments of what the output projection reads or the query projection computes, G blocks of d.
        constant: (G, d), the vector that moments of what is read are taken about; the origin if None.

    Returns:
        `PairGrams`, on the device of `g_in`.
    """
    groups, read = len(g_out) // len(g_in), None
    g_out = g_out.to(g_in.device)
    if partner is not None and reads:
        moment = partner.second if constant is None else partner.about(constant.to(partner.mean))
        shared = g_in.unflatten(0, (heads, 1, -1)).repeat(1, groups, 1, 1, 1).flatten(0, 2)
        told = partner.exceeds_rounding(moment).to(g_in.device).view(-1, 1, 1)
        read = torch.where(told, shrink(moment.to(g_in), shared, partner.tokens), shared)
        g_in = per_key_value_head(read, heads, groups)
    elif partner is not None:
        g_out = shrink(partner.second.to(g_in), g_out, partner.tokens)
    if own is not None:
        g_in = centred(own, g_in)
    return PairGrams(g_in, per_key_value_head(g_out, heads, groups), read)
