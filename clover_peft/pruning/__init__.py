"""Pruning of attention heads along their own directions (arXiv 2411.17426), not along their coordinates."""

from .directions import Directions, Pair, decompose, find_pairs, mask
from .ranks import energy, global_ratio, rounded, threshold, uniform

__all__ = [
    "Directions",
    "Pair",
    "decompose",
    "energy",
    "find_pairs",
    "global_ratio",
    "mask",
    "rounded",
    "threshold",
    "uniform",
]
