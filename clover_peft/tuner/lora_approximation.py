"""How well a LoRA can approximate a CLOVER adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .experts import refuse_experts
from .layers import layers_with


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
    lost = {rank: torch.zeros((), dtype=torch.float64) for rank in ranks}
    total = torch.zeros((), dtype=torch.float64)
    result = {}
    layers = layers_with(model, adapter_name)
    refuse_experts(layers, "a LoRA that approximates the adapter")
    for name, layer in layers:
        with layer.base_weight.whole():
            energy = torch.linalg.svdvals(layer.get_delta_weight(adapter_name)).double().square().cpu()
        result[name] = {rank: _root_share(energy[rank:].sum(), energy.sum()) for rank in ranks}
        total += energy.sum()
        for rank in ranks:
            lost[rank] += energy[rank:].sum()
    result["all"] = {rank: _root_share(lost[rank], total) for rank in ranks}
    return result


def _root_share(part: Tensor, whole: Tensor) -> float:
    return float((part / whole).sqrt()) if whole > 0 else 0.0
