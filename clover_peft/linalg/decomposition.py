"""Bases of attention heads from d x d Gram matrices: pure, batched tensor functions.

Shapes: H blocks (heads, or parts of heads), d features in a block, r <= d directions kept, hidden size D. Everything
is computed in float64 and batched over H; no D x D matrix is ever formed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_ResultT = TypeVar("_ResultT")
_threads = threading.RLock()  # held while their number is one

# A Cholesky factor whose Frobenius condition exceeds this is not trusted: the block goes through `eigh` instead.
CHOLESKY_CONDITION = 1e6
# Directions of an ill-conditioned block below this fraction of the largest singular value are dropped.
DROP_BELOW = 1e-5
# A weight is cast to float64 in pieces of at most this many elements, so that no whole weight is ever cast. Pieces of
# 8 MB stay in a CPU's cache: a Gram is then 1.6 times as fast as with pieces of 64 MB.
_CHUNK_ELEMENTS = 1_048_576


@dataclass(frozen=True)
class Bases:
    """Frozen bases of H blocks, which read and write the projection's own output z (ours).

    With the paper's orthonormal U and V (Eq. 3, arXiv 2411.17426): `C z = U^T x`, `W_o E = V`, and `E S0 C = I` if all
    directions are there. From Grams that `limit_condition` changed, U and V are not orthonormal.

    Attributes:
        c: (H, r, d) float64, C. A dropped direction is a zero row.
        e: (H, d, r) float64, E, or None for the identity (QR basis).
        singular_values: (H, r) float64, descending, those of S0: their diagonal matrix, or R^T (QR basis).
    """

    c: Tensor
    e: Tensor | None
    singular_values: Tensor

    def leading(self, r: int) -> Bases:
        """Bases of the first `r` directions alone. Dropped directions come last, so they are the first to go."""
        return Bases(
            self.c[:, :r].contiguous(),
            None if self.e is None else self.e[..., :r].contiguous(),
            self.singular_values[:, :r].clone(),
        )

    def as_strong_as(self, other: Bases, g_in: Tensor, g_out: Tensor | None = None) -> Bases:
        """These bases, with C and E of each block rescaled to the size of `other`'s, and S0 so that E S0 C stays.

        Args:
            other: the bases whose `tr(C G_in C^T)` and `tr(E^T G_out E)` the result has.
            g_in: (H, d, d) float64, the Gram matrix of the weights that compute z.
            g_out: (H, d, d) float64, that of the weights that read z, for a pair.
        """
        rows = [_trace(bases.c, g_in) for bases in (self, other)]
        columns = [torch.ones_like(rows[0])] * 2
        if g_out is not None and self.e is not None and other.e is not None:
            columns = [_trace(e.mT, g_out) for e in (self.e, other.e)]
        # A block of zeros stays as it is.
        first, second = (torch.where((a > 0) & (b > 0), b / a, 1).sqrt() for a, b in (rows, columns))
        return Bases(
            self.c * first.view(-1, 1, 1),
            None if self.e is None else self.e * second.view(-1, 1, 1),
            self.singular_values / (first * second).unsqueeze(-1),
        )


def _trace(rows: Tensor, g: Tensor) -> Tensor:
    """`tr(A G A^T)` of (H, r, d) and (H, d, d): (H,)."""
    return (rows @ g * rows).sum((-2, -1))


def gram(blocks: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gram matrix of every block, `A A^T` for its (d, D) weights A. Costs D H d^2.

    A bias is one more column of A: the weights of a hidden feature that is always 1.

    Args:
        blocks: (D, H, d), any floating dtype. For a projection `W` (out, in): `W^T`, its outputs cut into blocks. For
            an output projection: `W`, its inputs cut into blocks.
        bias: (H, d) or None.

    Returns:
        (H, d, d) float64, on the device of `blocks` (on the CPU where that device has no float64).
    """
    count, dim = blocks.shape[1:]
    device = torch.device("cpu") if blocks.device.type == "mps" else blocks.device
    result = torch.empty(count, dim, dim, dtype=torch.float64, device=device)
    step = max(1, _CHUNK_ELEMENTS // max(1, blocks.shape[0] * dim))
    for start in range(0, count, step):
        rows = blocks[:, start : start + step].permute(1, 2, 0).to(device).double()
        torch.bmm(rows, rows.mT, out=result[start : start + step])
    if bias is not None:
        bias = bias.to(device).double()
        result += bias.unsqueeze(-1) * bias.unsqueeze(-2)
    return result


def feature_norms(blocks: Tensor) -> Tensor:
    """The norm of every feature, (D, H, d) to (H, d), in at least float32 on the device of `blocks`."""
    dtype = torch.promote_types(blocks.dtype, torch.float32)
    if blocks.device.type != "cpu":
        return torch.linalg.vector_norm(blocks, dim=0, dtype=dtype)
    # On a CPU, `vector_norm` takes 10 to 20 times as long as this loop, except for contiguous float32.
    squares = torch.empty(blocks.shape[1:], dtype=dtype)
    step = max(1, _CHUNK_ELEMENTS // max(1, blocks.shape[0] * blocks.shape[2]))
    for start in range(0, blocks.shape[1], step):
        squares[start : start + step] = blocks[:, start : start + step].to(dtype).square().sum(0)
    return squares.sqrt()


def per_key_value_head(g: Tensor, heads: int, groups: int) -> Tensor:
    """Sum over the query heads of every group: (heads * groups * b, d, d) to (heads * b, d, d), b blocks a head."""
    return g.unflatten(0, (heads, groups, -1)).sum(1).flatten(0, 1)


def _on_one_thread(function: Callable[_P, _ResultT]) -> Callable[_P, _ResultT]:
    """Run a function on one of torch's threads: more gain LAPACK nothing for matrices of a head's size.

    It waits long for threads that sleep between calls. The number is set for the process: another Python thread whose
    first operation falls into such a call starts with one.
    """

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _ResultT:
        with _threads:
            count = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return function(*args, **kwargs)
            finally:
                torch.set_num_threads(count)

    return run


@_on_one_thread
def limit_condition(g: Tensor, most: float) -> Tensor:
    """Gram matrices with as much of the identity added as limits their condition numbers (ours).

    Bases of the result satisfy `E S0 C = I` as those of `g` do, but each of C and E has at most this condition number.
    A single projection keeps its singular vectors in their order; those of a pair mix. A block within the limit keeps
    its bits; a block of zeros becomes the identity.

    Args:
        g: (H, d, d) float64, symmetric positive semi-definite.
        most: the limit, above 1; the condition number is that of a factor R, with `G = R^T R`.

    Returns:
        (H, d, d) float64. Costs H d^3.

    Raises:
        ValueError: if a Gram is not finite.
    """
    _check(g)
    values = torch.linalg.eigvalsh(g)
    smallest, largest = values[:, 0], values[:, -1]
    added = ((largest - most**2 * smallest) / (most**2 - 1)).clamp(min=0)
    added = torch.where(largest > 0, added, 1.0)
    return g + torch.diag_embed(added.unsqueeze(-1).expand(values.shape))


def _factor(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors `G = R^T R` by Cholesky; blocks whose Cholesky factor cannot be trusted go through `eigh`.

    Args:
        g: (H, d, d) float64, symmetric positive semi-definite.

    Returns:
        R (H, d, d), its pseudo-inverse (H, d, d), and the number of dropped directions (H,).
    """
    lower, info = torch.linalg.cholesky_ex(g)
    root = lower.mT
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device).expand_as(g)
    inverse = torch.linalg.solve_triangular(root, eye, upper=True)
    condition = torch.linalg.matrix_norm(root) * torch.linalg.matrix_norm(inverse)
    bad = (info != 0) | ~(condition <= CHOLESKY_CONDITION)
    dropped = torch.zeros(g.shape[0], dtype=torch.int64, device=g.device)
    if bad.any():
        root, inverse = root.clone(), inverse.clone()
        values, vectors = torch.linalg.eigh(g[bad])
        sigma = values.clamp(min=0).sqrt().flip(-1)
        vectors = vectors.flip(-1)
        keep = sigma > DROP_BELOW * sigma[:, :1]  # none in a block of zeros
        root[bad] = (sigma * keep).unsqueeze(-1) * vectors.mT
        inverse[bad] = vectors * torch.where(keep, 1 / sigma, 0).unsqueeze(-2)
        dropped[bad] = (~keep).sum(-1)
    return root, inverse, dropped


def _fix_signs(c: Tensor) -> Tensor:
    """Signs (H, r) that make the largest entry of each row of `c` (H, r, d) positive.

    Singular vectors are defined up to sign; with a convention, another machine finds the same ones.
    """
    largest = c.gather(-1, c.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return torch.where(largest < 0, -1.0, 1.0).to(largest)


@_on_one_thread
def pair_bases(g_in: Tensor, g_out: Tensor) -> Bases:
    """Bases of a pair, two projections that meet inside a head: `W_o W_v = V S0 U^T` (Eq. 3, arXiv 2411.17426).

    From Gram matrices (ours): `G_in = R_v^T R_v`, `G_out = R_o^T R_o`, `R_o R_v^T = X S0 Y^T`, `C = Y^T R_v^-T`,
    `E = R_o^-1 X`. Moments of activations in the place of Gram matrices give a data-aware decomposition.

    Args:
        g_in: (H, d, d) float64, the Gram matrix of the value or key, with its bias if it has one.
        g_out: (H, d, d) float64, the Gram matrix of the output or query, summed over the query heads of a group.

    Returns:
        `Bases` with r = d. Costs H d^3.

    Raises:
        ValueError: if a Gram is not finite or the shapes differ.
    """
    _check(g_in)
    _check(g_out)
    if g_in.shape != g_out.shape:
        raise ValueError(
            f"the two Grams of a pair must have one shape, found {tuple(g_in.shape)} and {tuple(g_out.shape)}"
        )
    root_in, inverse_in, dropped_in = _factor(g_in)
    root_out, inverse_out, dropped_out = _factor(g_out)
    x, s0, yt = torch.linalg.svd(root_out @ root_in.mT)
    c = yt @ inverse_in.mT
    e = inverse_out @ x
    degenerate = (dropped_in > 0) | (dropped_out > 0)
    # Both factors of a degenerate pair were cut relative to their norms, so its singular values are cut likewise.
    scale = torch.linalg.matrix_norm(root_in) * torch.linalg.matrix_norm(root_out)
    alive = ~degenerate.unsqueeze(-1) | (s0 > DROP_BELOW**2 * scale.unsqueeze(-1))
    sign = _fix_signs(c) * alive
    return Bases(c * sign.unsqueeze(-1), e * sign.unsqueeze(-2), s0 * alive)


@_on_one_thread
def qr_bases(g: Tensor) -> Bases:
    """Bases of one projection, `W = R^T Q^T`: Q orthonormal and frozen, R trained (Section 3, arXiv 2411.17426).

    `C = R^-T`, `E = I`. A degenerate block has no such R: its directions come from `eigh`, and C has a zero row for
    each dropped one.

    Args:
        g: (H, d, d) float64, the Gram matrix of the projection, with its bias if it has one.

    Returns:
        `Bases` with r = d, `e` None and the singular values of R. Costs H d^3.
    """
    _check(g)
    _, inverse, dropped = _factor(g)
    # As exact as R's own singular values (1e-7 of them at a condition of 1e5), in half the time.
    sigma = torch.linalg.eigvalsh(g).clamp(min=0).sqrt().flip(-1)
    keep = torch.arange(sigma.shape[-1], device=g.device) < sigma.shape[-1] - dropped.unsqueeze(-1)
    return Bases(inverse.mT.contiguous(), None, sigma * keep)


@_on_one_thread
def svd_bases(g: Tensor) -> Bases:
    """Bases of one projection from its singular vectors: `W = L Sigma N^T`, `C = Sigma^-1 L^T`, `E = L`.

    Argument, cost and errors as in `qr_bases`; `e` is E, and the singular values are Sigma.
    """
    _check(g)
    root, _, dropped = _factor(g)
    left, sigma, _ = torch.linalg.svd(root.mT)
    keep = (dropped.unsqueeze(-1) == 0) | (sigma > DROP_BELOW * sigma[:, :1])
    reciprocal = torch.where(keep, 1 / sigma, 0)
    c = reciprocal.unsqueeze(-1) * left.mT
    sign = _fix_signs(c) * keep
    return Bases(c * sign.unsqueeze(-1), left * sign.unsqueeze(-2), sigma * keep)


def _check(g: Tensor) -> None:
    if not torch.isfinite(g).all():
        blocks = (~torch.isfinite(g).flatten(1).all(-1)).nonzero().flatten().tolist()
        named = ", ".join(map(str, blocks[:8])) + (f" and {len(blocks) - 8} more" if len(blocks) > 8 else "")
        raise ValueError(
            f"weights of head(s) {named} contain NaN or infinite values; expected finite weights; "
            "load the base model again from a sound checkpoint"
        )


def fold(s: Tensor, c: Tensor | None, e: Tensor | None) -> Tensor:
    """The d x d map `E S C` of every block, in the dtype of `s`.

    Args:
        s: (H, r, r) for a full matrix, (H, r) for a diagonal.
        c: (H, r, d), or None for the identity.
        e: (H, d, r), or None for the identity.

    Returns:
        (H, d, d).
    """
    if s.ndim == 2:
        s = torch.diag_embed(s) if c is None else s.unsqueeze(-1) * c
        c = None
    result = s if c is None else torch.bmm(s, c)
    return result if e is None else torch.bmm(e, result)


def fold_gradient(gradient: Tensor, c: Tensor | None, e: Tensor | None, is_diagonal: bool) -> Tensor:
    """The gradient of `s` from that of `fold`'s result M: `E^T (dL/dM) C^T` of every block, or its diagonal.

    Shapes as in `fold`; with `is_diagonal`, S is (H, r).
    """
    rows = gradient if e is None else torch.bmm(e.mT, gradient)
    if is_diagonal:
        return rows.diagonal(dim1=-2, dim2=-1) if c is None else (rows * c).sum(-1)
    return rows if c is None else torch.bmm(rows, c.mT)
