"""Layouts of stacks of experts' weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clover_peft.base_model.experts import ExpertsLayout, ExpertsWeight

E, FEATURES, D = 3, 4, 5
# Layout -> shape of the stack, and the adapted features of an expert.
LAYOUTS = {
    "out, in": ((E, FEATURES, D), [0, 1, 2, 3]),
    "in, out": ((E, D, FEATURES), [0, 1, 2, 3]),
    "gate up, in": ((E, 2 * FEATURES, D), [4, 5, 6, 7]),
    "in, gate up": ((E, D, 2 * FEATURES), [4, 5, 6, 7]),
    "gate|up, in": ((E, 2 * FEATURES, D), [1, 3, 5, 7]),
    "in, gate|up": ((E, D, 2 * FEATURES), [1, 3, 5, 7]),
    "up gate, in": ((E, 2 * FEATURES, D), [0, 1, 2, 3]),
}


def _module(words: str) -> tuple[nn.Module, ExpertsWeight]:
    shape, _ = LAYOUTS[words]
    layout = ExpertsLayout.read(words)
    module = nn.Module()
    module.w = nn.Parameter(torch.randn(shape), requires_grad=False)
    module.w_bias = nn.Parameter(torch.randn(E, shape[layout.dim]), requires_grad=False)
    return module, ExpertsWeight(module, "experts.w", layout)


@pytest.mark.parametrize("words", LAYOUTS)
def test_the_adapted_features_are_one_projection(words):
    module, base = _module(words)
    _, features = LAYOUTS[words]
    by_output = module.w if words.endswith(", in") else module.w.mT  # (E, O, D)
    assert (base.in_features, base.out_features) == (D, E * FEATURES)
    assert torch.equal(base.transposed(), by_output[:, features].reshape(E * FEATURES, D).mT)
    assert torch.equal(base.bias, module.w_bias[:, features].flatten())


@pytest.mark.parametrize("words", LAYOUTS)
def test_writing_changes_the_adapted_features_alone(words):
    module, base = _module(words)
    _, features = LAYOUTS[words]
    own, biases = module.w, module.w_bias
    assert torch.equal(base.as_stored(base.transposed()), own)
    base.write(base.as_stored(base.transposed() + 1), base.bias + 1)
    assert base.is_merged
    assert module.w.is_contiguous()
    changed = (module.w - own if words.endswith(", in") else (module.w - own).mT)[:, :, 0]
    expected = torch.zeros_like(biases)
    expected[:, features] = 1
    torch.testing.assert_close(changed, expected)
    torch.testing.assert_close(module.w_bias - biases, expected)
    assert torch.equal(base.as_stored(base.transposed()), own)  # the base's own, while merged
    base.restore()
    assert module.w is own
    assert module.w_bias is biases
