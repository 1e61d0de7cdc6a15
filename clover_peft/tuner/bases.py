"""From a projection's weight to the frozen tensors of an adapter."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..base_model.weight import BaseWeight, Side, partner_side
from ..io.user_warning import warn
from ..linalg.decomposition import Bases, feature_norms, limit_condition, pair_bases, qr_bases, svd_bases
from ..linalg.moments import Moments, pair_grams, shrink
from .block_spec import BlockSpec

_NAMED = 8  # the most targets that a warning names


def warn_of_zero_blocks(found: list[str]) -> None:
    """Warn once of the blocks of zeros that `compute_frozen_tensors` found in a model."""
    if found:
        more = f"; and {len(found) - _NAMED} more target(s)" if len(found) > _NAMED else ""
        warn(
            "a map of zeros is zero: these weights, or the projection that reads them, are zero and will not be "
            f"trained: {'; '.join(found[:_NAMED])}{more}; use another method for these modules, or leave them out "
            "with exclude_modules"
        )


@torch.no_grad()
def compute_frozen_tensors(
    model: nn.Module, base_weight: BaseWeight, specs: tuple[BlockSpec, ...], zero_blocks: list[str] | None = None
) -> dict[str, dict[str, Tensor]] | None:
    """The frozen tensors of a projection's slices.

    Args:
        model: the model that partners' paths are relative to.
        base_weight: the projection's weight.
        specs: its slices.
        zero_blocks: takes a line for each slice with blocks of zeros.

    Returns:
        Slice name -> attribute -> tensor, as in `BlockSpec.base_shapes`; None if the weights cannot be read.

    Raises:
        ValueError: naming the module, for weights that are not finite.
    """

    def of_slice(spec: BlockSpec, own: Side) -> dict[str, Tensor]:
        with partner_side(model, spec.partner) as partner:
            norm = row_norms(spec, own, partner)
            if zero_blocks is not None and (zeros := (norm == 0).all(-1).nonzero().flatten().tolist()):
                zero_blocks.append(f"{base_weight.path} ({spec.part}), block(s) {', '.join(map(str, zeros))}")
            if spec.basis == "folded":
                return {"clover_norm": norm}
            try:
                return {"clover_norm": norm, **stored_bases(compute_bases(spec, own, partner))}
            except ValueError as error:
                raise ValueError(f"{base_weight.path}: {error}") from error

    def of_all() -> dict[str, dict[str, Tensor]] | None:
        with base_weight.whole():
            if not base_weight.is_present:
                return None
            own = base_weight.side
            return {spec.name: of_slice(spec, own) for spec in specs}

    return base_weight.compute(of_all)


def stored_bases(bases: Bases) -> dict[str, Tensor]:
    """The tensors of bases by the names that a layer has for them; an identity is not stored."""
    found = {"clover_U": bases.c, "clover_S0": bases.singular_values, "clover_V": bases.e}
    return {attribute: tensor for attribute, tensor in found.items() if tensor is not None}


def row_norms(spec: BlockSpec, own: Side, partner: Side | None, features: int | None = None) -> Tensor:
    """Norms of the weight's rows, (H, d), or of the first features of each block; for a pair, times the norms of what
    the partner has for the same features, over all heads that share them."""
    found = feature_norms(spec.heads.blocks(own.weight, spec.size)[..., :features])
    if partner is None:
        return found
    assert spec.partner is not None
    heads, count = spec.partner.heads, spec.heads.count
    beside = feature_norms(heads.blocks(partner.weight, spec.size)[..., :features]).to(found)
    shared = beside.unflatten(0, (count, heads.count // count, -1))
    return found * torch.linalg.vector_norm(shared, dim=1).flatten(0, 1)


def compute_bases(
    spec: BlockSpec,
    own: Side,
    partner: Side | None,
    own_moments: Moments | None = None,
    partner_moments: Moments | None = None,
) -> Bases:
    """Bases of one slice: of the pair, from the Gram matrices of both projections, or of the projection alone.

    Moments of activations replace the Grams of the weights that compute them (`pair_grams`). Each block's C and E then
    have the size that they have without moments, so that learning rates carry over.
    """

    def decompose(grams: tuple[Tensor, ...]) -> Bases:
        if spec.max_condition is not None:
            grams = tuple(limit_condition(g, spec.max_condition) for g in grams)
        alone = qr_bases if spec.basis == "qr" else svd_bases
        bases = pair_bases(*grams) if len(grams) > 1 else alone(*grams)
        return bases if spec.r == spec.size else bases.leading(spec.r)

    g_in = own.gram(spec.heads, spec.size)
    if partner is None:
        plain: tuple[Tensor, ...] = (g_in,)
        found = plain if own_moments is None else (shrink(own_moments.second.to(g_in), g_in, own_moments.tokens),)
    else:
        assert spec.partner is not None
        g_out = partner.gram(spec.partner.heads, spec.size)
        grams = partial(pair_grams, g_in, g_out, spec.heads.count, reads=spec.partner.reads)
        plain = grams()[:2]
        found = grams(own=own_moments, partner=partner_moments)[:2]
    if own_moments is None and partner_moments is None:
        return decompose(plain)
    return decompose(found).as_strong_as(decompose(plain), *plain)
