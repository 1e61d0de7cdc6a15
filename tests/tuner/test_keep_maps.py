"""Maps are kept inside `keep_maps` alone, because torch does not count every write to a tensor."""

from __future__ import annotations

import pytest
import torch

from clover_peft import keep_maps
from tests.support.adapters import layers
from tests.support.passes import answer, two_adapters, unfolded
from tests.support.tiny import TOLERANCE, inputs, relative


@pytest.mark.parametrize("frozen", [False, True])
def test_writes_without_a_trace_take_effect_at_once(frozen):
    adapted = two_adapters()
    adapted.requires_grad_(not frozen)
    ids = inputs("llama")["input_ids"][:, :1]

    @torch.no_grad()
    def step():
        return adapted(input_ids=ids).logits

    before, decoded = answer(adapted), step()
    for layer in layers(adapted):
        layer.clover_S["a"].weight.data.mul_(2)
    after = answer(adapted)
    assert relative(after, before) > 1e-3
    assert torch.equal(unfolded(adapted), after)
    assert relative(step(), decoded) > 1e-3
    assert relative(step(), adapted(input_ids=ids).logits) <= TOLERANCE[torch.float32]


def test_maps_are_kept_inside_the_context_alone(folds):
    adapted = two_adapters()
    first = answer(adapted)
    each = len(folds)
    with keep_maps(adapted):
        answer(adapted)
        with keep_maps(adapted):
            assert torch.equal(answer(adapted), first)
        assert torch.equal(answer(adapted), first)
        assert len(folds) == 2 * each
    assert not any(len(layer._cache) for layer in layers(adapted))
    assert torch.equal(answer(adapted), first)
    assert len(folds) == 3 * each
