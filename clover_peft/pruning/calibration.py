"""`calibrate`: measure the activations of a model's pairs once, for any number of prunings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..base_model.activations import collect_moments, refuse_one_batch
from ..base_model.plain import check_plain
from ..linalg.moments import Moments
from .pairs import Pair, find_pairs, probes, select_pairs
from .sensitivity import sensitivities

# Float64 sums of the same numbers in another order differ by less than this share of the sum of magnitudes.
_SAME = 1e-9
_CHUNK = 2**24  # At most this many numbers are held in float64 at a time.


@dataclass(frozen=True, repr=False)
class Calibration:
    """The result of `calibrate`. It is valid only for the weights that it was measured with.

    Attributes:
        moments: second moments of activations, by the names of `probes`.
        sensitivities: name of a value-output pair -> sensitivity of the loss to an error in its output; empty if not
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
    """Run a model over data once, in order to prune copies of it at several ratios or by several rules.

    Costs one pass over the data, and 2 n^2 numbers in float64 for every output projection with n inputs (8.6 GB for
    Llama-2-7B), for Q-K d^2 for every query head and key head. Pass several batches: every second one tells what in
    the others is noise.

    Args:
        model: the model to prune, or a copy. It is not changed.
        batches: batches, each of the model's keyword arguments. Pass about ten tokens for each dimension of a head, or
            more.
        gradients: also measure the sensitivities that `ranks="gradient"` needs, with one more forward and backward
            pass.
        target_modules: selects pairs as in `prune`; None selects all.

    Returns:
        `Calibration`, for the argument `calibration` of `prune`.

    Raises:
        ValueError: if the model has adapters or no such pair, there is no batch, or the data do not reach a pair.
        TypeError: if `batches` is a single batch, or `model` is not a model.
    """
    check_plain(model)
    refuse_one_batch(batches)
    pairs = select_pairs(model, find_pairs(model), None, target_modules)
    return replace(measure(model, pairs, batches, gradients), weights=_sums(model))


def measure(
    model: nn.Module,
    pairs: Sequence[Pair],
    calibration: Iterable[Mapping[str, Any]] | Calibration | None,
    gradients: bool = False,
) -> Calibration:
    """Measure these pairs, or check an earlier calibration.

    Args:
        model: the model.
        pairs: its pairs.
        calibration: batches, or the result of `calibrate`, or None.
        gradients: whether the sensitivities of the value-output pairs are needed.

    Returns:
        `Calibration`; an empty one if `calibration` is None.

    Raises:
        ValueError: if the calibration is of other weights or lacks a pair, or as in `calibrate`.
    """
    if calibration is None:
        return Calibration()
    wanted, weighted = probes(pairs), [pair for pair in pairs if pair.kind == "vo"] if gradients else []
    if not isinstance(calibration, Calibration):
        refuse_one_batch(calibration)
        if gradients:
            calibration = list(calibration)
        moments = collect_moments(model, wanted, calibration)
        return Calibration(moments, sensitivities(model, weighted, calibration) if weighted else {})
    if changed := _changed(model, calibration.weights):
        raise ValueError(
            f"calibration: expected one of this model as it is, found other weights ({changed}); calibrate again"
        )
    if missing := [name for name in wanted if name not in calibration.moments]:
        raise ValueError(f"{missing[0]}: expected moments, found none; calibrate with the same target_modules")
    if missing := [pair.name for pair in weighted if pair.name not in calibration.sensitivities]:
        raise ValueError(f"{missing[0]}: expected a sensitivity, found none; calibrate with gradients=True")
    return calibration


@torch.no_grad()
def _sums(model: nn.Module) -> dict[str, tuple[float, float]]:
    """The sum and the sum of squares of every parameter: they differ after training, pruning or casting."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parts = [part.cpu() if part.device.type == "mps" else part for part in parameter.flatten().split(_CHUNK)]
            sums = torch.stack([torch.stack([p.sum(), p.square().sum()]) for p in (part.double() for part in parts)])
            found[name] = tuple(sums.sum(0).tolist())
    return found


def _changed(model: nn.Module, known: Mapping[str, tuple[float, float]]) -> str | None:
    """The name of a parameter that has changed; None if none has."""
    here, sizes = _sums(model), {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name in {**known, **here}:
        if name not in known or name not in here:
            return name
        (total, squares), (total_then, squares_then) = here[name], known[name]
        most = math.sqrt(sizes[name] * squares)  # This is at least the sum of the magnitudes.
        if abs(total - total_then) > _SAME * most or abs(squares - squares_then) > _SAME * squares:
            return name
    return None
