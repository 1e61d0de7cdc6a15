"""CLOVER (Cross-Layer Orthogonal Vectors, arXiv 2411.17426) as a PEFT method. Importing registers it with peft,
and lets transformers and diffusers load models that `prune` made narrower."""

from .bases import broadcast_bases, explicit_factors, initialize_from_activations
from .config import CloverConfig
from .layer import CloverLayer
from .model import CloverModel
from .pruning import PruningReport, calibrate, prune
from .pruning.loading import install
from .registration import register
from .serving import hotswap_adapter, lora_errors
from .transfer import dequantize, merge_onto

__version__ = "0.1.0"
__all__ = [
    "CloverConfig",
    "CloverLayer",
    "CloverModel",
    "PruningReport",
    "broadcast_bases",
    "calibrate",
    "dequantize",
    "explicit_factors",
    "hotswap_adapter",
    "initialize_from_activations",
    "lora_errors",
    "merge_onto",
    "prune",
]

register(CloverConfig, CloverModel)
install()
