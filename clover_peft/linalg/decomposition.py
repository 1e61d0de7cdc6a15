"""Bases of attention heads from d x d Gram matrices: pure, batched tensor functions.

Nothing here knows about modules or adapters. Shapes use H for the number of blocks (heads, or parts of heads), d for
the features of a block, r <= d for the directions kept and D for the hidden size. Everything is computed in float64
and batched over H; no D x D matrix is ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A Cholesky factor whose Frobenius condition exceeds this is not trusted: the block goes through `eigh` instead.
MAX_CONDITION = 1e6
# Directions of an ill-conditioned block below this fraction of the largest singular value are dropped.
DROP_BELOW = 1e-5
# The share of a map, condition x eps(compute dtype), up to which rounding that a head's condition amplifies is borne.
MUCH_AMPLIFIED = 0.1
# Rows of a weight are cast to float64 in pieces of at most this many elements, so that no whole weight is ever cast;
# 8 MB stay in a CPU's cache, which makes a Gram 1.6 times as fast as pieces of 64 MB.
_CHUNK_ELEMENTS = 1_048_576


@dataclass(frozen=True)
class Bases:
    """Frozen bases of H blocks, in the coordinates of the blocks' own outputs `z` (ours; DESIGN: head space).

    With `U`, `V` the orthonormal bases of the paper (Eq. 3, arXiv 2411.17426), `coordinates @ z = U^T x` and
    `W_o @ back = V`, so that `back @ diag(S0) @ coordinates = I` whenever nothing was cut or dropped.

    Attributes:
        coordinates: (H, r, d) float64, C. A dropped direction is a zero row.
        back: (H, d, r) float64, E, or None where it is the identity (QR basis).
        singular_values: (H, r) float64, S0, descending (for the QR basis those of R: there S0 is R^T, not diagonal).
        dropped: (H,) int64, the number of directions dropped because the block is degenerate.
        condition: (H,) float64, how much `coordinates` (and `back`) amplify rounding: an upper estimate of the
            condition number of the block, over the directions that were not dropped.
    """

    coordinates: Tensor
    back: Tensor | None
    singular_values: Tensor
    dropped: Tensor
    condition: Tensor

    def leading(self, r: int) -> Bases:
        """The first `r` directions; the others are left out (not zeroed). Dropped ones are the last, and go first."""
        left_out = self.coordinates.shape[1] - r
        back = None if self.back is None else self.back[..., :r].contiguous()
        return Bases(
            self.coordinates[:, :r].contiguous(),
            back,
            self.singular_values[:, :r].clone(),
            (self.dropped - left_out).clamp(min=0),
            self.condition,
        )


def gram(blocks: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gram matrices `sum_t w_t w_t^T` of every block; with a bias that of `[W b]`. Costs D H d^2.

    Args:
        blocks: (D, H, d), any floating dtype: for a projection `W` (out, in) this is `W^T` with its outputs cut into
            blocks, for an output projection `W` itself with its inputs cut into blocks.
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


def norms(blocks: Tensor) -> Tensor:
    """Norms over D of every feature, (D, H, d) to (H, d), in at least float32 on the device of `blocks`."""
    dtype = torch.promote_types(blocks.dtype, torch.float32)
    if blocks.device.type != "cpu":
        return torch.linalg.vector_norm(blocks, dim=0, dtype=dtype)
    # There the same takes 10 to 20 times as long, but for float32 that lies in one piece for each feature.
    squares = torch.empty(blocks.shape[1:], dtype=dtype)
    step = max(1, _CHUNK_ELEMENTS // max(1, blocks.shape[0] * blocks.shape[2]))
    for start in range(0, blocks.shape[1], step):
        squares[start : start + step] = blocks[:, start : start + step].to(dtype).square().sum(0)
    return squares.sqrt()


def per_key_value_head(g: Tensor, heads: int, groups: int) -> Tensor:
    """Sums over the query heads that share a key-value head: (heads * groups * b, d, d) to (heads * b, d, d), with b
    blocks a head."""
    return g.unflatten(0, (heads, groups, -1)).sum(1).flatten(0, 1)


def _factor(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors `G = R^T R`: Cholesky where it can be trusted, otherwise that block alone by `eigh`.

    Args:
        g: (H, d, d) float64, symmetric positive semi-definite.

    Returns:
        R (H, d, d), its pseudo-inverse (H, d, d), the number of dropped directions (H,).
    """
    lower, info = torch.linalg.cholesky_ex(g)
    root = lower.mT
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device).expand_as(g)
    inverse = torch.linalg.solve_triangular(root, eye, upper=True)
    condition = torch.linalg.matrix_norm(root) * torch.linalg.matrix_norm(inverse)
    bad = (info != 0) | ~(condition <= MAX_CONDITION)
    dropped = torch.zeros(g.shape[0], dtype=torch.int64, device=g.device)
    if bad.any():
        root, inverse = root.clone(), inverse.clone()
        values, vectors = torch.linalg.eigh(g[bad])
        sigma = values.clamp(min=0).sqrt().flip(-1)
        vectors = vectors.flip(-1)
        largest = sigma[:, :1]
        keep = (sigma > DROP_BELOW * largest) & (largest > 0)
        kept_sigma = torch.where(keep, sigma, torch.zeros_like(sigma))
        reciprocal = torch.where(keep, 1 / sigma, torch.zeros_like(sigma))
        root[bad] = kept_sigma.unsqueeze(-1) * vectors.mT
        inverse[bad] = vectors * reciprocal.unsqueeze(-2)
        dropped[bad] = (~keep).sum(-1)
    return root, inverse, dropped


def _condition(sigma: Tensor, dropped: Tensor) -> Tensor:
    """Largest over smallest singular value (H, d), descending, that was not dropped; 1 where all were."""
    last = (sigma.shape[-1] - 1 - dropped).clamp(min=0).unsqueeze(-1)
    smallest = sigma.gather(-1, last).squeeze(-1)
    return torch.where(smallest > 0, sigma[:, 0] / smallest, torch.ones_like(smallest))


def _fix_signs(coordinates: Tensor) -> Tensor:
    """+-1 per direction, (H, r), that makes the largest entry of each row of `coordinates` (H, r, d) positive.

    Singular vectors are defined up to sign; a convention lets a decomposition be repeated elsewhere.
    """
    largest = coordinates.gather(-1, coordinates.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return torch.where(largest < 0, -torch.ones_like(largest), torch.ones_like(largest))


def pair_bases(g_in: Tensor, g_out: Tensor) -> Bases:
    """Bases of the product of two projections that meet inside a head: `W_o W_v = V S0 U^T` (Eq. 3, arXiv 2411.17426).

    Ours in that it starts from Grams: `G_in = R_v^T R_v`, `G_out = R_o^T R_o`, `R_o R_v^T = X S0 Y^T`,
    `C = Y^T R_v^-T`, `E = R_o^-1 X`. With activation moments for Grams the same function is data-aware.

    Args:
        g_in: (H, d, d) float64, the Gram of the wrapped projection's rows (value or key), with its bias if it has one.
        g_out: (H, d, d) float64, the Gram of the partner (output columns or query rows), summed over the query heads
            that share a key-value head.

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
    coordinates = yt @ inverse_in.mT
    back = inverse_out @ x
    degenerate = (dropped_in > 0) | (dropped_out > 0)
    # A direction of a degenerate pair is alive only if its singular value is, on the scale both factors were cut at.
    scale = torch.linalg.matrix_norm(root_in) * torch.linalg.matrix_norm(root_out)
    alive = ~degenerate.unsqueeze(-1) | (s0 > DROP_BELOW**2 * scale.unsqueeze(-1))
    sign = _fix_signs(coordinates) * alive
    return Bases(
        coordinates * sign.unsqueeze(-1),
        back * sign.unsqueeze(-2),
        s0 * alive,
        (~alive).sum(-1),
        torch.maximum(
            *(
                _condition(torch.linalg.eigvalsh(g).clamp(min=0).sqrt().flip(-1), n)
                for g, n in ((g_in, dropped_in), (g_out, dropped_out))
            )
        ),
    )


def qr_bases(g: Tensor) -> Bases:
    """Bases of one projection, `W = R^T Q^T`: Q orthonormal and frozen, R trained (Section 3, arXiv 2411.17426).

    `C = R^-T` and `E = I`, which is not stored. A degenerate block has no such R; its directions come from `eigh` and
    the dropped ones are zero rows of C.

    Args:
        g: (H, d, d) float64, the Gram of the projection's rows (with the bias, if there is one).

    Returns:
        `Bases` with r = d, `back` None and `singular_values` those of R. Costs H d^3.

    Raises:
        ValueError: if the Gram is not finite.
    """
    _check(g)
    root, inverse, dropped = _factor(g)
    sigma = torch.linalg.svdvals(root)
    return Bases(inverse.mT.contiguous(), None, sigma, dropped, _condition(sigma, dropped))


def svd_bases(g: Tensor) -> Bases:
    """Bases of one projection by its singular vectors: `W = L Sigma N^T`, `C = Sigma^-1 L^T`, `E = L`.

    Args:
        g: (H, d, d) float64, the Gram of the projection's rows (with the bias, if there is one).

    Returns:
        `Bases` with r = d, `singular_values` = Sigma. Costs H d^3.

    Raises:
        ValueError: if the Gram is not finite.
    """
    _check(g)
    root, _, dropped = _factor(g)
    left, sigma, _ = torch.linalg.svd(root.mT)
    keep = (dropped.unsqueeze(-1) == 0) | (sigma > DROP_BELOW * sigma[:, :1])
    reciprocal = torch.where(keep, 1 / sigma, torch.zeros_like(sigma))
    coordinates = reciprocal.unsqueeze(-1) * left.mT
    sign = _fix_signs(coordinates) * keep
    condition = sigma[:, 0] * reciprocal.amax(-1)
    return Bases(coordinates * sign.unsqueeze(-1), left * sign.unsqueeze(-2), sigma * keep, (~keep).sum(-1), condition)


def _check(g: Tensor) -> None:
    if not torch.isfinite(g).all():
        blocks = (~torch.isfinite(g).flatten(1).all(-1)).nonzero().flatten().tolist()
        raise ValueError(
            f"weights of head(s) {_shorten(blocks)} contain NaN or infinite values; expected finite weights; "
            "load the base model again from a sound checkpoint"
        )


def _shorten(items: list[int]) -> str:
    return ", ".join(map(str, items[:8])) + (f" and {len(items) - 8} more" if len(items) > 8 else "")


def describe_dropped(bases: Bases) -> str | None:
    """One phrase that names the degenerate blocks and how many of their directions were dropped, or None."""
    blocks = bases.dropped.nonzero().flatten().tolist()
    if not blocks:
        return None
    counts = bases.dropped[blocks].tolist()
    named = ", ".join(
        f"{block} ({count} of {bases.coordinates.shape[-1]})" for block, count in zip(blocks[:8], counts, strict=False)
    )
    return named + (f" and {len(blocks) - 8} more" if len(blocks) > 8 else "")


def fold(s: Tensor, coordinates: Tensor | None, back: Tensor | None) -> Tensor:
    """The d x d map `E S C` of every block, in the dtype of `s`.

    Args:
        s: (H, r, r) for a full matrix, (H, r) for a diagonal.
        coordinates: (H, r, d), or None for the identity.
        back: (H, d, r), or None for the identity.

    Returns:
        (H, d, d).
    """
    if s.ndim == 2:
        s = torch.diag_embed(s) if coordinates is None else s.unsqueeze(-1) * coordinates
        coordinates = None
    result = s if coordinates is None else torch.bmm(s, coordinates)
    return result if back is None else torch.bmm(back, result)


@dataclass(frozen=True)
class Factors:
    """The paper's explicit factors of H blocks: `V S U^T` is the block's product of weights.

    Attributes:
        U: (H, D_in, r), columns orthonormal; D_in counts one more row, the last, where the projection has a bias.
        S: (H, r, r), the current matrix (frozen singular values plus the trained offset).
        V: (H, D_out, r), columns orthonormal; the identity (D_out = d) for an intra-layer QR basis.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    def product(self) -> Tensor:
        """`V S U^T`, (H, D_out, D_in): for tests and analysis of small models only."""
        return self.V @ self.S @ self.U.mT


def factors(
    rows: Tensor, columns: Tensor | None, s: Tensor, coordinates: Tensor, back: Tensor | None = None
) -> Factors:
    """The explicit factors of H blocks from their weights, in float64 (Eq. 3, arXiv 2411.17426).

    `U = W^T C^T`, `V = W_o E`, and S is `V^T W_o W U` plus the trained offset, worked out from the small sides: costs
    (D_in + D_out) H d^2.

    Args:
        rows: (H, D_in, d), the projection's rows, transposed, with the bias as one more row of D_in.
        columns: (H, D_out, d), the partner's side, or None for an intra-layer target.
        s: (H, r, r) or (H, r), the trained offset dS.
        coordinates: (H, r, d), C.
        back: (H, d, r), E, or None for the identity.

    Returns:
        `Factors`.
    """
    rows, s, coordinates = rows.double(), s.double(), coordinates.double()
    u = rows @ coordinates.mT
    v = torch.eye(rows.shape[-1], dtype=u.dtype, device=u.device).expand(len(rows), -1, -1)
    if back is not None:
        v = back.double()
    product_side = v
    if columns is not None:
        v = columns.double() @ v
        product_side = columns.double().mT @ v
    s0 = product_side.mT @ (rows.mT @ u)
    return Factors(u, s0 + (torch.diag_embed(s) if s.ndim == 2 else s), v)
