"""Adapters compute in float32 or better, whatever the model is cast to."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from clover_peft import CloverConfig
from tests.support.adapters import adapted, layers, loss_and_grads, same
from tests.support.tiny import TOLERANCE, build, logits, perturb, relative


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_casting_the_model_keeps_s_and_the_bases_in_float32(cast):
    model = adapted("qwen2")
    expected = logits(model, "qwen2")
    values = {n: t.clone() for n, t in model.state_dict().items() if ".clover_" in n}
    dtype = torch.float16 if cast == "half" else torch.bfloat16
    model = model.to(dtype) if cast == "to" else getattr(model, cast)()
    kept = {n: t for n, t in model.state_dict().items() if ".clover_" in n}
    assert {t.dtype for t in kept.values()} == {torch.float32}
    assert all(torch.equal(t, values[n]) for n, t in kept.items())
    assert {t.dtype for n, t in model.state_dict().items() if ".clover_" not in n} == {dtype}
    output = logits(model, "qwen2")
    assert output.dtype == dtype
    assert relative(output, expected) < 3 * TOLERANCE[dtype]


def test_an_adapter_on_a_float64_model_is_float64_and_survives_a_round_trip():
    model = adapted(dtype=torch.float64)
    tensors = [t for n, t in model.state_dict().items() if ".clover_" in n]
    assert {t.dtype for t in tensors} == {torch.float64}
    values = [t.clone() for t in tensors]
    model.half().double()
    assert same([t for n, t in model.state_dict().items() if ".clover_" in n], values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_s_is_float32_unless_asked_otherwise_and_the_bases_always_are(dtype):
    for autocast_adapter_dtype in (True, False):
        model = get_peft_model(build("llama", dtype), CloverConfig(), autocast_adapter_dtype=autocast_adapter_dtype)
        state = model.state_dict().items()
        trained = {t.dtype for n, t in state if ".clover_S." in n}
        assert trained == {torch.float32 if autocast_adapter_dtype else dtype}
        assert {t.dtype for n, t in state if ".clover_" in n and ".clover_S." not in n} == {torch.float32}
        perturb(model)
        unmerged = logits(model, "llama")
        model.merge_adapter()
        assert relative(logits(model, "llama"), unmerged) < TOLERANCE[dtype]


@pytest.mark.parametrize("choices", [{}, {"r": 4, "truncate": True}], ids=str)
@pytest.mark.parametrize("save_bases", [True, "folded"])
def test_s_in_bfloat16_is_saved_and_loaded_onto_another_precision(choices, save_bases, tmp_path):
    config = CloverConfig(**choices, save_bases=save_bases)
    model = get_peft_model(build("llama", torch.bfloat16), config, autocast_adapter_dtype=False)
    perturb(model)
    expected = logits(model, "llama")
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float32):
        for autocast_adapter_dtype in (True, False):
            loaded = PeftModel.from_pretrained(
                build("llama", dtype), tmp_path, autocast_adapter_dtype=autocast_adapter_dtype
            )
            assert relative(logits(loaded, "llama"), expected) < 2 * TOLERANCE[torch.bfloat16]


def test_autocast_folds_the_map_in_float32():
    model = adapted("qwen2")
    for layer in layers(model):
        plain = layer.maps(["default"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            folded = layer.maps(["default"])
        assert all(torch.equal(a.matrix, b.matrix) for a, b in zip(plain, folded, strict=True))


def test_autocast_stays_within_its_precision_of_float32():
    model = adapted("qwen2").train()
    loss, grads = loss_and_grads(model, "qwen2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough_loss, rough_grads = loss_and_grads(model, "qwen2")
    assert relative(rough_loss, loss) < TOLERANCE[torch.bfloat16]
    assert rough_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert rough_grads[name].dtype == torch.float32
        assert relative(rough_grads[name], grad) < 2 * TOLERANCE[torch.bfloat16]


def test_s_is_not_stored_in_the_eight_bits_of_its_base(tmp_path):
    get_peft_model(build("llama"), CloverConfig(target_modules=["v_proj"])).save_pretrained(tmp_path)
    base = build("llama")
    for layer in base.model.layers:
        weight = layer.self_attn.v_proj.weight.detach().to(torch.float8_e4m3fn)
        layer.self_attn.v_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    model = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    trained = {parameter.dtype for name, parameter in model.named_parameters() if "clover_S" in name}
    assert trained == {torch.float32}
