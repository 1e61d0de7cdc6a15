"""What data say of a model's pairs: measured once, used by as many prunings as one likes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..moments import Moments, collect_moments
from .pairs import Pair, check_plain, find_pairs, probes, select_pairs
from .sensitivity import sensitivities


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` measured. It belongs to the weights that were measured: those of a model before it is pruned.

    Attributes:
        moments: second moments of activations, d x d for every head, by the names of `probes`.
        sensitivities: name of a value-output pair -> how much the loss minds an error behind it; empty if it was not
            measured.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict)
    sensitivities: Mapping[str, float] = field(default_factory=dict)


@torch.inference_mode(False)
def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    gradients: bool = False,
    target_modules: str | Sequence[str] | None = None,
) -> Calibration:
    """Run a model over data once, for `prune` at several ratios, by several rules, of several copies.

    Costs one pass over the data, and H d^2 numbers in float64 for every pair.

    Args:
        model: the model that is to be pruned, or a copy; it is not changed.
        batches: keyword arguments of the model; some ten tokens for each dimension of a head are needed.
        gradients: measure what `ranks="gradient"` needs, too, in a forward and a backward pass more.
        target_modules: which pairs, as for `prune`; None for all.

    Returns:
        `Calibration`, to be passed to `prune` as `calibration`.

    Raises:
        ValueError: if the model has adapters or no such pair, there is no batch, or the data do not reach a pair.
    """
    check_plain(model)
    kinds = {pair.kind for pair in find_pairs(model) if pair.is_named(target_modules)}
    return measure(model, select_pairs(model, kinds or ("vo",), target_modules), batches, gradients)


def measure(
    model: nn.Module,
    pairs: Sequence[Pair],
    calibration: Iterable[Mapping[str, Any]] | Calibration | None,
    gradients: bool = False,
) -> Calibration:
    """What is known of these pairs: nothing without data, and of what was measured already, that it fits.

    Args:
        model: the model.
        pairs: of it.
        calibration: batches, or from `calibrate`, or None.
        gradients: whether sensitivities of the value-output pairs are wanted.

    Raises:
        ValueError: if the calibration is another model's or lacks a pair, or what `calibrate` raises.
    """
    if calibration is None:
        return Calibration()
    wanted, behind = probes(model, pairs), [pair for pair in pairs if pair.kind == "vo"] if gradients else []
    if not isinstance(calibration, Calibration):
        if gradients:
            calibration = list(calibration)
        moments = collect_moments(model, wanted, calibration)
        return Calibration(moments, sensitivities(model, behind, calibration) if behind else {})
    for name, probe in wanted.items():
        shape = (probe.heads.count * probe.heads.dim // probe.size, probe.size, probe.size)
        found = calibration.moments[name].squares.shape if name in calibration.moments else None
        if found != shape:
            raise ValueError(
                f"{name}: expected moments of shape {shape}, found {found and tuple(found)}; calibrate this model, as "
                "it is, with the same target_modules"
            )
    if missing := [pair.name for pair in behind if pair.name not in calibration.sensitivities]:
        raise ValueError(f"{missing[0]}: expected a sensitivity, found none; calibrate with gradients=True")
    return calibration
