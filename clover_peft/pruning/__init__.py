"""Pruning of attention heads along their singular directions (arXiv 2411.17426) instead of their coordinates."""

from .calibration import Calibration, calibrate
from .directions import Directions, decompose
from .pairs import Pair, find_pairs
from .pruner import mask, prune
from .ranks import by_layer, energy, global_ratio, rounded, threshold, uniform
from .report import PrunedPair, PruningReport

__all__ = [
    "Calibration",
    "Directions",
    "Pair",
    "PrunedPair",
    "PruningReport",
    "by_layer",
    "calibrate",
    "decompose",
    "energy",
    "find_pairs",
    "global_ratio",
    "mask",
    "prune",
    "rounded",
    "threshold",
    "uniform",
]
