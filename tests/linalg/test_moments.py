"""Moments of activations: what they count, how they are drawn to the weights, which Gram of a pair they replace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clover_peft.linalg.decomposition import gram, per_key_value_head
from clover_peft.linalg.moments import Moments, SecondMoment, centred, check_finite, pair_grams, shrink
from tests.support.tiny import relative

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


def test_a_large_mean_drowns_nothing():
    """Products are float32: about zero they would err by more than what varies."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(3, 500, 2, 4, generator=generator) * torch.tensor([1.0, 0.5, 2.0, 0.1]) + 3e3
    moments = Moments(torch.zeros(2, 4, 4).double(), torch.zeros(2, 4).double())
    for part in rows:
        moments.add(part)
    moments.add(rows[0, :0])
    z = rows.flatten(0, 1).double()
    point = torch.full((2, 4), 3e3).double()
    for found, centre in ((moments.covariance, z.mean(0)), (moments.about(point), point), (moments.second, 0.0)):
        expected = torch.einsum("nhi,nhj->hij", z - centre, z - centre) / len(z)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.mean, z.mean(0), rtol=1e-9, atol=0)
    assert moments.tokens == 1500


@pytest.mark.parametrize("first", [True, False])
def test_a_far_token_spoils_nothing_wherever_it_comes(first):
    generator = torch.Generator().manual_seed(3)
    rows, far = torch.randn(1000, 1, 8, generator=generator), torch.full((1, 1, 8), 1e4)
    moments = Moments(torch.zeros(1, 8, 8).double(), torch.zeros(1, 8).double())
    for part in (far, rows) if first else (rows, far):
        moments.add(part)
    z = torch.cat([rows, far]).double()[:, 0]
    centred = z - z.mean(0)
    assert relative(moments.covariance[0], centred.mT @ centred / len(z)) < 1e-11
    with torch.autocast("cpu", torch.bfloat16):
        under = Moments(torch.zeros(1, 8, 8).double(), torch.zeros(1, 8).double())
        under.add(rows)
    assert relative(under.covariance[0], rows[:, 0].double().mT.cov(correction=0)) < 1e-6


def test_blocks_that_vary_are_told_from_those_that_do_not():
    """Block by block, by the rounding of the activations and not by how far from zero they are."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(200, 4, 3, generator=generator)
    rows[:, 1] = 0
    rows[:, 2] = torch.tensor([7.3, 0.1, 100.0])
    rows[:, 3] += 1e3
    for dtype, last in ((torch.float32, True), (torch.bfloat16, False)):
        moments = Moments(torch.zeros(4, 3, 3).double(), torch.zeros(4, 3).double())
        for part in rows.to(dtype).split(60):
            moments.add(part)
        assert moments.exceeds_rounding(moments.covariance).tolist() == [True, False, False, last]
    weights = torch.eye(3).double().expand(4, 3, 3)
    found = centred(moments, weights)
    assert torch.equal(found[1:], weights[1:])
    assert relative(found[0], shrink(moments.covariance, weights, 200)[0]) == 0


def test_shrinking_goes_from_the_weights_to_the_data():
    torch.manual_seed(1)
    moment, weights = (gram(torch.randn(20, 3, 4).double()) for _ in range(2))
    traces = [g.diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, 1, 1) for g in (moment, weights)]
    torch.testing.assert_close(shrink(moment, weights, 0), weights * traces[0] / traces[1])
    torch.testing.assert_close(shrink(moment, weights, 4), (moment + weights * traces[0] / traces[1]) / 2)
    assert relative(shrink(moment, weights, 10**9), moment) < 1e-8
    assert torch.isfinite(shrink(moment, torch.zeros_like(weights), 4)).all()


def test_no_tokens_is_no_division_by_zero():
    empty = Moments(torch.zeros(1, 2, 2).double(), torch.zeros(1, 2).double())
    assert not empty.second.any()
    assert not empty.covariance.any()


def test_the_cheaper_second_moment_is_the_plain_mean_of_squares():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(70, 2, SIZE, generator=generator) + 3
    found = SecondMoment.empty(x.shape[1:], torch.device("cpu"))
    for rows in x.bfloat16().split([40, 29, 1]):
        found.add(rows)
    z = x.bfloat16().double()
    assert found.tokens == 70
    assert torch.allclose(found.second, torch.einsum("thi,thj->hij", z, z) / 70, rtol=1e-5)
    found.add(torch.full((1, 2, SIZE), torch.inf))
    with pytest.raises(ValueError, match="k_proj: expected finite activations"):
        check_finite(found.sums, "k_proj")
