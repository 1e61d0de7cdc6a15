"""How a fine-tuning changed the weights: the paper's measures, for any adapter of peft or any pair of models."""

from ...linalg.spectra import effective_rank
from .changes import (
    Change,
    adapter_changes,
    collect_inputs,
    left_out_of_adapter,
    left_out_of_models,
    model_changes,
    moves_base,
)
from .measures import measure, projected_share

__all__ = [
    "Change",
    "adapter_changes",
    "collect_inputs",
    "effective_rank",
    "left_out_of_adapter",
    "left_out_of_models",
    "measure",
    "model_changes",
    "moves_base",
    "projected_share",
]
