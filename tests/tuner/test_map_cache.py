"""Steps of decoding use the maps of the pass before them, unless something has changed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from clover_peft import CloverConfig
from tests.support.adapters import layers
from tests.support.passes import answer, step, two_adapters, unfolded, write
from tests.support.tiny import TOLERANCE, build, inputs, relative


@pytest.mark.parametrize("config", [{}, {"s_matrix": "diagonal"}, {"r": 4}, {"r": 4, "truncate": True}])
def test_maps_are_folded_once_a_sequence(folds, config):
    adapted = two_adapters(**config)
    first = answer(adapted)
    slices = sum(len(layer.specs["a"]) for layer in layers(adapted))
    assert len(folds) == slices
    assert torch.equal(step(adapted), step(adapted))
    assert len(folds) == slices
    adapted.generate(input_ids=inputs("llama")["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert len(folds) == 2 * slices
    assert torch.equal(unfolded(adapted), first)


def test_layers_without_an_active_adapter_keep_nothing():
    adapted = two_adapters()
    adapted.add_adapter("c", CloverConfig(target_modules=["v_proj"]))
    adapted.set_adapter("c", inference_mode=True)
    answer(adapted.eval())
    assert {layer.name.rpartition(".")[2] for layer in layers(adapted) if len(layer._cache)} == {"v_proj"}


def test_a_step_with_kept_maps_is_the_one_with_maps_folded_for_it():
    adapted = two_adapters()
    answer(adapted)
    assert torch.equal(step(adapted), adapted(**inputs("llama", length=1)).logits)


def test_writes_without_a_trace_take_effect_in_the_next_pass_of_several_tokens():
    adapted = two_adapters()
    before, decoded = answer(adapted), step(adapted)
    for layer in layers(adapted):
        layer.clover_S["a"].weight.data.mul_(2)  # torch counts no change
    after = answer(adapted)
    assert relative(after, before) > 1e-3
    assert torch.equal(unfolded(adapted), after)
    answer(adapted)
    assert relative(step(adapted), decoded) > 1e-3


def replace_data(model: PeftModel) -> None:
    for layer in layers(model):
        layer.clover_S["a"].weight.data = 2 * layer.clover_S["a"].weight.data


def replace_parameters(model: PeftModel) -> None:
    for layer in layers(model):
        layer.clover_S["a"].weight = nn.Parameter(2 * layer.clover_S["a"].weight.detach())


def swap(model: PeftModel) -> None:
    for layer in layers(model):
        twice = nn.Parameter(2 * layer.clover_S["a"].weight.detach())
        torch.utils.swap_tensors(layer.clover_S["a"].weight, twice)


def write_through_data(model: PeftModel) -> None:
    for layer in layers(model):
        layer.clover_S["a"].weight.data.mul_(2)  # torch counts no change
    model.eval()


def load(model: PeftModel) -> None:
    state = get_peft_model_state_dict(model, adapter_name="a")
    doubled = {key: 2 * value if "clover_S." in key else value for key, value in state.items()}
    set_peft_model_state_dict(model, doubled, adapter_name="a")


def train_a_step(model: PeftModel) -> None:
    """As some optimizers write: behind torch's back, but after a pass that is differentiated."""
    unfolded(model)
    for layer in layers(model):
        layer.clover_S["a"].weight.data.mul_(2)


def change_bases(model: PeftModel) -> None:
    with torch.no_grad():
        for layer in layers(model):
            layer.clover_U["a"].weight.mul_(2)


def replace_modules(model: PeftModel) -> None:
    for layer in layers(model):
        layer.clover_S["a"] = copy.deepcopy(layer.clover_S["a"])
        layer.clover_S["a"].weight.data.mul_(2)


CHANGES = [
    replace_modules,
    write,
    replace_data,
    replace_parameters,
    swap,
    write_through_data,
    load,
    train_a_step,
    change_bases,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_numbers_takes_effect(change):
    adapted = two_adapters()
    answer(adapted)
    before = step(adapted)
    change(adapted)
    after = step(adapted)
    assert relative(after, before) > 1e-3
    answer(adapted)
    assert relative(step(adapted), after) <= TOLERANCE[torch.float32]


def test_switching_takes_effect_and_comes_back_for_nothing(folds):
    adapted = two_adapters()
    expected = {}
    for name in ("a", "b"):
        adapted.set_adapter(name, inference_mode=True)
        answer(adapted)
        expected[name] = step(adapted)
    assert not torch.equal(expected["a"], expected["b"])
    count = len(folds)
    for name in ("a", "b", "a"):
        adapted.set_adapter(name, inference_mode=True)
        assert torch.equal(step(adapted), expected[name])
    assert len(folds) == count
    adapted.base_model.set_adapter(["a", "b"], inference_mode=True)
    answer(adapted)
    both = step(adapted)
    assert torch.equal(step(adapted), both)
    assert len(folds) == 2 * count
    with adapted.disable_adapter():
        plain = step(adapted)
    assert torch.equal(plain, step(build("llama").eval()))
    assert relative(step(adapted), both) <= TOLERANCE[torch.float32]  # peft made the adapters trainable again


def test_a_mixed_batch_folds_every_adapter_once(folds):
    adapted = two_adapters()
    answer(adapted, adapter_names=["a", "b"])
    count = len(folds)
    first = step(adapted, adapter_names=["a", "b"])
    assert torch.equal(step(adapted, adapter_names=["a", "b"]), first)
    assert len(folds) == count
    assert relative(step(adapted, adapter_names=["b", "a"]), first) > 1e-3


def test_training_folds_in_every_pass(folds):
    adapted = two_adapters().train()
    slices = sum(len(layer.specs["a"]) for layer in layers(adapted))
    for _ in range(2):
        unfolded(adapted)
        answer(adapted)
    assert len(folds) == 4 * slices
    assert not any(len(layer._cache) for layer in layers(adapted))


@pytest.mark.parametrize("optimizer", [partial(torch.optim.AdamW, fused=True), partial(torch.optim.SGD, fused=True)])
def test_an_adapter_that_is_trained_is_always_folded(optimizer):
    """Fused optimizers write without torch counting it, also in a model that stays in evaluation mode."""
    adapted = two_adapters()
    adapted.set_adapter("a")
    steps = optimizer([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        adapted(**inputs("llama")).logits.square().mean().backward()
        before = answer(adapted)
        steps.step()
        after = answer(adapted)
        assert relative(after, before) > 1e-3
        assert torch.equal(unfolded(adapted), after)


def test_maps_of_an_adapter_that_becomes_trained_are_not_used_again():
    adapted = two_adapters()
    answer(adapted)
    before = step(adapted)
    adapted.set_adapter("a")
    for layer in layers(adapted):
        layer.clover_S["a"].weight.data.mul_(2)  # torch counts no change
    assert relative(step(adapted), before) > 1e-3


def test_maps_from_before_compiled_training_are_not_used_again():
    torch._dynamo.reset()
    adapted = two_adapters()
    answer(adapted)
    before = step(adapted)
    adapted.set_adapter("a")
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1, fused=True)
    torch.compile(adapted, backend="eager", fullgraph=True)(**inputs("llama")).logits.square().mean().backward()
    optimizer.step()  # which torch does not count
    adapted.requires_grad_(False)
    assert relative(step(adapted), before) > 1e-3


def test_maps_are_not_kept_of_shared_memory():
    adapted = two_adapters()
    for layer in layers(adapted):
        layer.clover_S["a"].weight.data.share_memory_()
    answer(adapted)
    before = step(adapted)
    for layer in layers(adapted):
        layer.clover_S["a"].weight.data.mul_(2)  # as another process may
    assert relative(step(adapted), before) > 1e-3


def test_maps_that_are_out_of_date_are_given_up():
    adapted = two_adapters()
    answer(adapted)
    adapted.set_adapter("a")
    step(adapted)
    assert not any(len(layer._cache) for layer in layers(adapted))


def test_maps_are_not_kept_of_what_is_not_where_it_was_registered():
    """As FSDP puts plain tensors in the places of parameters."""
    adapted = two_adapters()
    for layer in layers(adapted):
        s = layer.clover_S["a"]
        plain = s._parameters.pop("weight").data.clone()
        s.weight = plain
    answer(adapted)
    before = step(adapted)
    for layer in layers(adapted):
        layer.clover_S["a"].weight.data.mul_(2)
    assert relative(step(adapted), before) > 1e-3


def test_maps_are_not_kept_while_a_graph_is_captured(monkeypatch):
    adapted = two_adapters()
    expected = answer(adapted)
    monkeypatch.setattr("clover_peft.tuner.execution.is_captured", lambda tensor: True)
    for _ in range(2):
        assert torch.equal(answer(adapted), expected)
        assert not any(len(layer._cache) for layer in layers(adapted))


def test_replicas_do_not_share_maps():
    adapted = two_adapters()
    answer(adapted)
    layer = layers(adapted)[0]
    replica = layer._replicate_for_data_parallel()
    replica.clover_S = nn.ModuleDict({"a": copy.deepcopy(layer.clover_S["a"])})
    with torch.no_grad():
        replica.clover_S["a"].weight.zero_()
        replica.base_layer = layer.base_layer
        x = torch.randn(1, 3, layer.in_features)
        assert torch.equal(replica(x), layer.base_layer(x))


def test_each_compute_dtype_has_maps_of_its_own(folds):
    adapted = two_adapters()
    exact, decoded = answer(adapted), step(adapted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer(adapted)
        step(adapted)
    count = len(folds)
    assert torch.equal(step(adapted), decoded)
    assert len(folds) == count
    adapted.to(torch.bfloat16)
    assert answer(adapted).dtype == torch.bfloat16
    assert relative(answer(adapted).float(), exact) < TOLERANCE[torch.bfloat16]


def test_an_adapter_that_was_deleted_and_made_again_is_the_new_one():
    adapted = two_adapters()
    adapted.set_adapter("b", inference_mode=True)
    answer(adapted)
    gone = weakref.ref(layers(adapted)[0].clover_S["b"].weight)
    adapted.delete_adapter("b")
    gc.collect()
    assert gone() is None
    adapted.add_adapter("b", CloverConfig())
    adapted.set_adapter("b")
    assert torch.equal(answer(adapted), answer(build("llama").eval()))


def test_merging_and_unmerging_do_not_disturb_it():
    adapted = two_adapters()
    before = answer(adapted)
    adapted.merge_adapter()
    assert relative(answer(adapted), before) < TOLERANCE[torch.float32]
    adapted.unmerge_adapter()
    assert torch.equal(answer(adapted), before)


def test_inference_mode_and_what_is_made_in_it():
    adapted = two_adapters()
    with torch.inference_mode():
        first = answer(adapted)
    unfolded(adapted).sum()
    assert torch.equal(answer(adapted), first)
    with torch.inference_mode():
        made_there = two_adapters()
        before = answer(made_there)
        for layer in layers(made_there):
            layer.clover_S["a"].weight.mul_(2)  # which torch does not count there
        assert relative(answer(made_there), before) > 1e-3


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_do_not_take_the_maps_along(how):
    adapted = two_adapters()
    expected = answer(adapted)
    assert all(len(layer._cache) for layer in layers(adapted))
    other = copy.deepcopy(adapted) if how == "deepcopy" else pickle.loads(pickle.dumps(adapted))
    assert not any(len(layer._cache) for layer in layers(other))
    assert torch.equal(answer(other), expected)
    write(other)
    assert relative(answer(other), expected) > 1e-3
    assert torch.equal(answer(adapted), expected)
