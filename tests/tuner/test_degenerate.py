"""Degenerate and ill-conditioned heads inside a model: harmless at the start, and trained wherever they can be."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from clover_peft import CloverConfig, CloverLayer
from clover_peft.linalg.decomposition import gram, svd_bases
from clover_peft.tuner.config_checks import MAX_CONDITION, MOST_CONDITION
from tests.support.tiny import build, inputs

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


def _weak_direction(w: Tensor) -> None:
    direction = torch.nn.functional.normalize(torch.arange(1.0, w.shape[1] + 1), dim=0)
    w[1] -= (1 - 1e-5) * torch.outer(direction, direction @ w[1])


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
        lacking: path of the target -> block -> (directions that it lacks, directions in the block). All others are
            healthy.
        sizes: changes to the model's config.
        config: changes to the adapter's.
        silent: path of a target -> its blocks whose output the model never uses: no gradient, though they are healthy.
    """

    spoil: Callable[[nn.Module], None]
    lacking: dict[str, dict[int, tuple[int, int]]]
    sizes: dict
    config: dict
    silent: dict[str, list[int]] = field(default_factory=dict)


def _case(spoil, projection, lacking, block=D_HEAD, silent=None, **config) -> Case:
    return Case(spoil, {f"model.layers.1.{projection}": {1: (lacking, block)}}, {}, config, silent or {})


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
    "value head has a weak direction": _case(_rows(_V, _weak_direction), _V, 0),
    "value head has a weak direction, alone": _case(_rows(_V, _weak_direction), _V, 0, cross_layer=False),
    "key head has a weak direction": _case(_rows(_K, _weak_direction), _K, 0),
    "up-projection has a weak direction": _case(_rows(_UP, _weak_direction), _UP, 0, block=40),
    "blocks wider than the hidden size": Case(
        lambda model: None,
        {
            f"model.layers.{layer}.{projection}": dict.fromkeys(range(HEADS), (lacking, size))
            for layer in range(2)
            for projection, lacking, size in ((_V, 4, 20), (_K, 4, 20), (_UP, 24, 40))
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
def test_a_warning_names_the_blocks_of_zeros_and_nothing_else(name):
    case = CASES[name]
    zeros = {path for path, blocks in case.lacking.items() for lacking, size in blocks.values() if lacking == size}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(make_base(name), CloverConfig(**case.config))
    found = [str(w.message) for w in caught if "will not be trained" in str(w.message)]
    assert len(found) == bool(zeros)  # one for the model
    for path in zeros:
        assert f"will not be trained: {path} (" in found[0]
        assert "), block(s) 1; use" in found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_weak_directions_amplify_rounding_by_no_more_than_the_limit(name, dtype):
    model = adapt(make_base(name).to(dtype), name)
    for path, module in layers_of(model).items():
        (spec,) = module.specs["default"]
        tensors = module.tensors("default", spec)
        for basis in (tensors.c, tensors.e):
            values = None if basis is None else torch.linalg.svdvals(basis.double())
            assert values is None or (values[:, 0] <= 1.01 * MAX_CONDITION * values[:, -1]).all(), path


def test_the_limit_is_saved_and_an_earlier_file_has_none(tmp_path):
    model = adapt(make_base("value head has equal rows"), "value head has equal rows")
    model.peft_config["default"].save_bases = False
    backward(model)
    sgd(model, 1e-2)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["max_condition"] == MAX_CONDITION
    again = PeftModel.from_pretrained(make_base("value head has equal rows"), tmp_path)
    assert torch.equal(outputs(again), outputs(model))  # with bases computed again
    del config["max_condition"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the bases computed here are not those"):
        PeftModel.from_pretrained(make_base("value head has equal rows"), tmp_path)


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

    def dropped(bases):
        return (bases.c == 0).all(-1).sum(-1)

    assert dropped(whole).tolist() == [4]
    assert dropped(whole.leading(8)).tolist() == [0]
    assert dropped(whole.leading(10)).tolist() == [2]
    assert (whole.leading(10).c.abs().sum(-1) > 0).sum() == 8


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_every_direction_that_the_weights_have(name):
    model = adapt(make_base(name), name)
    backward(model)
    for path, module in layers_of(model).items():
        gradient = module.clover_S["default"].weight.grad
        size = gradient.shape[-1]
        for block, of_block in enumerate(gradient):
            lacking, _ = CASES[name].lacking.get(path, {}).get(block, (0, size))
            if block in CASES[name].silent.get(path, []):
                lacking = size
            reached = (of_block != 0).sum(-1) if of_block.ndim == 2 else (of_block != 0).sum()
            assert (reached == 0).all() if lacking == size else int(reached.max()) >= size - lacking, (path, block)


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
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(6):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    trained = outputs(model)
    effect = trained - outputs(make_base(name))
    merged = outputs(model.merge_and_unload(safe_merge=True))
    assert 0 < float((merged - trained).norm()) <= 1e-4 * float(effect.norm())


def test_a_copied_config_keeps_the_limit_and_a_file_without_one_gives_it_to_no_other(tmp_path):
    assert CloverConfig().max_condition == MAX_CONDITION
    assert dataclasses.replace(CloverConfig(), r=4).max_condition == MAX_CONDITION
    name = "value head has a weak direction"
    adapt(make_base(name), name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["max_condition"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = PeftModel.from_pretrained(make_base(name), tmp_path, is_trainable=True)
    model.add_adapter("reference", model.peft_config["default"])  # as TRL makes one
    assert model.peft_config["default"].max_condition is None
    for layer in layers_of(model).values():
        for attribute in ("clover_U", "clover_V"):
            for key, tensor in getattr(layer, attribute)["default"].named_buffers():
                assert torch.equal(tensor, dict(getattr(layer, attribute)["reference"].named_buffers())[key])


@pytest.mark.parametrize("options", [{"r": 8}, {"r": 8, "truncate": True}])
def test_leading_directions_are_those_of_the_weights(options):
    name = "up-projection has a weak direction"
    bases = []
    for limit in (MAX_CONDITION, MOST_CONDITION):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(make_base(name), CloverConfig(max_condition=limit, **options))
        bases.append([layer.clover_U["default"].weight for layer in layers_of(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*bases, strict=True))
