"""How a fine-tuning changed the weights: the paper's measures, for any adapter of peft or any pair of models."""

from ...linalg.spectra import effective_rank
from .changes import Change, adapter_changes, collect_inputs, model_changes, moves_base
from .measures import measure, projected_share

__all__ = [
    "Change",
    "adapter_changes",
    "collect_inputs",
    "effective_rank",
    "measure",
    "model_changes",
    "moves_base",
    "projected_share",
]
