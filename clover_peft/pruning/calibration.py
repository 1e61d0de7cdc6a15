"""What data say of a model's pairs: measured once, used by as many prunings as one likes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..base_model.activations import collect_moments
from ..linalg.moments import Moments
from .pairs import Pair, check_plain, find_pairs, probes, select_pairs
from .sensitivity import sensitivities

_SAME = 1e-9  # of a sum, relative to that of the magnitudes: what the order of adding makes of it in float64
_CHUNK = 2**24  # numbers that are held in float64 at a time


@dataclass(frozen=True, repr=False)
class Calibration:
    """What `calibrate` measured. It belongs to the weights it was measured with: a model that was trained or pruned
    since is another one.

    Attributes:
        moments: second moments of activations, d x d for every head, by the names of `probes`.
        sensitivities: name of a value-output pair -> how much the loss minds an error behind it; empty if it was not
            measured.
        weights: name of a parameter of the model -> the sums of its numbers and of their squares.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict)
    sensitivities: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        tokens = min((moments.tokens for moments in self.moments.values()), default=0)
        more = ", gradients" if self.sensitivities else ""
        return f"Calibration({len(self.moments)} moments of at least {tokens:,} tokens{more})"


@torch.inference_mode(False)
def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    gradients: bool = False,
    target_modules: str | Sequence[str] | None = None,
) -> Calibration:
    """Run a model over data once, for `prune` at several ratios, by several rules, of several copies.

    Costs one pass over the data, and d^2 numbers in float64 for every query head, and of Q-K for every key head, too.

    Args:
        model: the model that is to be pruned, or a copy; it is not changed.
        batches: keyword arguments of the model; some ten tokens for each dimension of a head are needed.
        gradients: measure what `ranks="gradient"` needs, too, in a forward and a backward pass more.
        target_modules: which pairs, as for `prune`; None for all.

    Returns:
        `Calibration`, to be passed to `prune` as `calibration`.

    Raises:
        ValueError: if the model has adapters or no such pair, there is no batch, or the data do not reach a pair.
        TypeError: if this is one batch, not several, or no model.
    """
    check_plain(model)
    pairs = select_pairs(model, find_pairs(model), None, target_modules)
    return replace(measure(model, pairs, batches, gradients), weights=_sums(model))


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
        ValueError: if the calibration is of other weights or lacks a pair, or what `calibrate` raises.
    """
    if calibration is None:
        return Calibration()
    wanted, behind = probes(pairs), [pair for pair in pairs if pair.kind == "vo"] if gradients else []
    if not isinstance(calibration, Calibration):
        if isinstance(calibration, Mapping):
            raise TypeError("calibration: expected batches, found one batch; pass a list of them")
        if gradients:
            calibration = list(calibration)
        moments = collect_moments(model, wanted, calibration)
        return Calibration(moments, sensitivities(model, behind, calibration) if behind else {})
    if changed := _changed(model, calibration.weights):
        raise ValueError(
            f"calibration: expected one of this model as it is, found other weights ({changed}); calibrate again"
        )
    if missing := [name for name in wanted if name not in calibration.moments]:
        raise ValueError(f"{missing[0]}: expected moments, found none; calibrate with the same target_modules")
    if missing := [pair.name for pair in behind if pair.name not in calibration.sensitivities]:
        raise ValueError(f"{missing[0]}: expected a sensitivity, found none; calibrate with gradients=True")
    return calibration


@torch.no_grad()
def _sums(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Of every parameter, by name: enough to tell a model from one that was trained, pruned or cast."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parts = [part.cpu() if part.device.type == "mps" else part for part in parameter.flatten().split(_CHUNK)]
            sums = torch.stack([torch.stack([p.sum(), p.square().sum()]) for p in (part.double() for part in parts)])
            found[name] = tuple(sums.sum(0).tolist())
    return found


def _changed(model: nn.Module, known: Mapping[str, tuple[float, float]]) -> str | None:
    """The name of a parameter that is not as it was; None if all are."""
    here, sizes = _sums(model), {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name in {**known, **here}:
        if name not in known or name not in here:
            return name
        (total, squares), (total_then, squares_then) = here[name], known[name]
        most = math.sqrt(sizes[name] * squares)  # at least the sum of magnitudes
        if abs(total - total_then) > _SAME * most or abs(squares - squares_then) > _SAME * squares:
            return name
    return None
