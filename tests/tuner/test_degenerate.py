"""Degenerate heads inside a model: named in a warning, harmless at the start, trained wherever they can be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from clover_peft import CloverConfig, CloverLayer
from clover_peft.linalg.decomposition import gram, svd_bases
from tests.support.tiny import TOLERANCE, build, inputs, relative

HEADS, D_HEAD = 2, 12


pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------- broken weights


def _rows(projection: str, change: Callable[[Tensor], None]) -> Callable[[nn.Module], None]:
    """Change the weight of a projection in the second layer, seen as its two blocks (2, d, D)."""

    def apply(model: nn.Module) -> None:
        weight = model.get_submodule(f"model.layers.1.{projection}").weight
        with torch.no_grad():
            change(weight.view(HEADS, -1, weight.shape[1]))

    return apply


def _zero(w: Tensor) -> None:
    w[1] = 0


def _equal_rows(w: Tensor) -> None:
    w[1, 3] = w[1, 5]


def _output_reads_nothing(model: nn.Module) -> None:
    # Query heads 2 and 3 share key-value head 1.
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.o_proj").weight[:, 2 * D_HEAD :] = 0


def _output_ignores_one_coordinate(model: nn.Module) -> None:
    weight = model.get_submodule("model.layers.1.self_attn.o_proj").weight
    with torch.no_grad():
        weight.view(weight.shape[0], 4, D_HEAD)[:, 2:, 7] = 0


@dataclass(frozen=True)
class Case:
    """A tiny llama (2 key-value heads of 12, up-projection in 2 blocks of 40) with something wrong in one layer.

    Attributes:
        spoil: changes the model in place.
        dropped: path of the target -> block -> (directions dropped, directions in the block). All others are healthy.
        sizes: changes to the model's config.
        config: changes to the adapter's.
        silent: path of a target -> its blocks whose output the model never uses: no gradient, though they are healthy.
    """

    spoil: Callable[[nn.Module], None]
    dropped: dict[str, dict[int, tuple[int, int]]]
    sizes: dict
    config: dict
    silent: dict[str, list[int]] = field(default_factory=dict)


def _case(spoil, projection, dropped, block=D_HEAD, silent=None, **config) -> Case:
    return Case(spoil, {f"model.layers.1.{projection}": {1: (dropped, block)}}, {}, config, silent or {})


_V, _K, _UP = "self_attn.v_proj", "self_attn.k_proj", "mlp.up_proj"
# Where a head's values reach nothing, nor do its keys.
_SILENT_KEYS = {"model.layers.1.self_attn.k_proj": [1]}
CASES = {
    "value head is zero": _case(_rows(_V, _zero), _V, 12, silent=_SILENT_KEYS),
    "value head has equal rows": _case(_rows(_V, _equal_rows), _V, 1),
    "value head has equal rows, diagonal": _case(
        _rows(_V, _equal_rows), _V, 1, s_matrix="diagonal", target_modules=["v_proj", "k_proj"]
    ),
    "value head has equal rows, alone": _case(_rows(_V, _equal_rows), _V, 1, cross_layer=False),
    "output reads nothing of a head": _case(_output_reads_nothing, _V, 12, silent=_SILENT_KEYS),
    "output ignores a coordinate of a head": _case(_output_ignores_one_coordinate, _V, 1),
    "key head is zero": _case(_rows(_K, _zero), _K, 12),
    "key head has equal rows": _case(_rows(_K, _equal_rows), _K, 1),
    "key head has equal rows, singular vectors": _case(_rows(_K, _equal_rows), _K, 1, basis="svd"),
    "up-projection has equal rows": _case(_rows(_UP, _equal_rows), _UP, 1, block=40),
    "blocks wider than the hidden size": Case(
        lambda model: None,
        {
            f"model.layers.{layer}.{projection}": dict.fromkeys(range(HEADS), (dropped, size))
            for layer in range(2)
            for projection, dropped, size in ((_V, 4, 20), (_K, 4, 20), (_UP, 24, 40))
        },
        dict(hidden_size=16, head_dim=20),
        {},
    ),
}


def make_base(name: str) -> nn.Module:
    base = build("llama", **CASES[name].sizes)
    CASES[name].spoil(base)
    return base


def adapt(base: nn.Module, name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base, CloverConfig(**CASES[name].config))


def layers_of(model: nn.Module) -> dict[str, CloverLayer]:
    """Path in the base model -> CLOVER layer."""
    return {module.name: module for module in model.modules() if isinstance(module, CloverLayer)}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**inputs("llama")).logits


def backward(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    result = model(**inputs("llama", batch=4, length=12)).logits
    loss = (result * torch.randn(result.shape, generator=generator)).mean()
    loss.backward()
    return loss


def sgd(model: nn.Module, learning_rate: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= learning_rate * parameter.grad


# ---------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", CASES)
def test_the_warning_names_module_blocks_and_directions_and_nothing_healthy(name):
    case = CASES[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(make_base(name), CloverConfig(**case.config))
    found = [str(w.message) for w in caught if "degenerate" in str(w.message)]
    assert len(found) == bool(case.dropped)  # one for the model
    places = found[0].partition("will not be trained: ")[2].split("; ") if found else []
    assert len(places) == len(case.dropped)
    for path, blocks in case.dropped.items():
        named = ", ".join(f"{block} ({dropped} of {size})" for block, (dropped, size) in blocks.items())
        assert [p for p in places if p.startswith(path + " (") and p.endswith(f"block(s) {named}")]


def test_a_healthy_model_gives_no_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*degenerate.*")
        get_peft_model(build("llama"), CloverConfig())


@pytest.mark.parametrize("name", CASES)
def test_a_degenerate_model_starts_as_its_base_bit_for_bit(name):
    expected = outputs(make_base(name))
    model = adapt(make_base(name), name)
    assert torch.equal(outputs(model), expected)
    with model.disable_adapter():
        assert torch.equal(outputs(model), expected)


def test_directions_that_are_not_trained_anyway_are_not_mentioned() -> None:
    weight = torch.randn(48, 1, 12, dtype=torch.float64)
    weight[..., 8:] = 0
    whole = svd_bases(gram(weight))
    assert whole.dropped.tolist() == [4]
    assert whole.leading(8).dropped.tolist() == [0]
    assert whole.leading(10).dropped.tolist() == [2]
    assert (whole.leading(10).coordinates.abs().sum(-1) > 0).sum() == 8


def trainable_mask(s: Tensor, module: CloverLayer, dropped: dict[int, tuple[int, int]]) -> Tensor:
    """Which numbers of S a gradient must reach: all but those in dropped directions.

    In a pair or an SVD basis a dropped direction is a row and a column of S. A QR basis drops coordinates only: E is
    the identity, so every row is reached.
    """
    (spec,) = module.specs["default"]
    mask = torch.ones_like(s, dtype=torch.bool)
    for block, (count, size) in dropped.items():
        mask[block, ..., size - count :] = False
        if s.ndim == 3 and spec.basis != "qr":
            mask[block, size - count :] = False
    return mask


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_exactly_the_numbers_of_S_outside_dropped_directions(name):
    model = adapt(make_base(name), name)
    backward(model)
    for path, module in layers_of(model).items():
        s = module.clover_S["default"].weight
        expected = trainable_mask(s, module, CASES[name].dropped.get(path, {}))
        expected[CASES[name].silent.get(path, [])] = False
        assert expected.any()
        assert torch.equal(s.grad != 0, expected), path


@pytest.mark.parametrize("name", CASES)
def test_a_degenerate_model_trains_to_finite_outputs_and_a_lower_loss(name):
    model = adapt(make_base(name), name)
    loss = backward(model)
    sgd(model, 1e-2)
    after = backward(model)
    assert after < loss
    assert torch.isfinite(outputs(model)).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", CASES)
def test_a_trained_degenerate_model_merges_to_the_same_function(name):
    model = adapt(make_base(name), name)
    for _ in range(2):
        backward(model)
        sgd(model, 1e-1)
    trained = outputs(model)
    assert not torch.equal(trained, outputs(make_base(name)))
    merged = model.merge_and_unload(safe_merge=True)
    assert relative(outputs(merged), trained) <= TOLERANCE[torch.float32]
