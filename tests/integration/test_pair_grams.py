"""Adapters and pruning decompose a pair by the same Grams."""

from __future__ import annotations

import peft
import pytest
import torch

import clover_peft
from clover_peft.pruning import decompose
from tests.support.tiny import VOCAB, build, inputs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.filterwarnings("ignore:.*tokens for blocks of")
@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("family", ["llama", "t5"])  # grouped values; keys and values without biases
def test_singular_values_agree(family, data):
    """Pruning takes the mean over the query heads of a group where an adapter takes the sum.

    With data, an adapter's blocks keep their strength without it: a factor for each block.
    """
    batches = []
    for seed in range(3):
        batch = inputs(family)
        ids = torch.randint(3, VOCAB, batch["input_ids"].shape, generator=torch.Generator().manual_seed(seed))
        batches.append({**batch, "input_ids": ids})
    found = decompose(build(family), calibration=batches if data else None)
    assert {pair.kind for pair, _ in found.values()} == ({"vo"} if family == "llama" else {"qk", "vo"})
    model = peft.get_peft_model(build(family), clover_peft.CloverConfig())
    if data:
        clover_peft.initialize_from_activations(model, batches)
    tensors = dict(model.named_buffers())
    for pair, directions in found.values():
        start = f"base_model.model.{pair.path}.clover_S0."
        (name,) = (name for name in tensors if name.startswith(start))
        groups = pair.groups if data and pair.kind == "vo" else 1
        expected = directions.values * groups**0.5
        values = tensors[name].double()
        if data:
            values, expected = (v / v.norm(dim=-1, keepdim=True) for v in (values, expected))
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))
        assert groups == (2 if data and family == "llama" else 1)
