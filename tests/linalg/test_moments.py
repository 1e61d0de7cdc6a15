"""Which Gram of a pair which moments of activations replace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clover_peft.linalg.decomposition import per_key_value_head
from clover_peft.linalg.moments import Moments, centred, pair_grams, shrink

HEADS, SIZE, TOKENS = 2, 5, 40


def grams(blocks: int, seed: int) -> Tensor:
    rows = torch.randn(blocks, SIZE, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows @ rows.mT


def moments(blocks: int, seed: int) -> Moments:
    found = Moments(torch.zeros(blocks, SIZE, SIZE).double(), torch.zeros(blocks, SIZE).double())
    found.add(torch.randn(TOKENS, blocks, SIZE, generator=torch.Generator().manual_seed(seed)).double() + 0.5)
    return found


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_without_moments_a_pair_is_that_of_its_weights(groups, reads):
    g_in, g_out = grams(HEADS, 1), grams(HEADS * groups, 2)
    found = pair_grams(g_in, g_out, HEADS, reads=reads)
    assert torch.equal(found.g_in, g_in)
    assert torch.equal(found.g_out, per_key_value_head(g_out, HEADS, groups))
    assert found.read is None


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("groups", [1, 3])
def test_what_the_output_reads_replaces_the_values(groups, blocks):
    """For every query head, drawn towards the values' weights; in all as the sum over a group, drawn towards them."""
    g_in, g_out = grams(HEADS * blocks, 1), grams(HEADS * groups * blocks, 2)
    partner = moments(HEADS * groups * blocks, 3)
    found = pair_grams(g_in, g_out, HEADS, reads=True, partner=partner)
    assert torch.equal(found.g_out, per_key_value_head(g_out, HEADS, groups))
    summed = shrink(per_key_value_head(partner.second, HEADS, groups), g_in, TOKENS)
    torch.testing.assert_close(found.g_in, summed, rtol=1e-12, atol=1e-12)
    assert found.read is not None
    for head in range(HEADS * groups):
        for block in range(blocks):
            mine, shared = head * blocks + block, head // groups * blocks + block
            expected = shrink(partner.second[mine : mine + 1], g_in[shared : shared + 1], TOKENS)
            assert torch.equal(found.read[mine], expected[0])


def test_what_is_read_is_taken_about_a_constant():
    g_in, g_out, partner = grams(HEADS, 1), grams(HEADS, 2), moments(HEADS, 3)
    constant = torch.randn(HEADS, SIZE, generator=torch.Generator().manual_seed(4))
    found = pair_grams(g_in, g_out, HEADS, reads=True, partner=partner, constant=constant)
    expected = shrink(partner.about(constant.double()), g_in, TOKENS)
    assert torch.equal(found.read, expected)
    assert torch.equal(found.g_in, expected)


@pytest.mark.parametrize("groups", [1, 3])
def test_keys_and_queries_replace_one_side_each(groups):
    g_in, g_out = grams(HEADS, 1), grams(HEADS * groups, 2)
    own, partner = moments(HEADS, 3), moments(HEADS * groups, 4)
    found = pair_grams(g_in, g_out, HEADS, reads=False, own=own, partner=partner)
    assert torch.equal(found.g_in, centred(own, g_in))
    assert torch.equal(found.g_out, per_key_value_head(shrink(partner.second, g_out, TOKENS), HEADS, groups))
    assert found.read is None
