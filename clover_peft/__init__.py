"""CLOVER (Cross-Layer Orthogonal Vectors, arXiv 2411.17426) as a PEFT method. Importing registers it with peft,
and lets transformers and diffusers load models that `prune` or `slice_hidden_size` made narrower."""

from . import _as_command  # noqa: F401  comes before torch
from ._moved import keep_old_paths
from ._version import __version__
from .base_model.own_text import own_text
from .convert import ConversionReport, SlicingReport, convert_to_mla, save_stock, slice_hidden_size
from .convert.sliced_models import install as install_sliced
from .io.user_warning import warn
from .pruning import PruningReport, calibrate, prune
from .pruning.narrow.loading import install
from .runtime.peft_registry import register
from .runtime.tested_versions import untested
from .tuner.activation_bases import initialize_from_activations
from .tuner.config import CloverConfig
from .tuner.contrast import initialize_from_contrast
from .tuner.dequantize import dequantize, merge_onto
from .tuner.explicit_factors import explicit_factors
from .tuner.hotswap import hotswap_adapter
from .tuner.layer import CloverLayer
from .tuner.layers import broadcast_bases
from .tuner.lora_approximation import lora_errors
from .tuner.model import CloverModel
from .tuner.update_scale import balance_updates

__all__ = [
    "CloverConfig",
    "CloverLayer",
    "CloverModel",
    "ConversionReport",
    "PruningReport",
    "SlicingReport",
    "__version__",
    "balance_updates",
    "broadcast_bases",
    "calibrate",
    "convert_to_mla",
    "dequantize",
    "explicit_factors",
    "hotswap_adapter",
    "initialize_from_activations",
    "initialize_from_contrast",
    "lora_errors",
    "merge_onto",
    "own_text",
    "prune",
    "save_stock",
    "slice_hidden_size",
]

register(CloverConfig, CloverModel)
install_sliced()  # The stream first: the width of a head's input follows it.
install()
keep_old_paths()
if newer := untested():
    warn(newer)
