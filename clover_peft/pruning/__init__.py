"""Pruning of attention heads along their own directions (arXiv 2411.17426), not along their coordinates."""

from .directions import Directions, Pair, decompose, find_pairs, mask
from .pruner import prune
from .ranks import by_layer, energy, global_ratio, rounded, threshold, uniform
from .report import PrunedPair, PruningReport

__all__ = [
    "Directions",
    "Pair",
    "PrunedPair",
    "PruningReport",
    "by_layer",
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
