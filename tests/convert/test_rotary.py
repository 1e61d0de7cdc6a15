"""Which pairs keep their rotation: moments against plain sums, and the choice of components and slots."""

from __future__ import annotations

import pytest
import torch

from clover_peft.convert.rotary import choose, collect, components
from clover_peft.convert.structure import read_source
from tests.support.tiny import VOCAB, build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def measured():
    source = read_source(build("llama"))
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:, :9]}]
    moments = collect(source, batches)
    return source, batches, moments, [components(source, m, "clover") for m in moments]


def test_distances_are_those_of_the_attention_weights(measured):
    source, batches, moments, _ = measured
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


def test_components_are_the_keys_in_another_basis_and_uncorrelated(measured):
    _, _, moments, found = measured
    for of, c in zip(moments, found, strict=True):
        torch.testing.assert_close(c.mix @ c.split, torch.eye(2, dtype=c.mix.dtype).expand_as(c.mix))
        spread = c.split @ (of.keys / of.tokens) @ c.split.mH
        torch.testing.assert_close(spread, torch.diag_embed(c.worth).to(spread), atol=1e-8, rtol=1e-6)
        own = torch.arange(6).repeat_interleave(2)
        gain = c.gain[torch.arange(12), own].view(6, 2)
        torch.testing.assert_close(gain, c.worth, atol=1e-12, rtol=1e-5)
        assert (c.gain <= gain.flatten()[:, None] + 1e-12).all()  # no frequency is worth more than the own one


@pytest.mark.parametrize("pairs", [1, 5, 12])
def test_every_layer_fills_every_slot_with_a_component_of_its_own(measured, pairs):
    source, _, moments, found = measured
    slots = choose(source, moments, found, pairs, "clover")
    assert slots.frequencies.shape == (pairs,)
    for filled, factors in zip(slots.filled, slots.factors, strict=True):
        assert len(set(filled.tolist())) == pairs
        assert filled.min() >= 0
        same = source.frequencies[filled // 2] == slots.frequencies
        assert same.all() or pairs < 12
        torch.testing.assert_close(factors[:, same], torch.ones_like(factors[:, same]))
        assert (factors.abs() <= 1 + 1e-9).all()
