"""Measures of a spectrum of singular values."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(singular_values: Tensor) -> float:
    """The exponential of the entropy of the singular values' shares (Roy and Vetterli, 2007).

    It is 0 if all are zero, 1 for a single direction, and the number of singular values if all are equal.
    """
    total = singular_values.sum()
    if total == 0:
        return 0.0
    shares = singular_values.double() / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))
