"""From a model's weights to the frozen tensors of its CLOVER layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..base_model.weight import partner_weight
from ..io.user_warning import warn
from ..linalg.decomposition import (
    Bases,
    gram,
    limit_condition,
    pair_bases,
    qr_bases,
    svd_bases,
)
from ..linalg.moments import Moments, pair_grams, shrink
from .base_check import row_norms
from .block_spec import BlockSpec
from .layer import CloverLayer

_NAMED = 8  # the most targets that a warning names


def clover_layers(model: nn.Module, adapter_name: str | None = None) -> list[tuple[str, CloverLayer]]:
    """Every CLOVER layer of a model and its path; with a name, the layers that have this adapter."""
    layers = _clover_layers(model, "", set())
    return [(path, layer) for path, layer in layers if adapter_name is None or adapter_name in layer.specs]


def _clover_layers(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, CloverLayer]]:
    """As `named_modules`, which would also walk over the containers of tensors in each layer: 20 modules for one."""
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, CloverLayer):
        yield path, module
    for name, child in (
        [("base_layer", module.base_layer)] if isinstance(module, CloverLayer) else module.named_children()
    ):
        yield from _clover_layers(child, f"{path}.{name}".removeprefix("."), seen)


def layers_with(model: nn.Module, adapter_name: str) -> list[tuple[str, CloverLayer]]:
    """The layers that have an adapter, and their paths.

    Raises:
        ValueError: if there are none.
    """
    if layers := clover_layers(model, adapter_name):
        return layers
    raise ValueError(f"adapter {adapter_name!r}: expected a model with this CLOVER adapter, found none")


def unwrap_empty_layers(model: nn.Module) -> None:
    """Put the projections of layers without an adapter back in their places."""
    for name, layer in reversed(clover_layers(model)):  # a module inside another one first
        if not layer.specs:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)


def inner_model(model: nn.Module) -> nn.Module:
    """The adapted model inside a `PeftModel` or tuner; partners' paths are relative to it."""
    tuner = model if isinstance(model, BaseTuner) else getattr(model, "base_model", None)
    return tuner.model if isinstance(tuner, BaseTuner) else model


def warn_of_zero_blocks(found: list[str]) -> None:
    """Warn once of the blocks of zeros that `frozen_tensors` found in a model."""
    if found:
        more = f"; and {len(found) - _NAMED} more target(s)" if len(found) > _NAMED else ""
        warn(
            "a map of zeros is zero: these weights, or the projection that reads them, are zero and will not be "
            f"trained: {'; '.join(found[:_NAMED])}{more}; use another method for these modules, or leave them out "
            "with exclude_modules"
        )


@torch.no_grad()
def frozen_tensors(
    model: nn.Module, layer: CloverLayer, specs: tuple[BlockSpec, ...], zero_blocks: list[str] | None = None
) -> dict[str, dict[str, Tensor]] | None:
    """The frozen tensors of a layer's slices, computed from the base weights.

    Args:
        model: the model that partners' paths are relative to.
        layer: the layer.
        specs: its slices.
        zero_blocks: takes a line for each slice with blocks of zeros.

    Returns:
        Slice name -> attribute -> tensor, as in `BlockSpec.base_shapes`; None if the weights cannot be read.

    Raises:
        ValueError: naming the module, for weights that are not finite.
    """

    def compute() -> dict[str, dict[str, Tensor]] | None:
        with layer.base_weight.whole():
            if not layer.base_weight.is_present:
                return None
            weight, bias = layer.base_weight.transposed(), layer.base_weight.bias
            result = {}
            for spec in specs:
                norm = row_norms(model, spec, weight)
                result[spec.name] = {"clover_norm": norm}
                if zero_blocks is not None and (zeros := (norm == 0).all(-1).nonzero().flatten().tolist()):
                    zero_blocks.append(f"{layer.name} ({spec.part}), block(s) {', '.join(map(str, zeros))}")
                if spec.basis != "folded":
                    try:
                        bases = compute_bases(model, spec, weight, bias)
                    except ValueError as error:
                        raise ValueError(f"{layer.name}: {error}") from error
                    result[spec.name] |= stored_bases(bases)
            return result

    return layer.base_weight.compute(compute)


def stored_bases(bases: Bases) -> dict[str, Tensor]:
    """The tensors of bases by the names that a layer has for them; an identity is not stored."""
    found = {"clover_U": bases.coordinates, "clover_S0": bases.singular_values, "clover_V": bases.back}
    return {attribute: tensor for attribute, tensor in found.items() if tensor is not None}


def compute_bases(
    model: nn.Module,
    spec: BlockSpec,
    weight: Tensor,
    bias: Tensor | None,
    own: Moments | None = None,
    partner: Moments | None = None,
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

    g_in = gram(spec.heads.blocks(weight, spec.size), None if bias is None else spec.heads.blocks(bias, spec.size))
    plain: tuple[Tensor, ...] = (g_in,)
    found: tuple[Tensor, ...] | None = None
    if spec.partner is None:
        if own is not None:
            found = (shrink(own.second.to(g_in.device), g_in, own.tokens),)
    else:
        heads, reads, count = spec.partner.heads, spec.partner.reads, spec.heads.count
        with partner_weight(model, spec.partner) as (rows, partner_bias):
            g_out = gram(
                heads.blocks(rows, spec.size), None if partner_bias is None else heads.blocks(partner_bias, spec.size)
            )
        plain = pair_grams(g_in, g_out, count, reads=reads)[:2]
        if own is not None or partner is not None:
            found = pair_grams(g_in, g_out, count, reads=reads, own=own, partner=partner)[:2]
    return decompose(plain) if found is None else decompose(found).as_strong_as(decompose(plain), *plain)
