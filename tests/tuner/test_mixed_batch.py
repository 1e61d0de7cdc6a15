"""A batch whose samples name adapters of their own."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from peft import get_peft_model

from clover_peft import CloverConfig
from clover_peft.tuner.layers import clover_layers
from tests.support.adapters import two_trained
from tests.support.tiny import TOLERANCE, build, inputs, relative

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "bart", "t5", "bert", "vit", "opt", "llava", "qwen2_vl", "deepseek_v3"]
)
def test_a_mixed_batch_gives_every_sample_its_adapter(family):
    model = two_trained(family).eval()
    batch = inputs(family, batch=4)
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["b", "__base__", "a", "b"]).logits
        for rows, name in (([0, 3], "b"), ([2], "a")):
            model.set_adapter(name)
            alone = model(**batch).logits
            assert relative(mixed[rows], alone[rows]) < TOLERANCE[torch.float32]
        with model.disable_adapter():
            assert torch.equal(mixed[1], model(**batch).logits[1])
    assert relative(mixed[0], mixed[2]) > 1e-3
    assert not any(layer._forward_pre_hooks for _, layer in clover_layers(model))


@pytest.mark.parametrize(("family", "beams"), [("llama", 1), ("llama", 3), ("bart", 3), ("t5", 3), ("whisper", 2)])
def test_a_mixed_batch_generates_as_each_adapter_does(family, beams):
    model = two_trained(family).eval()
    batch = {k: v for k, v in inputs(family, batch=3).items() if k != "decoder_input_ids"}
    options = dict(max_new_tokens=5, min_new_tokens=5, num_beams=beams, do_sample=False)
    mixed = model.generate(**batch, adapter_names=["a", "b", "__base__"], **options)
    for row, name in enumerate(["a", "b"]):
        model.set_adapter(name)
        assert torch.equal(model.generate(**batch, **options)[row], mixed[row])
    with model.disable_adapter():
        assert torch.equal(model.generate(**batch, **options)[2], mixed[2])


@pytest.mark.parametrize("where", ["call", "config of the call", "config of the model"])
@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 2}], ids=str
)
@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_a_mixed_batch_generates_several_sequences(family, options, where):
    model = two_trained(family).eval()
    batch = {k: v for k, v in inputs(family, batch=2).items() if k != "decoder_input_ids"}
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample="num_beams" not in options, top_k=0, **options)
    call = dict(options)
    if where != "call":
        config = hf.GenerationConfig(**options, pad_token_id=0, decoder_start_token_id=0)
        call = {"generation_config": config} if where == "config of the call" else {}
        if where == "config of the model":
            model.get_base_model().generation_config = config
    torch.manual_seed(0)
    mixed = model.generate(**batch, adapter_names=["a", "b"], **call)
    for sample, name in enumerate(["a", "b"]):
        model.set_adapter(name)
        torch.manual_seed(0)
        rows = slice(2 * sample, 2 * sample + 2)
        assert torch.equal(model.generate(**batch, **call)[rows], mixed[rows])


def test_rows_that_belong_to_no_known_sample_are_refused():
    model = two_trained("llava").eval()
    batch = inputs("llava", batch=2)
    ids = batch["input_ids"].clone()
    ids = torch.cat([ids, ids[:, 1:5]], dim=1)  # two images
    ids[1][ids[1] == 5] = 9  # and none
    mixed = {"input_ids": ids, "pixel_values": batch["pixel_values"]}
    with torch.no_grad():
        model(**mixed)
        with pytest.raises(ValueError, match=r"vision_tower.*as many images in every sample.*\[8, 0\]"):
            model(**mixed, adapter_names=["a", "b"])
        alone = get_peft_model(build("llava"), CloverConfig(exclude_modules=".*vision_tower.*")).eval()
        alone(**mixed, adapter_names=["default", "__base__"])
        two_each = {"input_ids": ids[:1].repeat(2, 1), "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)}
        both = model(**two_each, adapter_names=["a", "b"]).logits
        for row, name in enumerate(["a", "b"]):
            model.set_adapter(name)
            assert relative(both[row], model(**two_each).logits[row]) < TOLERANCE[torch.float32]


def test_a_mixed_batch_goes_through_modules_to_save():
    model = get_peft_model(build("llama"), CloverConfig(modules_to_save=["lm_head"]), adapter_name="a")
    model.add_adapter("b", CloverConfig(modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["b"].weight.mul_(2)
    model.eval()
    batch = inputs("llama")
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["a", "b"]).logits
        plain = model(**batch).logits
    assert torch.equal(mixed[0], plain[0])
    assert relative(mixed[1], 2 * plain[1]) < TOLERANCE[torch.float32]


def test_what_a_mixed_batch_cannot_do_is_refused():
    model = two_trained().eval()
    batch = inputs("llama")
    with pytest.raises(ValueError, match="one name in adapter_names for each of the 2 rows"):
        model(**batch, adapter_names=["a"])
    with pytest.raises(ValueError, match="one name in adapter_names for each of the 2 rows"):
        two_trained("opt").eval()(**inputs("opt"), adapter_names=["a"])
    with pytest.raises(ValueError, match=r"expected adapters out of .* found \['c'\]; correct the names, load"):
        model(**batch, adapter_names=["a", "c"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**batch, adapter_names=["a", "b"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter first"):
        model(**batch, adapter_names=["a", "b"])
    assert not any(layer._forward_pre_hooks for _, layer in clover_layers(model))
