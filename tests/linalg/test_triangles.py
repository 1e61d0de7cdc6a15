from __future__ import annotations

import pytest
import torch

from clover_peft.linalg.triangles import pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 8), (2, 7), (5, 1), (1, 2)], ids=str)
def test_unpacking_gives_the_same_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    h, d = shape
    lower = torch.randn(h, d, d, generator=torch.Generator().manual_seed(0)).to(dtype).tril()
    lower[0, -1, 0] = -0.0
    lower[-1, -1, -1] = torch.finfo(dtype).smallest_normal / 8
    packed = pack(lower)
    assert packed is not None
    assert packed.shape == (h, d * (d + 1) // 2)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(unpack(packed, d).view(bits), lower.view(bits))


@pytest.mark.parametrize("value", [1e-30, -0.0, torch.nan, torch.inf])
def test_any_other_matrix_is_not_packed(value: float) -> None:
    lower = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)).tril()
    lower[1, 2, 3] = value
    assert pack(lower) is None
