"""Which pairs keep their rotation: moments against plain sums, and the choice of components."""

from __future__ import annotations

import pytest
import torch

from clover_peft.convert.rotary import choose, collect, components, freq_fold_of, frequencies_of
from clover_peft.convert.structure import read_source
from tests.support.tiny import VOCAB, build

pytestmark = pytest.mark.usefixtures("one_thread")


def subject():
    """A tiny model with heads of six frequencies and two key-value heads, and data."""
    source = read_source(build("llama"))
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    return source, [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:, :9]}]


def test_distances_are_those_of_the_attention_weights():
    source, batches = subject()
    moments = collect(source, batches)
    source.model.set_attn_implementation("eager")
    expected = [torch.zeros(4, 24, dtype=torch.float64) for _ in moments]
    for batch in batches:
        with torch.no_grad():
            attentions = source.model(**batch, output_attentions=True).attentions
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        for total, weights in zip(expected, attentions, strict=True):
            for row, query in real.nonzero().tolist():
                for key in range(query + 1):
                    total[:, query - key] += weights[row, :, query, key].double()
    source.model.set_attn_implementation("sdpa")
    for total, of in zip(expected, moments, strict=True):
        torch.testing.assert_close(of.distances, total, atol=1e-5, rtol=1e-5)
        turn = of.turn(source.frequencies)
        angles = torch.arange(24)[:, None] * source.frequencies
        mean = total.to(turn) @ torch.polar(torch.ones_like(angles), angles) / total.sum(1, keepdim=True)
        torch.testing.assert_close(turn, mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("freq_fold", [1, 2, 6])
def test_components_are_the_keys_in_another_basis_and_uncorrelated(freq_fold):
    source, batches = subject()
    n, groups = 2 * freq_fold, 6 // freq_fold
    for of in collect(source, batches, freq_fold):
        c = components(source, of, "clover")
        torch.testing.assert_close(c.mix @ c.split, torch.eye(n, dtype=c.mix.dtype).expand_as(c.mix))
        spread = c.split @ (of.keys / of.tokens) @ c.split.mH
        torch.testing.assert_close(spread, torch.diag_embed(c.worth).to(spread), atol=1e-8, rtol=1e-6)
        assert (c.worth.diff(dim=1) <= 0).all()
        # What rotations are worth is the same in any basis: that of the heads' own keys.
        a = of.turn(source.frequencies)
        lost = of.queries / of.tokens * source.scale**2 * (1 - a.abs().square())  # (H, d/2)
        keys = (of.keys / of.tokens).diagonal(dim1=1, dim2=2).real.reshape(6, 2).T.repeat_interleave(2, 0)  # (H, d/2)
        torch.testing.assert_close(c.worth.sum(1), (lost * keys).sum(0).view(groups, -1).sum(1))
        torch.testing.assert_close(c.unrotated.abs().square(), a.abs())
        torch.testing.assert_close(c.unrotated.angle(), a.angle())


@pytest.mark.parametrize(("pairs", "freq_fold"), [(1, 6), (2, 3), (3, 2), (6, 1), (7, 1), (12, 1)])
def test_every_group_of_frequencies_has_a_rotated_component_and_those_of_most_worth_another(pairs, freq_fold):
    source, batches = subject()
    assert freq_fold_of(source, pairs) == freq_fold
    worth = torch.stack([components(source, of, "clover").worth for of in collect(source, batches, freq_fold)]).sum(0)
    groups, n = worth.shape
    rotated = choose(worth, pairs)
    assert rotated.tolist() == sorted(set(rotated.tolist()))
    counts = (rotated // n).bincount(minlength=groups)
    assert counts.sum() == pairs
    assert (rotated % n).tolist() == [j for count in counts.tolist() for j in range(count)]  # first ones first
    fewest, more = pairs // groups, counts > pairs // groups
    assert set(counts.tolist()) <= {fewest, fewest + 1}
    if more.any():
        assert worth[more, fewest].min() >= worth[~more, fewest].max()
    torch.testing.assert_close(frequencies_of(source, rotated), source.frequencies[::freq_fold][rotated // n])
