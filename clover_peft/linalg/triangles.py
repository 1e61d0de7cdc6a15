"""Lower triangles of square matrices, packed for files."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(matrices: Tensor) -> Tensor | None:
    """The lower triangles of (H, d, d), row by row, (H, d (d + 1) / 2).

    None if a number above a diagonal is not +0.0: `unpack` would not give the same bits.
    """
    bits = _BITS[matrices.dtype.itemsize]  # -0.0 has one
    if matrices.triu(1).view(bits).any():
        return None
    d = matrices.shape[-1]
    rows, columns = torch.tril_indices(d, d, device=matrices.device)
    return matrices.flatten(1).index_select(1, rows * d + columns)


def unpack(packed: Tensor, d: int) -> Tensor:
    """The matrices (H, d, d) that `pack` gave (H, d (d + 1) / 2) for, bit for bit."""
    rows = torch.arange(d, device=packed.device).unsqueeze(1)
    index = rows * (rows + 1) // 2 + rows.mT  # above the diagonal any number, which is then zeroed
    return packed.index_select(1, index.flatten().clamp(max=packed.shape[1] - 1)).view(-1, d, d).tril_()
