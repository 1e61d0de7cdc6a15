"""How a layer applies its maps in one pass: which form it takes, and that all forms give the same numbers."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from clover_peft import CloverConfig
from clover_peft.tuner.execution import Form, MapCache, apply_adapters, choose_form
from tests.support.adapters import layers
from tests.support.passes import answer, two_adapters, unfolded, write
from tests.support.tiny import TOLERANCE, build, inputs, perturb, relative


@pytest.mark.parametrize(
    ("has_kept_maps", "has_model_maps", "is_decoding", "has_dropout", "form"),
    [
        (True, False, False, False, Form.CACHED),
        (True, False, False, True, Form.CACHED),
        (True, False, True, False, Form.CACHED),
        (True, False, True, True, Form.CACHED),
        (True, True, False, False, Form.CACHED),
        (True, True, False, True, Form.CACHED),
        (True, True, True, False, Form.CACHED),
        (True, True, True, True, Form.CACHED),
        (False, True, False, False, Form.TOGETHER),
        (False, True, False, True, Form.TOGETHER),
        (False, True, True, False, Form.TOGETHER),
        (False, True, True, True, Form.TOGETHER),
        (False, False, True, False, Form.STAGED),
        (False, False, True, True, Form.FOLDED),
        (False, False, False, False, Form.FOLDED),
        (False, False, False, True, Form.FOLDED),
    ],
)
def test_the_choice_of_a_form(has_kept_maps, has_model_maps, is_decoding, has_dropout, form):
    found = choose_form(
        has_kept_maps=has_kept_maps, has_model_maps=has_model_maps, is_decoding=is_decoding, has_dropout=has_dropout
    )
    assert found is form


# One row a kind of pass: the adapter is frozen or trained, what the pass is like, and the form that it takes.
TABLE = [
    # Maps of frozen adapters are folded in passes of several tokens a sequence, and kept for those of one.
    ("frozen", {}, Form.FOLDED),
    ("frozen", {"length": 1}, Form.CACHED),
    ("frozen", {"length": 1, "sequences": 12}, Form.CACHED),
    ("frozen", {"length": 1, "before": 1}, Form.STAGED),
    ("frozen", {"length": 1, "before": 1, "sequences": 12}, Form.FOLDED),
    ("frozen", {"flat": True}, Form.FOLDED),
    ("frozen", {"dropout": True}, Form.FOLDED),
    ("frozen", {"dropout": True, "length": 1}, Form.CACHED),
    # Nothing is kept where torch records gradients or operations, where memory is replayed or shared, or in training.
    ("frozen", {"grad": True}, Form.FOLDED),
    ("frozen", {"grad": True, "length": 1}, Form.FOLDED),
    ("frozen", {"training": True}, Form.FOLDED),
    ("frozen", {"training": True, "length": 1}, Form.STAGED),
    ("frozen", {"during": "capture"}, Form.FOLDED),
    ("frozen", {"during": "capture", "length": 1}, Form.STAGED),
    ("frozen", {"during": "replication"}, Form.FOLDED),
    ("frozen", {"during": "replication", "length": 1}, Form.STAGED),
    ("frozen", {"during": "compilation"}, Form.FOLDED),
    ("frozen", {"during": "compilation", "length": 1}, Form.STAGED),
    ("frozen", {"during": "tracing"}, Form.FOLDED),
    ("frozen", {"during": "tracing", "length": 1}, Form.FOLDED),  # sizes are tensors, and cannot be compared
    # An adapter that is trained may change at any time.
    ("trained", {}, Form.FOLDED),
    ("trained", {"length": 1}, Form.STAGED),
    ("trained", {"length": 1, "sequences": 11}, Form.STAGED),
    ("trained", {"length": 1, "sequences": 12}, Form.FOLDED),  # as many tokens as a block has features
    ("trained", {"flat": True}, Form.FOLDED),
    ("trained", {"grad": True}, Form.FOLDED),
    ("trained", {"grad": True, "length": 1}, Form.FOLDED),
    ("trained", {"training": True, "length": 1}, Form.STAGED),
    ("trained", {"training": True, "grad": True, "length": 1}, Form.FOLDED),
    # Dropout changes the folded map, and in training only.
    ("trained", {"dropout": True, "length": 1}, Form.STAGED),
    ("trained", {"dropout": True, "training": True, "length": 1}, Form.FOLDED),
    ("frozen", {"dropout": True, "training": True, "length": 1}, Form.FOLDED),
]


@pytest.mark.parametrize(("adapter", "this", "form"), TABLE, ids=str)
def test_the_form_of_a_pass_through_a_layer(adapter, this, form, monkeypatch):
    config = CloverConfig(target_modules=["v_proj"], clover_dropout=0.3 if this.get("dropout") else 0.0)
    layer = layers(get_peft_model(build("llama"), config))[0].train(this.get("training", False))
    layer.requires_grad_(adapter == "trained")
    during = this.get("during")
    if during == "capture":
        monkeypatch.setattr("clover_peft.tuner.execution.is_captured", lambda tensor: True)
    elif during == "replication":
        layer._is_replica = True
    elif during == "compilation":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif during == "tracing":
        monkeypatch.setattr("clover_peft.tuner.execution.is_traced", lambda: True)
    z = torch.randn(this.get("sequences", 2), this.get("length", 7), layer.out_features)
    z, cache = z.flatten(0, 1) if this.get("flat") else z, MapCache()
    calls: list[Form] = []
    with torch.set_grad_enabled(this.get("grad", False)):
        apply_adapters(layer, torch.randn(2, this.get("before", 7), layer.out_features), ["default"], cache)
        for name, meaning in (("maps", Form.FOLDED), ("staged_maps", Form.STAGED)):
            plain = getattr(layer, name)
            monkeypatch.setattr(
                layer, name, lambda *a, plain=plain, meaning=meaning, **k: calls.append(meaning) or plain(*a, **k)
            )
        apply_adapters(layer, z, ["default"], cache)
    assert calls == ([] if form is Form.CACHED else [form])
    if form is Form.CACHED:
        assert len(cache) == 1


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


def test_an_adapter_that_is_named_twice_acts_once():
    adapted = in_training([{}]).eval()
    with torch.no_grad():
        expected = a_step(adapted)
        adapted.base_model.set_adapter(["0", "0"])
        assert torch.equal(a_step(adapted), expected)
    assert relative(a_step(adapted).detach(), expected) < TOLERANCE[torch.float32]
    adapted.merge_adapter()
    assert relative(a_step(adapted).detach(), expected) < TOLERANCE[torch.float32]


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
    adapted = two_adapters()
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
