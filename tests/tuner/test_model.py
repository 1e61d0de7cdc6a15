"""A model with CLOVER adapters works as other peft models do: dropout, checkpointing, compiling, copies, reports."""

from __future__ import annotations

import copy
import inspect
import pickle
import shutil
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from clover_peft import CloverConfig, CloverLayer, CloverModel
from clover_peft.tuner.layers import clover_layers
from tests.support.adapters import (
    FORMS,
    activate,
    adapted,
    base_tensors,
    layers,
    loss_and_grads,
    same,
    several,
    two_trained,
)
from tests.support.tiny import TOLERANCE, VOCAB, build, inputs, logits, perturb, relative

# ---------------------------------------------------------------------- dropout


def test_dropout_acts_in_training_only():
    plain, model = adapted(), adapted(clover_dropout=0.5)
    assert torch.equal(logits(model, "llama"), logits(plain, "llama"))
    model.train()
    first, second = logits(model, "llama"), logits(model, "llama")
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    first = logits(model, "llama")
    torch.manual_seed(5)
    assert torch.equal(logits(model, "llama"), first)


def test_dropout_acts_on_the_input_of_the_map_and_keeps_its_mean():
    layer = layers(adapted(clover_dropout=0.25))[0]
    x = torch.randn(1, 48)
    z, y = layer.get_base_layer()(x), layer(x)
    layer.train()
    torch.manual_seed(0)
    effects = layer(x.expand(20_000, -1)) - z
    assert relative(effects.mean(0, keepdim=True), y - z) < 0.05
    with torch.no_grad():
        for parameter in layer.clover_S.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), z)


# ---------------------------------------------------------------------- checkpointing, compiling, copying


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, dropout):
    model = adapted(clover_dropout=dropout).train()
    torch.manual_seed(7)
    loss, grads = loss_and_grads(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    layers(model)[0].register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(7)
    again, checkpointed = loss_and_grads(model)
    assert len(calls) == 2
    assert torch.equal(again, loss)
    assert all(torch.equal(checkpointed[name], grad) for name, grad in grads.items())


def compiled_agrees(family: str, backend: str, **config) -> None:
    torch._dynamo.reset()
    model = adapted(family, **config)
    loss, grads = loss_and_grads(model, family)
    compiled = torch.compile(model.base_model.model, backend=backend, fullgraph=True)
    again, compiled_grads = loss_and_grads(compiled, family)
    assert relative(again, loss) <= TOLERANCE[torch.float32]
    compiled_grads = {name.removeprefix("_orig_mod."): grad for name, grad in compiled_grads.items()}
    assert len(compiled_grads) == len(grads)
    for name, grad in grads.items():
        assert relative(compiled_grads[name.removeprefix("base_model.model.")], grad) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(("family", "form"), [("llama", "full"), ("llama", "leading"), ("gpt2", "diagonal")])
def test_torch_compile_takes_the_model_as_one_graph(family, form):
    compiled_agrees(family, "eager", **FORMS[form])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_torch_compile_differentiates_ahead_of_time(family):
    compiled_agrees(family, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_torch_compile_with_inductor_agrees(family):
    compiled_agrees(family, "inductor")


def test_switching_adapters_in_a_compiled_model_takes_effect():
    torch._dynamo.reset()
    model = several({"a": {}, "b": {"r": 4}})
    expected = {}
    for name in ("a", "b"):
        expected[name] = logits(activate(model, name), "llama")
    compiled = torch.compile(model, backend="eager")
    for name in ("a", "b", "a"):
        activate(model, name)
        assert relative(logits(compiled, "llama"), expected[name]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_copy_computes_the_same_and_is_independent(how, merged):
    model = adapted("qwen2")
    before = base_tensors(model)
    if merged:
        model.merge_adapter()
    expected = logits(model, "qwen2")
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(other, "qwen2"), expected)
    if merged:
        other.unmerge_adapter()
        assert same(base_tensors(other), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, "qwen2"), expected)
    if merged:
        model.unmerge_adapter()
        assert same(base_tensors(model), before)


# ---------------------------------------------------------------------- reports, refusals, sharing


def test_layer_and_model_status_tell_the_state():
    model = several({"a": {}, "b": {"r": 4}})
    status = model.get_layer_status()
    assert len(status) == 6
    for entry in status:
        assert entry.module_type == "clover.Linear"
        assert entry.enabled is True
        assert entry.active_adapters == ["a"]
        assert entry.merged_adapters == []
        assert entry.requires_grad == {"a": True, "b": False}
        assert entry.available_adapters == ["a", "b"]
        assert entry.devices == {"a": ["cpu"], "b": ["cpu"]}
    whole = model.get_model_status()
    assert whole.adapter_model_type == "CloverModel"
    assert whole.peft_types == {"a": "CLOVER", "b": "CLOVER"}
    assert whole.num_adapter_layers == 6
    assert (whole.trainable_params, whole.total_params) == model.get_nb_trainable_parameters()
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["a"]
    model.base_model.disable_adapter_layers()
    assert model.get_model_status().enabled is False


def test_the_printed_model_says_what_is_paired_in_a_line_a_slice():
    text = repr(adapted("gpt2", low_rank=3, clover_dropout=0.1))
    end = "low rank 3, dropout 0.1"
    assert (
        f"(default) v: 4 blocks of 12, r=12, full S (4, 12, 12), pair with transformer.h.0.attn.c_proj, {end}" in text
    )
    assert (
        f"(default) k: 4 blocks of 12, r=12, full S (4, 12, 12), pair with transformer.h.0.attn.c_attn, {end}" in text
    )
    assert not any(word in text for word in ("ModuleDict", "GuardedTensors", "Identity"))
    projection = repr(layers(several({"a": {}, "b": {"r": 4}}))[0]).splitlines()
    assert projection == [
        "clover.Linear(",
        "  (base_layer): Linear(in_features=48, out_features=24, bias=False)",
        "  (a) k: 2 blocks of 12, r=12, full S (2, 12, 12), qr",
        "  (b) k: 2 blocks of 12, r=4, full S (2, 4, 4), svd",
        ")",
    ]


def test_a_mixed_model_is_refused_before_the_model_changes():
    model = build("llama")
    before = logits(model, "llama")
    with pytest.raises(ValueError, match="CLOVER"):
        get_peft_model(model, CloverConfig(), mixed=True)
    assert not layers(model)
    assert torch.equal(logits(model, "llama"), before)


def test_two_peft_models_share_one_base():
    base = build("llama")
    plain = logits(base, "llama")
    first = get_peft_model(base, CloverConfig(), adapter_name="first")
    perturb(first)
    expected = logits(first, "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about a second adapter on one model
        second = get_peft_model(base, CloverConfig(s_matrix="diagonal"), adapter_name="second")
    for layer in layers(base):
        for parameter in layer.clover_S["second"].parameters():
            nn.init.constant_(parameter, 0.1)
    first.set_adapter("first")
    assert torch.equal(logits(first, "llama"), expected)
    second.set_adapter("second")
    assert relative(logits(second, "llama"), plain) > 1e-3
    assert not torch.equal(logits(second, "llama"), expected)
    with second.disable_adapter():
        assert torch.equal(logits(second, "llama"), plain)
    unloaded = second.unload()
    assert torch.equal(logits(unloaded, "llama"), plain)


def test_generation_uses_the_adapter_and_the_cache():
    model = adapted()
    prompt = {name: value[1:] for name, value in inputs("llama").items()}
    cached = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert cached.shape[1] > prompt["input_ids"].shape[1]
    assert int(cached.max()) < VOCAB
    assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=False), cached)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(**prompt, max_new_tokens=6, do_sample=False), cached)


# ---------------------------------------------------------------------- copies and states


def test_copies_and_pickles_compute_the_same_merged_or_not():
    model = get_peft_model(build("llama"), CloverConfig())
    perturb(model)
    expected = logits(model, "llama")
    base = logits(build("llama"), "llama")
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other, "llama"), logits(model, "llama"))
            if merged:
                other.unmerge_adapter()
            assert torch.equal(logits(other, "llama"), expected)
            assert torch.equal(logits(other.unload(), "llama"), base)


def test_two_peft_models_on_one_base_share_its_layers():
    base = build("llama")
    expected = logits(base, "llama")
    first = get_peft_model(base, CloverConfig(), adapter_name="first")
    perturb(first)
    once = logits(first, "llama")
    with pytest.warns(UserWarning, match="second time"):
        second = get_peft_model(first.base_model.model, CloverConfig(), adapter_name="second")
    assert all(type(layer.base_layer) is torch.nn.Linear for _, layer in clover_layers(second))
    second.base_model.set_adapter(["first"])
    assert torch.equal(logits(second, "llama"), once)
    assert torch.equal(logits(second.unload(), "llama"), expected)
    assert isinstance(first, PeftModel)


def test_merging_in_inference_mode_leaves_a_model_that_can_be_trained():
    model = get_peft_model(build("llama"), CloverConfig())
    perturb(model)
    with torch.inference_mode():
        model.merge_adapter()
    merged = model.merge_and_unload()
    assert not any(p.is_inference() for p in merged.parameters())
    merged.requires_grad_(True)
    merged(**inputs("llama")).logits.sum().backward()


def test_layer_status_sees_every_layer():
    model = two_trained()
    status = model.get_model_status()
    assert status.enabled
    assert (status.active_adapters, status.merged_adapters) == (["a"], [])
    assert len(model.get_layer_status()) == sum(isinstance(m, CloverLayer) for m in model.modules())
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["a"]


# Peft documents its methods without a leading underscore. A new version may rename these, and would then call its own.
OVERRIDDEN = {
    BaseTuner: (
        "_prepare_adapter_config",
        "_create_and_replace",
        "_cast_adapter_dtype",
        "_unload_and_optionally_merge",
        "_replace_module",
        "_get_adapter_state_dict",
        "_remap_adapter_state_dict_for_load",
        "_inject_parameters",
        "_remove_adapter_name_from_key",
        "_check_tied_modules",
        "_check_merge_allowed",
        "_add_modules_to_save_to_tie",
        "_add_targets_to_tie",
    ),
    BaseTunerLayer: ("_move_adapter_to_device_of_base_layer",),
}


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in OVERRIDDEN.items() for name in names])
def test_private_methods_of_peft_that_are_overridden_are_still_called_so(owner, name):
    ours, theirs = getattr(CloverLayer if owner is BaseTunerLayer else CloverModel, name), getattr(owner, name)
    assert ours is not theirs
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_peft_calls_the_hooks_of_a_mixed_batch():
    """Of any tuner that has a method of this name."""
    assert "self.base_model._enable_peft_forward_hooks(" in inspect.getsource(PeftModel)
