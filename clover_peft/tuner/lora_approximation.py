"""How well a LoRA can stand in for a CLOVER adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .bases import clover_layers


@torch.no_grad()
def lora_errors(
    model: nn.Module, ranks: Sequence[int] = (16, 64, 256), adapter_name: str = "default"
) -> dict[str, dict[int, float]]:
    """The error that `peft.convert_to_lora` makes at each rank: CLOVER's update has full rank, a LoRA's has not.

    Args:
        model: a model with a trained CLOVER adapter.
        ranks: ranks of the LoRA.
        adapter_name: the adapter.

    Returns:
        Module path -> rank -> relative error `|dW - BA| / |dW|` in the Frobenius norm, of the best LoRA of that rank;
        under "all" that of the whole adapter. 0 where the update is zero. Costs a singular value decomposition of
        every update, one at a time.

    Raises:
        ValueError: if no module has the adapter.
    """
    layers = [(name, layer) for name, layer in clover_layers(model) if adapter_name in layer.specs]
    if not layers:
        raise ValueError(
            f"adapter {adapter_name!r}: expected a model with this CLOVER adapter, found no layer with it"
        )
    lost = {rank: torch.zeros((), dtype=torch.float64) for rank in ranks}
    total = torch.zeros((), dtype=torch.float64)
    result = {}
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
