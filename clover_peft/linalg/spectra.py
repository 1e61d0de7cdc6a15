"""Figures of a spectrum of singular values."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli, 2007); 0 for zeros.

    From 1, for a single direction, to their number, where all are equal.
    """
    total = singular_values.sum()
    if total == 0:
        return 0.0
    shares = singular_values.double() / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))
