"""In inference maps are folded once, and again whenever something has changed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from functools import partial

import accelerate
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from clover_peft import CloverConfig, CloverLayer
from clover_peft.tuner.block_spec import BlockSpec
from clover_peft.tuner.execution import apply_adapters
from clover_peft.tuner.map_cache import MapCache
from tests.support.tiny import TOLERANCE, build, inputs, perturb, relative


@pytest.fixture
def folds(monkeypatch):
    """The parts of the slices that were folded, in order."""
    calls: list[str] = []
    plain = BlockSpec.map
    monkeypatch.setattr(BlockSpec, "map", lambda self, tensors: calls.append(self.part) or plain(self, tensors))
    return calls


def model(**config) -> PeftModel:
    """Two adapters, "a" and "b", of which "a" is active."""
    result = get_peft_model(build("llama"), CloverConfig(**config), adapter_name="a")
    result.add_adapter("b", CloverConfig(**config))
    perturb(result)
    result.set_adapter("a", inference_mode=True)
    return result.eval()


def layers(model: nn.Module) -> list[CloverLayer]:
    return [module for module in model.modules() if isinstance(module, CloverLayer)]


@torch.no_grad()
def answer(model: nn.Module, **kwargs) -> Tensor:
    return model(**inputs("llama"), **kwargs).logits


def unfolded(model: PeftModel, **kwargs) -> Tensor:
    """The same from maps that are folded for this pass."""
    return model(**inputs("llama"), **kwargs).logits.detach()


@pytest.mark.parametrize("config", [{}, {"s_matrix": "diagonal"}, {"r": 4}, {"r": 4, "truncate": True}])
def test_maps_are_folded_once(folds, config):
    adapted = model(**config)
    first = answer(adapted)
    slices = sum(len(layer.specs["a"]) for layer in layers(adapted))
    assert len(folds) == slices
    assert torch.equal(answer(adapted), first)
    adapted.generate(input_ids=inputs("llama")["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert len(folds) == slices
    assert torch.equal(unfolded(adapted), first)


def write(model: PeftModel) -> None:
    with torch.no_grad():
        for layer in layers(model):
            layer.clover_S["a"].weight.mul_(2)


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


def step(model: PeftModel) -> None:
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
    step,
    change_bases,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_numbers_takes_effect(change):
    adapted = model()
    before = answer(adapted)
    change(adapted)
    after = answer(adapted)
    assert relative(after, before) > 1e-3
    assert torch.equal(unfolded(adapted), after)


def test_switching_takes_effect_and_comes_back_for_nothing(folds):
    adapted = model()
    expected = {}
    for name in ("a", "b"):
        adapted.set_adapter(name, inference_mode=True)
        expected[name] = answer(adapted)
    assert not torch.equal(expected["a"], expected["b"])
    count = len(folds)
    for name in ("a", "b", "a"):
        adapted.set_adapter(name, inference_mode=True)
        assert torch.equal(answer(adapted), expected[name])
    assert len(folds) == count
    adapted.base_model.set_adapter(["a", "b"], inference_mode=True)
    both = answer(adapted)
    assert torch.equal(answer(adapted), both)
    assert len(folds) == 2 * count
    with adapted.disable_adapter():
        plain = answer(adapted)
    assert torch.equal(plain, answer(build("llama").eval()))
    assert torch.equal(answer(adapted), both)


def test_a_mixed_batch_folds_every_adapter_once(folds):
    adapted = model()
    first = answer(adapted, adapter_names=["a", "b"])
    count = len(folds)
    assert torch.equal(answer(adapted, adapter_names=["a", "b"]), first)
    assert len(folds) == count
    assert relative(answer(adapted, adapter_names=["b", "a"]), first) > 1e-3


def test_training_folds_in_every_pass(folds):
    adapted = model().train()
    slices = sum(len(layer.specs["a"]) for layer in layers(adapted))
    for _ in range(2):
        unfolded(adapted)
        answer(adapted)
    assert len(folds) == 4 * slices
    assert not any(len(layer._cache) for layer in layers(adapted))


@pytest.mark.parametrize("optimizer", [partial(torch.optim.AdamW, fused=True), partial(torch.optim.SGD, fused=True)])
def test_an_adapter_that_is_trained_is_always_folded(optimizer):
    """Fused optimizers write without torch counting it, also in a model that stays in evaluation mode."""
    adapted = model()
    adapted.set_adapter("a")
    steps = optimizer([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        adapted(**inputs("llama")).logits.square().mean().backward()
        before = answer(adapted)
        steps.step()
        after = answer(adapted)
        assert relative(after, before) > 1e-3
        assert torch.equal(unfolded(adapted), after)


def a_step(model: nn.Module, sequences: int = 2, family: str = "llama") -> Tensor:
    """As in decoding: one token of every sequence."""
    torch.manual_seed(0)
    return model(**inputs(family, batch=sequences, length=1)).logits


FORMS = {
    "full": [{}],
    "diagonal": [{"s_matrix": "diagonal"}],
    "svd": [{"basis": "svd"}],
    "leading": [{"r": 4}],
    "truncated": [{"r": 4, "truncate": True}],
    "several": [{}, {"s_matrix": "diagonal"}, {"r": 4, "truncate": True}],
    "beside a low rank": [{"low_rank": 2}],
}


def in_training(configs: list[dict], family: str = "llama") -> PeftModel:
    """A model with adapters of these configs, all active and trained."""
    result = get_peft_model(build(family), CloverConfig(**configs[0]), adapter_name="0")
    for number, config in enumerate(configs[1:], 1):
        result.add_adapter(str(number), CloverConfig(**config))
    result.base_model.set_adapter([str(number) for number in range(len(configs))])
    perturb(result)
    return result


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("configs", FORMS.values(), ids=FORMS)
def test_a_step_of_decoding_with_an_adapter_that_is_trained_folds_nothing(folds, configs, training):
    adapted = in_training(configs).train(training)
    with torch.no_grad():
        step = a_step(adapted)
        assert not folds
        for layer in layers(adapted):
            for name in layer.specs:
                layer.clover_S[name].weight.data.mul_(2)  # is seen, whether torch counts it or not
        twice = a_step(adapted)
        assert not folds
    assert relative(a_step(adapted).detach(), twice) < TOLERANCE[torch.float32]
    assert folds
    assert relative(twice, step) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2", "deepseek_v3", "opt", "bart"])
def test_a_step_of_every_kind_of_target_is_the_folded_one(family):
    adapted = in_training([{}], family).eval()
    with torch.no_grad():
        step = a_step(adapted, family=family)
    assert relative(step, a_step(adapted, family=family).detach()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_under_autocast_is_as_exact_as_a_folded_one(dtype):
    adapted = in_training([{}]).eval()
    expected = a_step(adapted).detach()
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        rough = a_step(adapted)
    assert relative(rough.float(), expected) < 2 * TOLERANCE[dtype]


def test_with_dropout_a_step_is_folded_as_in_a_pass_that_is_differentiated(folds):
    adapted = in_training([{"clover_dropout": 0.3}]).train()
    with torch.no_grad():
        step = a_step(adapted)
    assert folds
    assert torch.equal(step, a_step(adapted).detach())


def test_an_adapter_that_is_active_twice_counts_as_often_in_a_step():
    adapted = in_training([{}]).eval()
    adapted.base_model.set_adapter(["0", "0"])
    with torch.no_grad():
        step = a_step(adapted)
    assert relative(step, a_step(adapted).detach()) < TOLERANCE[torch.float32]


def test_a_step_of_more_sequences_than_features_is_folded(folds):
    adapted = in_training([{}])
    size = min(spec.size for layer in layers(adapted) for spec in layer.specs["0"])
    with torch.no_grad():
        a_step(adapted, size - 1)
        assert not folds
        a_step(adapted, size)
        assert folds


def test_a_step_of_decoding_starts_at_the_base_model_to_the_bit():
    base = build("llama", torch.bfloat16)
    with torch.no_grad():
        expected = a_step(base)
        assert torch.equal(a_step(get_peft_model(base, CloverConfig())), expected)


@pytest.mark.parametrize("configs", [FORMS[name] for name in FORMS if name != "beside a low rank"])
def test_a_step_in_bfloat16_errs_no_more_than_a_folded_one(configs):
    exact = in_training(configs).double()
    names = exact.active_adapters
    errors = {}
    for name, context in (("unfolded", torch.no_grad()), ("folded", torch.enable_grad())):
        total = 0.0
        with context:
            for rough, fine in zip(layers(copy.deepcopy(exact).bfloat16()), layers(exact), strict=True):
                torch.manual_seed(0)
                z = torch.randn(3, 1, fine.out_features, dtype=torch.bfloat16)
                wanted = apply_adapters(fine, z.double(), names, MapCache()) - z
                total += float(relative(apply_adapters(rough, z, names, MapCache()).double() - z, wanted))
        errors[name] = total
    assert errors["unfolded"] <= 1.01 * errors["folded"]


@pytest.mark.parametrize("trained", [False, True])
def test_a_compiled_step_folds_nothing(folds, trained):
    torch._dynamo.reset()
    adapted = model()
    adapted.set_adapter("a", inference_mode=not trained)
    passes = [(1, 2, 0), (1, 5, 0), (7, 5, 6), (1, 40, 0)]  # length, sequences, maps folded
    with torch.no_grad():
        expected = [adapted(**inputs("llama", batch=n, length=length)).logits for length, n, _ in passes]
        compiled = torch.compile(adapted, backend="eager", fullgraph=True)
        for (length, sequences, count), wanted in zip(passes, expected, strict=True):
            folds.clear()
            answered = compiled(**inputs("llama", batch=sequences, length=length)).logits
            assert relative(answered, wanted) < TOLERANCE[torch.float32]
            assert len(folds) == count, (length, sequences)
        write(adapted)
        assert relative(compiled(**inputs("llama", length=1)).logits, expected[0]) > 1e-3


@pytest.mark.parametrize("how", ["bounded", "unbacked"])
def test_a_step_compiles_for_any_number_of_sequences(how):
    torch._dynamo.reset()
    layer = layers(in_training([{}]).eval())[0]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        for count in (3, 50):
            x = torch.randn(count, 1, layer.in_features)
            if how == "bounded":
                torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
            else:
                torch._dynamo.decorators.mark_unbacked(x, 0)
            assert relative(compiled(x), layer(x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("length", [1, 5])
def test_a_layer_can_be_traced(length, grad):
    layer = layers(in_training([{}]).eval())[0]
    x = torch.randn(2, length, layer.in_features)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        x = torch.randn(3, length, layer.in_features)
        assert relative(traced(x), layer(x)) < TOLERANCE[torch.float32]


def test_a_step_can_be_exported_for_any_number_of_sequences():
    adapted = in_training([{}]).eval()
    layer = layers(adapted)[0]
    sequences = torch.export.Dim("sequences", min=2, max=4096)
    x = torch.randn(3, 1, layer.in_features)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: sequences}}, strict=False)
        for count in (2, 50):
            x = torch.randn(count, 1, layer.in_features)
            assert relative(exported.module()(x), layer(x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("configs", [FORMS[name] for name in ("full", "leading", "truncated", "several")])
def test_tensors_are_read_in_calls_of_their_modules(configs, buffers, frozen):
    """As what shards or offloads them needs it: elsewhere they are empty, or not there."""
    adapted = in_training(configs).eval().requires_grad_(not frozen)

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            found = [a_step(adapted), answer(adapted), answer(adapted)]
        return [*found, unfolded(adapted)]

    expected = outputs()
    accelerate.cpu_offload(adapted, torch.device("cpu"), offload_buffers=buffers)
    assert all(s.is_meta for layer in layers(adapted) for s in layer.clover_S.parameters())
    assert all(u.is_meta is buffers for layer in layers(adapted) for u in layer.clover_U.buffers())
    for found, wanted in zip(outputs(), expected, strict=True):
        assert relative(found, wanted) < TOLERANCE[torch.float32]


def test_maps_of_an_adapter_that_becomes_trained_are_not_used_again():
    adapted = model()
    before = answer(adapted)
    adapted.set_adapter("a")
    for layer in layers(adapted):
        layer.clover_S["a"].weight.data.mul_(2)  # torch counts no change
    assert relative(answer(adapted), before) > 1e-3


def test_maps_from_before_compiled_training_are_not_used_again():
    torch._dynamo.reset()
    adapted = model()
    before = answer(adapted)
    adapted.set_adapter("a")
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1, fused=True)
    torch.compile(adapted, backend="eager", fullgraph=True)(**inputs("llama")).logits.square().mean().backward()
    optimizer.step()  # which torch does not count
    adapted.requires_grad_(False)
    after = answer(adapted)
    assert relative(after, before) > 1e-3
    assert torch.equal(answer(adapted), after)


def test_maps_are_not_kept_of_shared_memory():
    adapted = model()
    for layer in layers(adapted):
        layer.clover_S["a"].weight.data.share_memory_()
    before = answer(adapted)
    for layer in layers(adapted):
        layer.clover_S["a"].weight.data.mul_(2)  # as another process may
    assert relative(answer(adapted), before) > 1e-3


def test_maps_that_are_out_of_date_are_given_up():
    adapted = model()
    answer(adapted)
    adapted.set_adapter("a")
    answer(adapted)
    assert not any(len(layer._cache) for layer in layers(adapted))


def test_maps_are_not_kept_of_what_is_not_where_it_was_registered():
    """As FSDP puts plain tensors in the places of parameters."""
    adapted = model()
    for layer in layers(adapted):
        s = layer.clover_S["a"]
        plain = s._parameters.pop("weight").data.clone()
        s.weight = plain
    before = answer(adapted)
    for layer in layers(adapted):
        layer.clover_S["a"].weight.data.mul_(2)
    assert relative(answer(adapted), before) > 1e-3


def test_maps_are_not_kept_while_a_graph_is_captured(monkeypatch):
    adapted = model()
    expected = answer(adapted)
    monkeypatch.setattr("clover_peft.tuner.execution.is_captured", lambda tensor: True)
    for _ in range(2):
        assert torch.equal(answer(adapted), expected)
        assert not any(len(layer._cache) for layer in layers(adapted))


def test_replicas_do_not_share_maps():
    adapted = model()
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
    adapted = model()
    exact = answer(adapted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = answer(adapted)
        assert torch.equal(answer(adapted), rough)
    count = len(folds)
    assert torch.equal(answer(adapted), exact)
    assert len(folds) == count
    adapted.to(torch.bfloat16)
    assert answer(adapted).dtype == torch.bfloat16
    assert relative(answer(adapted).float(), exact) < TOLERANCE[torch.bfloat16]


def test_an_adapter_that_was_deleted_and_made_again_is_the_new_one():
    adapted = model()
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
    adapted = model()
    before = answer(adapted)
    adapted.merge_adapter()
    assert relative(answer(adapted), before) < TOLERANCE[torch.float32]
    adapted.unmerge_adapter()
    assert torch.equal(answer(adapted), before)


def test_inference_mode_and_what_is_made_in_it():
    adapted = model()
    with torch.inference_mode():
        first = answer(adapted)
    unfolded(adapted).sum()
    assert torch.equal(answer(adapted), first)
    with torch.inference_mode():
        made_there = model()
        before = answer(made_there)
        for layer in layers(made_there):
            layer.clover_S["a"].weight.mul_(2)  # which torch does not count there
        assert relative(answer(made_there), before) > 1e-3


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_do_not_take_the_maps_along(how):
    adapted = model()
    expected = answer(adapted)
    assert all(len(layer._cache) for layer in layers(adapted))
    other = copy.deepcopy(adapted) if how == "deepcopy" else pickle.loads(pickle.dumps(adapted))
    assert not any(len(layer._cache) for layer in layers(other))
    assert torch.equal(answer(other), expected)
    write(other)
    assert relative(answer(other), expected) > 1e-3
    assert torch.equal(answer(adapted), expected)
