"""Directions of all heads of an attention block, fitted together to what the output projection computes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg.decomposition import limit_condition, pair_bases
from ..linalg.moments import diagonal_blocks

_ITERATIONS = 20  # of L-BFGS: on SmolLM2-135M, 40 take twice as long and lower the error by 1.5 % more
_CONDITION = 1e3  # of a factor of a head's moments, whose own is 1e6: smaller ones are rounding errors of float32 sums
_RIDGE = 1e-6  # of kept coordinates, each scaled to 1, for the same reason


def joint_moments(own: Tensor, joint: Tensor, tokens: int, half: tuple[Tensor, int] | None = None) -> Tensor:
    """Second moments of all heads' features together (ours). The part between heads is reduced: some of it is noise.

    In coordinates in which `own` is the identity, the part between heads is multiplied by the share of its squares
    that is no noise, as in James and Stein's estimator. Two halves of the data do not share their noise, so their
    moments are compared. Without halves, T independent tokens are assumed, which leave about `tr M_gg tr M_hh / T` of
    squares between two heads that have nothing in common; tokens of one text are not independent.

    Args:
        own: (G, d, d) float64, the moments of every head, drawn towards the weights by `moments.shrink`.
        joint: (n, n) float64, with n = G d, as they were found.
        tokens: T, that it was made of.
        half: those of a part of the tokens, and their number.

    Returns:
        (n, n) float64, positive semidefinite: `own` on the diagonal, with condition numbers that float32 can hold, and
        the rest of `joint` times a share from 0 to T / (d + T). Costs n^2 d.
    """
    count, size = own.shape[:2]
    own = limit_condition(own, _CONDITION)
    factor = torch.linalg.cholesky(own)

    def between(moments: Tensor) -> tuple[Tensor, Tensor]:
        """The whitened part between heads, and the traces of the rest."""
        rows = torch.linalg.solve_triangular(factor, moments.reshape(count, size, -1), upper=False).flatten(0, 1)
        both = torch.linalg.solve_triangular(factor, rows.mT.reshape(count, size, -1), upper=False).flatten(0, 1)
        inside = diagonal_blocks(both, count)
        traces = inside.diagonal(dim1=1, dim2=2).sum(-1)
        inside.zero_()
        return both, traces

    whole, traces = between(joint)
    squares = whole.square().sum()
    if half is not None and 0 < half[1] < tokens:
        first, _ = between(half[0])
        second = (tokens * whole - half[1] * first) / (tokens - half[1])
        signal = (first * second).sum()
    else:
        signal = squares - (traces.sum().square() - traces.square().sum()) / max(1, tokens)
    share = (signal / squares.clamp(min=1e-300)).clamp(0, tokens / (size + tokens))
    result = joint * share
    diagonal_blocks(result, count).copy_(own)
    return result


def fit_back(down: Tensor, moments: Tensor) -> Tensor:
    """The map back from the kept coordinates of all heads to all features, with the least mean squared error.

    `E = M C^T (C M C^T)^-1`, with a small ridge. A feature of one head is also predicted from the coordinates of the
    others. The features of a head whose C is the identity stay exactly as they are. Costs n^3.

    Args:
        down: (G, d, d) float64, C of every query head; rows of removed directions are zero.
        moments: M, (n, n) float64, with n = G d, from `joint_moments`.

    Returns:
        (G, d, G, d) float64: from the coordinates in the last two dimensions to features in the first two.
    """
    count, size = down.shape[:2]
    kept = down.flatten(0, 1).any(-1)
    read = torch.einsum("xgd,grd->xgr", moments.unflatten(1, (count, size)), down).flatten(1)
    inner = torch.einsum("grd,gdx->grx", down, read.unflatten(0, (count, size))).flatten(0, 1)[kept][:, kept]
    unit = inner.diagonal().sqrt()
    scaled = inner / unit / unit.unsqueeze(1)
    scaled.diagonal().add_(_RIDGE)
    back = torch.zeros_like(read)
    back[:, kept] = torch.cholesky_solve((read[:, kept] / unit).mT, torch.linalg.cholesky(scaled)).mT / unit
    eye = torch.eye(size).to(down)
    whole = (down == eye).flatten(1).all(1)
    back.view(count, size, -1)[whole] = 0
    diagonal_blocks(back, count)[whole] = eye
    return back.view(count, size, count, size)


def fit_down(down: Tensor, moments: Tensor, gram: Tensor, groups: int) -> Tensor:
    """Turn the kept directions of all heads so that the block's output changes least, if `fit_back` follows (ours).

    The singular directions of a head are best for that head alone. Here the error of the whole block,
    `tr((I - E C) M (I - E C)^T G)`, is lowered by L-BFGS from these, over the directions of all heads at once. With
    `X = M G M` it is `tr(M G) - tr((C M C^T)^-1 C X C^T)`, so that only small products depend on C.

    Args:
        down: C, (H, d, d) float64, of every key-value head; rows of removed directions are zero and come last.
        moments: M, (n, n) float64, of the features that the output projection reads, with n = H groups d, from
            `joint_moments`.
        gram: G, (n, n) float64, the Gram `W_o^T W_o` of the output projection.
        groups: query heads that share a key-value head.

    Returns:
        (H, d, d) float64, with as many rows for each head; `down` itself if nothing better is found, and for a head
        that keeps all its directions. Costs n^3, and R^3 a step with R kept coordinates.
    """
    heads, size = down.shape[:2]
    kept = down.any(-1)
    if not (widest := int(kept.sum(-1).max())):
        return down
    kept_rows = kept[:, :widest].unsqueeze(1).expand(-1, groups, -1).flatten()
    shape = (heads, groups, size, heads, groups, size)
    read, written = moments.view(shape), (moments @ gram @ moments).view(shape)
    root = torch.linalg.cholesky(_of_heads(moments, heads, groups).sum(1))  # L, with L L^T a head's own moments

    def from_whitened(rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(root, rows, upper=False, left=False)

    def sandwich(c: Tensor, middle: Tensor) -> Tensor:
        """`C A C^T` for the kept rows of all query heads."""
        product = torch.einsum("krd,kgdlhe,lse->kgrlhs", c, middle, c).reshape(len(kept_rows), len(kept_rows))
        return product[kept_rows][:, kept_rows]

    rows = torch.linalg.qr((down[:, :widest] @ root).mT)[0].mT.contiguous().requires_grad_()
    search = torch.optim.LBFGS([rows], max_iter=_ITERATIONS, history_size=10, line_search_fn="strong_wolfe")
    explained: list[float] = []

    def closure() -> float:
        c = from_whitened(rows)
        k, y = sandwich(c, read), sandwich(c, written)
        with torch.no_grad():
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(k))
            product = inverse @ y
            outer = product @ inverse
        # The gradient of tr(K^-1 Y), without a pass back through the inverse.
        (gradient,) = torch.autograd.grad((outer * k).sum() - (inverse * y).sum(), rows)
        explained.append(float(product.trace()))
        percent = 100 / explained[0] if explained[0] else 0.0  # L-BFGS stops at absolute changes
        rows.grad = (gradient * percent).contiguous()
        return -percent * explained[-1]

    try:
        with torch.enable_grad():
            search.step(closure)
            closure()
    except torch.linalg.LinAlgError:  # A step made the kept directions of some heads dependent.
        return down
    if not explained[-1] > explained[0]:
        return down
    result = torch.zeros_like(down)
    result[:, :widest] = from_whitened(rows.detach()) * kept[:, :widest].unsqueeze(-1)
    return torch.where(kept.all(-1).view(-1, 1, 1), down, result)


def balance(down: Tensor, back: Tensor, moments: Tensor, gram: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Write the product of C and E in the singular directions of every key-value head, `S^1/2` on both sides.

    Args:
        down: C, (H, d, d) float64, from `fit_down`.
        back: E, (G, d, G, d) float64, from `fit_back`; the rest as in `fit_down`.

    Returns:
        C and E in these shapes; their product is the same. C of a head that keeps all its directions stays as it is.
    """
    heads, size = down.shape[:2]
    own = _of_heads(moments, heads, groups).mean(1)
    columns = back.flatten(0, 1).permute(1, 0, 2)  # (G, n, d)
    written = (columns.mT @ gram @ columns).unflatten(0, (heads, groups)).sum(1)
    bases = pair_bases(down @ own @ down.mT, written)
    assert bases.e is not None  # Only the basis of a single projection is the identity.
    root = bases.singular_values.sqrt()
    whole = down.any(-1).all(-1).view(-1, 1, 1)
    eye = torch.eye(size).to(down)
    into = torch.where(whole, eye, root.unsqueeze(-1) * bases.c)
    out_of = torch.where(whole, eye, bases.e * root.unsqueeze(-2)).repeat_interleave(groups, dim=0)
    return into @ down, torch.einsum("gdhr,hrs->gdhs", back, out_of)


def _of_heads(moments: Tensor, heads: int, groups: int) -> Tensor:
    """The diagonal blocks of (n, n) moments, (H, groups, d, d): those of every query head."""
    return diagonal_blocks(moments, heads * groups).unflatten(0, (heads, groups))
