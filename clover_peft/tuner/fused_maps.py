"""Maps of blocks onto themselves, applied to features fast, with a backward pass of their own (ours).

With `z_h` the features of block h, M_h its folded map and g_h the gradient of y_h:

    y_h = z_h + M_h z_h                 dL/dz_h = g_h + M_h^T g_h
                                        dL/dM_h = sum over tokens of g_h z_h^T

The last gradient needs z, which nothing else saves. But the operation after a value or an up-projection often saves y,
and with `A_h = I + M_h`

    dL/dM_h = (sum over tokens of g_h y_h^T) A_h^-T

needs only y. The d x d system is solved after the sum over tokens, so its cost does not grow with their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..runtime.tracing import is_captured, is_traced
from .maps import HeadMap, Inversion, Place, StagedMap, formula

# The coarsest rounding of a product: torch may be set to round factors of float32 products to TF32 or bfloat16.
_EPS = torch.finfo(torch.bfloat16).eps
# The largest rounding error of z solved for from y, relative to z.
_MUCH_AMPLIFIED = 0.1


class MapBackwards:
    """Counts the calls of a map's backward pass in this process: after one, an optimizer may have written to S."""

    count = 0


def apply_maps(z: Tensor, maps: Sequence[HeadMap | StagedMap], output_is_kept: bool = False) -> Tensor:
    """`y` of all maps together, each of the same z.

    Args:
        z: (..., features), any floating dtype.
        maps: in any order.
        output_is_kept: the next operation may save y for its backward pass, and does not write into it.

    Returns:
        (..., features), dtype of `z`, also under autocast.
    """
    if torch.is_autocast_enabled(z.device.type):
        with torch.autocast(z.device.type, enabled=False):
            return apply_maps(z, maps, output_is_kept)
    if is_traced() or (len(maps) > 1 and not _are_apart(tuple(m.place for m in maps))):
        return formula(z, maps)
    folded = [m for m in maps if isinstance(m, HeadMap) and m.is_folded]
    if others := [m for m in maps if all(m is not one for one in folded)]:
        z = formula(z, others)  # maps of different features may be applied one after the other
    if not folded:
        return z
    places, matrices = [m.place for m in folded], [m.matrix for m in folded]
    if torch.is_grad_enabled() and (z.requires_grad or any(matrix.requires_grad for matrix in matrices)):
        return _ApplyMaps.apply(z, places, _inversions(folded) if output_is_kept else None, *matrices)
    return _add_up(z, places, matrices)


def _add_up(z: Tensor, places: Sequence[Place], matrices: Sequence[Tensor]) -> Tensor:
    """`y` of maps at places that are apart."""
    [place, *others] = places
    if not others and place.heads.covers(z.shape[-1]):
        # One operation, which needs no copy of z first: a third faster for the blocks of a single token.
        y, tokens = torch.empty_like(z, memory_format=torch.contiguous_format), place.tokens(z)
        torch.baddbmm(tokens, tokens, matrices[0].to(z.dtype).mT, out=place.tokens(y))  # y itself must not be a view
        return y
    y = z.clone(memory_format=torch.contiguous_format)
    for place, matrix in zip(places, matrices, strict=True):
        place.add_(y, place.tokens(z), matrix.to(z.dtype).mT)
    return y


class _ApplyMaps(torch.autograd.Function):
    """`_add_up`, which saves y for its backward pass if that is safe, and otherwise z. Twice differentiable."""

    @staticmethod
    def forward(
        z: Tensor, places: Sequence[Place], inversions: list[Inversion | None] | None, *matrices: Any
    ) -> Tensor:
        return _add_up(z, places, matrices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, ctx.places, ctx.inversions, *matrices = inputs
        kept = None if not any(ctx.needs_input_grad[3:]) else z if ctx.inversions is None else output
        ctx.save_for_backward(kept, *matrices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        MapBackwards.count += 1
        saved = ctx.saved_tensors  # gradient checkpointing computes them now, under autocast if that is on
        with torch.autocast(gradient.device.type, enabled=False):
            return _ApplyMaps._gradients(ctx, gradient, *saved)

    @staticmethod
    def _gradients(ctx: Any, gradient: Tensor, kept: Any, *matrices: Tensor) -> tuple[Tensor | None, ...]:
        grad_z = gradient.clone(memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        grad_matrices: list[Tensor | None] = [None] * len(matrices)
        for i, (place, matrix) in enumerate(zip(ctx.places, matrices, strict=True)):
            grad_y, rounded = place.tokens(gradient), matrix.to(gradient.dtype)
            if ctx.needs_input_grad[3 + i] and ctx.inversions is None:
                grad_matrices[i] = torch.bmm(grad_y.mT, place.tokens(kept)).to(matrix.dtype)
            elif ctx.needs_input_grad[3 + i]:
                # The sum is in the map's own dtype: otherwise a feature with a large mean drowns the others in
                # rounding error.
                square, shared = ctx.inversions[i]
                if shared is None or torch.is_grad_enabled():
                    inverse = inverse_of_one_plus(matrix, square, gradient.dtype)
                else:
                    inverse = shared(gradient.dtype)
                ctx.inversions[i] = Inversion(square)  # lets go of the other layers' inverses
                grad_matrices[i] = torch.bmm(_sum_over_tokens(grad_y, place.tokens(kept), matrix.dtype), inverse.mT)
            if grad_z is not None:
                place.add_(grad_z, grad_y, rounded)
        return grad_z, None, None, *grad_matrices


def _sum_over_tokens(g: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """`sum g y^T`, (H, d, d) in `dtype`, of g and y (H, tokens, d)."""
    if g.is_cuda and g.dtype != dtype and not torch.is_grad_enabled():
        return torch.bmm(g.mT, y, out_dtype=dtype)
    return torch.bmm(g.mT.to(dtype), y.to(dtype))


@lru_cache(maxsize=1024)
def _are_apart(places: tuple[Place, ...]) -> bool:
    """Whether every feature is in one of the places at most."""
    features = [feature for place in places for feature in place.heads.indices()]
    return len(features) == len(set(features))


def _inversions(maps: Sequence[HeadMap]) -> list[Inversion | None] | None:
    """How each of the trained maps is inverted; None if y does not determine z well enough for one of them.

    Finding out waits for the device once, unless it is known; if the norms cannot be read now, the answer is None.
    """
    result = [m.inversion if m.matrix.requires_grad else None for m in maps]
    unknown = [i for i, m in enumerate(maps) if m.matrix.requires_grad and m.inversion is None]
    if unknown:
        some = maps[unknown[0]].matrix
        if type(some) is not Tensor or some.is_meta or is_captured(some):
            return None
        figures = torch.stack([map_norms(maps[i].matrix.detach()) for i in unknown]).tolist()
        for i, (once, twice) in zip(unknown, figures, strict=True):
            result[i] = Inversion(twice if is_invertible(once, twice) else math.inf)
    return None if any(one is not None and one.square == math.inf for one in result) else result


def map_norms(matrix: Tensor) -> Tensor:
    """The largest `||M_h||` and `||M_h^2||` of maps, (..., H, d, d): (..., 2)."""
    return torch.stack([torch.linalg.vector_norm(m, dim=(-2, -1)).amax(-1) for m in (matrix, matrix @ matrix)], -1)


def is_invertible(once: float, twice: float) -> bool:
    """Whether y determines z well enough, from the norms of M and M^2.

    The condition of I + M is at most (1 + ||M||)^2 / (1 - ||M^2||).
    """
    return twice < 1 and (1 + once) ** 2 / (1 - twice) * _EPS <= _MUCH_AMPLIFIED


def inverse_of_one_plus(matrix: Tensor, square: float, applied_in: torch.dtype) -> Tensor:
    """`(I + M)^-1 = (I - M)(I + M^2)(I + M^4)...` to the precision of M's dtype.

    Only products of d x d matrices, without a wait for a norm: on accelerators, a batch of small solves takes many
    times as long.

    Args:
        matrix: (H, d, d), M.
        square: a bound on the norms of M^2, below 1.
        applied_in: the dtype that M was rounded to when it was applied; the rounded map is inverted.

    Returns:
        (H, d, d).
    """
    matrix = matrix.to(applied_in).to(matrix.dtype)
    result = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device) - matrix
    rest = matrix  # invariant: rest^2 = I - (I + M) result
    while square > torch.finfo(matrix.dtype).eps / 2:
        rest = rest @ rest
        result = torch.baddbmm(result, result, rest)
        square = square * square
    return result
