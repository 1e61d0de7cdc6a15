"""Measures of one changed weight: spectrum of the update, intruder dimensions, data on trained directions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...linalg.spectra import effective_rank
from .changes import Change

SHOWN = 128  # singular values of a spectrum that are kept, evenly spaced
ZERO = 1e-4  # A singular value below this share of the largest counts as zero.


def measure(change: Change, inputs: Tensor | None = None, top: int = 10, threshold: float = 0.5) -> dict[str, Any]:
    """Measure one projection; the result is ready for JSON.

    Args:
        change: the weight before and after.
        inputs: the projection's inputs, (rows, in features), from `collect_inputs`.
        top: how many leading left singular vectors of the changed weight are checked for intruder dimensions
            (Shuttleworth et al., arXiv 2410.21228).
        threshold: a vector whose cosine with every left singular vector of `before` is below this is an intruder.

    Returns:
        `name`, `shape`; `update`: `norm`, `relative` (to the weight's), `rank`, `effective_rank`, `stable_rank`,
        `singular_values`; `before` and `after`: `singular_values`; `intruders`: `count`, `similarities` (top) and
        `matrix` (top x top); with inputs `share`: `trained` (see `projected_share`) and `chance` (rank / in features).

    Raises:
        ValueError: a weight is not finite; the message names the module.
    """
    if not change.before.isfinite().all() or not change.after.isfinite().all():
        raise ValueError(f"{change.name}: expected finite weights, found others; its training diverged")
    update = change.after - change.before
    _, values, vt = torch.linalg.svd(update, full_matrices=False)
    before, after = (torch.linalg.svd(w, full_matrices=False) for w in (change.before, change.after))
    # The merged weight is rounded: noise of at most half a unit in the last place, whose norm is about that.
    eps = torch.finfo(_stored(change.after)).eps
    noise = eps / 2 * change.after.square().mean().sqrt() * sum(s**0.5 for s in update.shape)
    rank = int((values > max(ZERO * values[0], noise)).sum())
    similarities, matrix = _similarities(before, after, top)
    result: dict[str, Any] = {
        "name": change.name,
        "shape": list(change.before.shape),
        "update": {
            "norm": float(values.norm()),
            "relative": float(values.norm() / change.before.norm()) if change.before.any() else math.inf,
            "rank": rank,
            "effective_rank": effective_rank(values),
            "stable_rank": float((values / values[0]).square().sum()) if rank else 0.0,
            "singular_values": _shown(values),
        },
        "before": {"singular_values": _shown(before.S)},
        "after": {"singular_values": _shown(after.S)},
        "intruders": {
            "count": int((similarities < threshold).sum()),
            "similarities": [round(cosine, 4) for cosine in similarities.tolist()],
            "matrix": [[round(cosine, 4) for cosine in row] for row in matrix.tolist()],
        },
    }
    if inputs is not None:
        share = projected_share(inputs.to(vt), vt[:rank].T)
        result["share"] = {"trained": share, "chance": rank / change.before.shape[1]}
    return result


def _stored(weight: Tensor) -> torch.dtype:
    """Return the dtype that a weight was rounded to: the coarsest that holds it, as loading may have widened it."""
    narrow = (torch.bfloat16, torch.float16, torch.float32)
    return next((dtype for dtype in narrow if torch.equal(weight.to(dtype).to(weight), weight)), weight.dtype)


def projected_share(inputs: Tensor, directions: Tensor) -> float:
    """Return the share of a projection's inputs that lies on the directions that the update uses (figure 4).

    Args:
        inputs: (rows, in features).
        directions: (in features, rank), orthonormal columns: the update's right singular vectors.

    Returns:
        The share of the inputs' sum of squares, 0 to 1; for random directions it is about rank / in features.
    """
    total = inputs.square().sum()
    return float((inputs @ directions).square().sum() / total) if total > 0 else 0.0


def _similarities(before: Any, after: Any, top: int) -> tuple[Tensor, Tensor]:
    """Return the largest cosine of each leading vector of `after` with one of `before`, and all leading cosines."""
    real = ZERO * before.S[0] < before.S  # The vectors of zero singular values are arbitrary.
    cosines = (after.U[:, :top].T @ before.U[:, real]).abs()
    if not real.any():  # The weight was zero.
        return cosines.new_zeros(len(cosines)), cosines
    return cosines.amax(dim=1), cosines[:, :top]


def _shown(values: Tensor) -> list[float]:
    chosen = torch.linspace(0, len(values) - 1, min(SHOWN, len(values)), device=values.device).round().long()
    return [float(f"{value:.6g}") for value in values[chosen].tolist()]
