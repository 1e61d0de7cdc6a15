"""From a model's weights to the frozen tensors of its CLOVER layers, to fingerprints and to the paper's factors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..base_model.weight import partner_weight
from ..io.user_warning import warn
from ..linalg.decomposition import (
    MUCH_AMPLIFIED,
    Bases,
    describe_dropped,
    gram,
    pair_bases,
    qr_bases,
    svd_bases,
)
from ..linalg.moments import Moments, pair_grams, shrink
from ..runtime.sharding import only_rank_0_has_weights
from .adapter_tensors import FROZEN
from .base_check import row_norms
from .block_spec import BlockSpec
from .layer import CloverLayer

_NAMED = 8  # degenerate targets that a warning names


def clover_layers(model: nn.Module) -> list[tuple[str, CloverLayer]]:
    """Every CLOVER layer of a model and its path."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, CloverLayer)]


def inner_model(model: nn.Module) -> nn.Module:
    """The adapted model itself, inside a `PeftModel` or tuner; partners' paths are relative to it."""
    tuner = model if isinstance(model, BaseTuner) else getattr(model, "base_model", None)
    return tuner.model if isinstance(tuner, BaseTuner) else model


class BasesReport:
    """Collects what is wrong with the bases of a model's targets, for one warning of each kind."""

    def __init__(self) -> None:
        self._dropped: dict[str, str] = {}  # target -> its degenerate blocks
        self._conditions: dict[str, float] = {}  # target -> condition, where it amplifies rounding too much

    def add(self, layer: CloverLayer, spec: BlockSpec, bases: Bases) -> None:
        """Look at the bases of one slice of a layer."""
        name, condition = f"{layer.name} ({spec.part})", float(bases.condition.max())
        if (dropped := describe_dropped(bases)) is not None:
            self._dropped[name] = dropped
        if condition * torch.finfo(layer.base_weight.compute_dtype).eps > MUCH_AMPLIFIED:
            self._conditions[name] = condition

    def warn(self) -> None:
        """Name the degenerate targets and their blocks, and the target that amplifies rounding most."""
        if self._dropped:
            places = [f"{name}, block(s) {blocks}" for name, blocks in list(self._dropped.items())[:_NAMED]]
            more = f"; and {len(self._dropped) - _NAMED} more target(s)" if len(self._dropped) > _NAMED else ""
            warn(
                "degenerate weights: some directions of their blocks are zero or too small to decompose, and will not "
                f"be trained: {'; '.join(places)}{more}"
            )
        if self._conditions:
            worst = max(self._conditions, key=self._conditions.__getitem__)
            warn(
                f"{len(self._conditions)} target(s) are so ill-conditioned that rounding in the compute dtype is "
                f"amplified to over 10 % of the map; worst: {worst}, condition up to {self._conditions[worst]:.0f}; "
                "compute in float32, or leave these modules out with exclude_modules"
            )


@torch.no_grad()
def frozen_tensors(
    model: nn.Module,
    layer: CloverLayer,
    specs: tuple[BlockSpec, ...],
    report: BasesReport | None = None,
) -> dict[str, dict[str, Tensor]] | None:
    """The frozen tensors of every slice of a layer, computed from the base weights.

    Args:
        model: the model that partners' paths are relative to.
        layer: the layer.
        specs: its slices.
        report: takes every slice's bases.

    Where only the first process has the weights, it computes the tensors and all processes return them.

    Returns:
        Slice name -> attribute -> tensor, as in `BlockSpec.base_shapes`; None where the weights are on the meta
        device, or a quantisation cannot be read.

    Raises:
        ValueError: naming the module, for weights that are not finite.
    """
    if layer.base_weight.backend is not None or not only_rank_0_has_weights():
        return _computed(model, layer, specs, report)
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [_computed(model, layer, specs, report)]
        except ValueError as error:  # the others wait to hear of it
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], ValueError):
        raise found[0]
    return found[0]


def broadcast_bases(model: nn.Module) -> None:
    """Give all processes the bases of the first one, where unlike machines train together under DDP.

    Processes compute equal bases on equal machines; other linear algebra may turn a singular vector around. All
    processes must call it, with the model on their devices.

    Args:
        model: a model with CLOVER adapters.
    """
    for _, layer in clover_layers(inner_model(model)):
        layer.forget_maps()
        for name, buffer in layer.named_buffers():
            if name.startswith(FROZEN):
                dist.broadcast(buffer, src=0)


def _computed(
    model: nn.Module,
    layer: CloverLayer,
    specs: tuple[BlockSpec, ...],
    report: BasesReport | None,
) -> dict[str, dict[str, Tensor]] | None:
    with layer.base_weight.whole():
        if layer.base_weight.stored.is_meta or not layer.base_weight.is_readable:
            return None
        weight, bias = layer.base_weight.transposed(), layer.base_weight.bias
        result = {}
        for spec in specs:
            tensors = {"clover_norm": row_norms(model, spec, weight)}
            if spec.basis != "folded":
                try:
                    bases = compute_bases(model, spec, weight, bias)
                except ValueError as error:
                    raise ValueError(f"{layer.name}: {error}") from error
                tensors |= _stored(bases)
                if report is not None:
                    report.add(layer, spec, bases)
            result[spec.name] = tensors
    return result


def _stored(bases: Bases) -> dict[str, Tensor]:
    """The tensors of bases that a layer holds; an identity is not stored."""
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
    """Bases of one slice: the pair's by the Grams of both sides, otherwise the projection's own.

    Moments of activations replace the Grams of the weights that compute them (`pair_grams`).
    """
    g_in = gram(spec.heads.blocks(weight, spec.size), None if bias is None else spec.heads.blocks(bias, spec.size))
    if spec.partner is None:
        if own is not None:
            g_in = shrink(own.second.to(g_in.device), g_in, own.tokens)
        bases = qr_bases(g_in) if spec.basis == "qr" else svd_bases(g_in)
        return bases if spec.r == spec.size else bases.leading(spec.r)
    heads, reads = spec.partner.heads, spec.partner.reads
    with partner_weight(model, spec.partner) as (rows, bias):
        g_out = gram(heads.blocks(rows, spec.size), None if bias is None else heads.blocks(bias, spec.size))
    grams = pair_grams(g_in, g_out, spec.heads.count, reads=reads, own=own, partner=partner)
    bases = pair_bases(grams.g_in, grams.g_out)
    return bases if spec.r == spec.size else bases.leading(spec.r)
