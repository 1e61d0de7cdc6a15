"""An adapter that was saved folded is trained on: in bases of the base model's weights, from the same function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file

from clover_peft import CloverConfig, initialize_from_activations
from tests.support.adapters import layers
from tests.support.saved_adapters import LAYOUTS, WEIGHTS, edit, edit_config, load, save_trained, trained_model
from tests.support.tiny import TOLERANCE, build, inputs, logits, relative


def _step(model: torch.nn.Module) -> float:
    """The loss before a step of training, which changes every trainable number that has a gradient."""
    ids = inputs("llama")["input_ids"]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)
    torch.optim.SGD(trained, lr=1e-2).step()
    return float(loss)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("case", LAYOUTS)
def test_it_starts_as_it_was_trains_and_saves_its_bases(case: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    family, choices = LAYOUTS[case]
    before = save_trained(tmp_path / "folded", family, save_bases="folded", **choices)
    model = load(build(family), tmp_path / "folded", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert relative(logits(model, family), before) < TOLERANCE[torch.float32]
    assert all(p.requires_grad for name, p in model.named_parameters() if "clover_S" in name)
    with torch.no_grad():
        for layer in layers(model):
            for spec in layer.specs["default"]:
                assert (spec.r, spec.s_matrix, spec.truncate) == (spec.size, "full", False)
                layer.clover_S["default"].get(spec.name).mul_(1.5)
    after = logits(model, family)
    assert relative(after, before) > 1e-3
    model.save_pretrained(tmp_path / "again")
    config = PeftConfig.from_pretrained(tmp_path / "again")
    assert (config.folded, config.save_bases) == (False, True)
    again = load(build(family), tmp_path / "again", is_trainable=True).eval()
    assert torch.equal(logits(again, family), after)


def test_training_goes_on(tmp_path: Path) -> None:
    whole = trained_model(build("llama"))
    whole.save_pretrained(tmp_path / "whole")
    whole.peft_config["default"].save_bases = "folded"
    whole.save_pretrained(tmp_path / "folded")
    losses = []
    for name in ("whole", "folded"):
        model = load(build("llama"), tmp_path / name, is_trainable=True)
        losses.append([_step(model) for _ in range(3)])
    assert losses[0][2] < losses[0][0]
    # The bases are those it was trained with, because they are computed from the same weights, and so are the steps.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_map_in_other_bases_is_the_same(tmp_path: Path) -> None:
    model = get_peft_model(build("llama"), CloverConfig())
    initialize_from_activations(model, [{"input_ids": inputs("llama")["input_ids"]}])
    with torch.no_grad():
        for layer in layers(model):
            s = layer.clover_S["default"].get("weight")
            s.add_(0.1 * torch.randn(s.shape, generator=torch.Generator().manual_seed(0)))
    model.peft_config["default"].save_bases = "folded"
    model.save_pretrained(tmp_path)
    loaded = load(build("llama"), tmp_path, is_trainable=True).eval()
    assert relative(logits(loaded, "llama"), logits(model.eval(), "llama")) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_on_another_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained_model(build("llama", dtype), save_bases="folded")
    model.save_pretrained(tmp_path)
    loaded = load(build("llama", dtype), tmp_path, is_trainable=True).eval()
    assert relative(logits(loaded, "llama"), logits(model, "llama")) < TOLERANCE[dtype]
    assert {p.dtype for layer in layers(loaded) for p in layer.clover_S.parameters()} == {
        p.dtype for layer in layers(model) for p in layer.clover_S.parameters()
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(r=5), r"k_proj \(k, block \d\): expected a map that 5 of 12 directions with a full S can express"),
        (dict(s_matrix="diagonal"), r"k_proj \(k, block \d\): expected a map that 12 of 12 directions with a diag"),
        (dict(r=5, truncate=True), r"5 of 12 directions with a full S that truncates"),
    ],
    ids=str,
)
def test_a_map_outside_of_the_bases_is_refused(values: dict, message: str, tmp_path: Path) -> None:
    save_trained(tmp_path, save_bases="folded")
    edit_config(tmp_path, **values)
    base = build("llama")
    with pytest.raises(ValueError, match=message):
        load(base, tmp_path, is_trainable=True)
    assert not layers(base)
    load(base, tmp_path)


def test_a_map_within_few_directions_gets_them_back(tmp_path: Path) -> None:
    before = save_trained(tmp_path, r=5, save_bases="folded")
    edit_config(tmp_path, r=5)
    model = load(build("llama"), tmp_path, is_trainable=True).eval()
    assert {layer.r["default"] for layer in layers(model)} == {5}
    assert relative(logits(model, "llama"), before) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_beside_another_adapter(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    before = save_trained(tmp_path, save_bases="folded")
    model = trained_model(build("llama"), "one", seed=5)
    outputs = logits(model, "llama")
    model.load_adapter(tmp_path, "two", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    model.eval()
    assert torch.equal(logits(model, "llama"), outputs)
    model.set_adapter("two")
    assert relative(logits(model, "llama"), before) < TOLERANCE[torch.float32]
    model.add_adapter("third", CloverConfig())
    model.base_model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum")
    assert not model.peft_config["sum"].folded


def test_with_a_state_dict(tmp_path: Path) -> None:
    before = save_trained(tmp_path, save_bases="folded")
    config = CloverConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    state = {k.removeprefix("base_model.model."): t for k, t in load_file(tmp_path / WEIGHTS).items()}
    model = inject_adapter_in_model(config, build("llama"), state_dict=state)
    set_peft_model_state_dict(model, state)
    assert relative(logits(model.eval(), "llama"), before) < TOLERANCE[torch.float32]


def test_transformers_which_would_load_the_maps_as_s_is_refused(tmp_path: Path) -> None:
    save_trained(tmp_path, save_bases="folded")
    base = build("llama")
    with pytest.raises(ValueError, match=r"found transformers as its loader; load it with PeftModel\.from_pretrained"):
        base.load_adapter(str(tmp_path), is_trainable=True)
    assert not layers(base)


def test_another_base_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    save_trained(tmp_path, save_bases="folded")
    with pytest.raises(ValueError, match="expected the weights of the base"):
        load(build("llama", seed=1), tmp_path, is_trainable=True)
    edit(tmp_path, lambda tensors: next(iter(t for k, t in tensors.items() if "clover_S" in k)).fill_(torch.nan))
    base = build("llama")
    with pytest.raises(ValueError, match="NaN or infinite"):
        load(base, tmp_path, is_trainable=True)
    assert not layers(base)


def test_a_base_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    save_trained(tmp_path, save_bases="folded")
    base = build("llama").to("meta")
    with pytest.raises(ValueError, match="bases, and they cannot be computed from a base model without weights"):
        load(base, tmp_path, is_trainable=True)
