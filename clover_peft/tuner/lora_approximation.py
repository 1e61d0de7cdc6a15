"""How well a LoRA can approximate a CLOVER adapter."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .experts import refuse_experts
from .layers import inner_model, layers_with


@torch.no_grad()
def lora_errors(
    model: nn.Module, ranks: int | Sequence[int] = (16, 64, 256), adapter_name: str = "default"
) -> dict[str, dict[int, float]]:
    """The error of `peft.convert_to_lora` at each rank, because CLOVER's update has full rank and a LoRA does not.

    Args:
        model: a model with a trained CLOVER adapter.
        ranks: ranks of the LoRA, or one rank. Beyond the smaller side of a module's weight its error is 0.
        adapter_name: the adapter.

    Returns:
        Module path -> rank -> relative error `|dW - BA| / |dW|` (Frobenius norm) of the best LoRA of this rank; "all"
        has the errors of the whole adapter. The error of a zero update is 0. Costs a singular value decomposition of
        every update, one at a time.

    Raises:
        ValueError: if no module has the adapter, or a rank is not a positive integer.
    """
    ranks = [ranks] if isinstance(ranks, int) else list(ranks)
    if wrong := [rank for rank in ranks if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1]:
        raise ValueError(f"lora_errors: expected positive integers as ranks, found {wrong[0]!r}")
    energies = {}
    layers = layers_with(inner_model(model), adapter_name)
    refuse_experts(layers, "a LoRA that approximates the adapter")
    for name, layer in layers:
        with layer.base_weight.whole():
            energies[name] = torch.linalg.svdvals(layer.get_delta_weight(adapter_name)).double().square().cpu()
    result = {name: _errors([energy], ranks) for name, energy in energies.items()}
    return result | {"all": _errors(energies.values(), ranks)}


def _errors(energies: Collection[Tensor], ranks: list[int]) -> dict[int, float]:
    """Rank -> the relative error, from the squared singular values of updates."""
    total: Any = sum(energy.sum() for energy in energies)
    lost: Any = {rank: sum(energy[rank:].sum() for energy in energies) for rank in ranks}
    return {rank: float((lost[rank] / total).sqrt()) if total > 0 else 0.0 for rank in ranks}
