"""What pruning at several ratios does to a model's predictions, measured on data that it was not calibrated with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base_model.activations import evaluating
from .calibration import Calibration
from .pairs import Kind
from .pruner import prune

RATIOS = (0.125, 0.25, 0.5)
# A divergence that is small: of a language model, a perplexity about a tenth higher.
SMALL = 0.1


def measure_ratios(
    model: nn.Module,
    kind: Kind,
    calibration: Calibration,
    held_out: Sequence[Mapping[str, Any]],
    target_modules: str | Sequence[str] | None = None,
) -> dict[float, float]:
    """Prune copies of a model by `prune`'s default rule, and compare their predictions with the model's.

    Costs a copy of the model in memory, and two passes over the held-out data for each ratio.

    Args:
        model: the model; it is not changed.
        kind: "qk" or "vo".
        calibration: from `calibrate`.
        held_out: batches that `calibration` was not made from, on the model's device.
        target_modules: as in `prune`.

    Returns:
        Ratio -> KL divergence of the pruned model's predictions from the model's, in nats a prediction; for a model
        without logits, 1 - cosine of its hidden states.
    """
    found = {}
    for ratio in RATIOS:
        pruned = copy.deepcopy(model)
        prune(pruned, {kind: ratio}, calibration=calibration, masked=True, target_modules=target_modules)
        found[ratio] = _divergence(model, pruned, held_out)
        del pruned
    return found


@torch.no_grad()
def _divergence(model: nn.Module, other: nn.Module, batches: Sequence[Mapping[str, Any]]) -> float:
    total, count = 0.0, 0
    with evaluating(model), evaluating(other):
        for batch in batches:
            values = {name: value for name, value in batch.items() if name != "logits_to_keep"}
            distances = _distances(model(**values), other(**values))
            masks = (values.get(name) for name in ("decoder_attention_mask", "attention_mask"))
            mask = next((m for m in masks if isinstance(m, Tensor) and m.shape == distances.shape), None)
            distances = distances if mask is None else distances[mask.bool()]
            total, count = total + float(distances.double().sum()), count + distances.numel()
    return total / count


def _distances(this: Any, that: Any) -> Tensor:
    """The distance of every prediction."""
    if getattr(this, "logits", None) is not None:
        p, q = (output.logits.float().log_softmax(-1) for output in (this, that))
        return (p.exp() * (p - q)).sum(-1)
    a, b = (output.last_hidden_state.float() for output in (this, that))
    return 1 - torch.cosine_similarity(a, b, dim=-1)
