"""The low-rank part beside the maps: exact at the start, merged as it runs, saved, and out of the row space."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from clover_peft import CloverConfig, hotswap_adapter, initialize_from_activations
from clover_peft.tuner.layers import clover_layers
from clover_peft.tuner.merging import map_base_tensor
from tests.support.tiny import TOLERANCE, build, inputs, logits, perturb, relative

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = [("llama", {}), ("gpt2", {}), ("llama", {"r": 5, "truncate": True}), ("t5", {"s_matrix": "diagonal"})]
WEIGHTS = "adapter_model.safetensors"


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    return get_peft_model(build(family, dtype), CloverConfig(**{"low_rank": 2, **options})).eval()


def trained(family: str = "llama", **options) -> PeftModel:
    model = adapted(family, **options)
    perturb(model)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clover_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "deepseek_v3"])
def test_it_starts_as_the_base_model(family, dtype):
    model = adapted(family, dtype)
    assert torch.equal(logits(model, family), logits(build(family, dtype).eval(), family))
    with model.disable_adapter():
        assert torch.equal(logits(model, family), logits(build(family, dtype).eval(), family))
    names = {name.split(".clover_")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"S", "A", "B"}
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "clover_" in n)


@pytest.mark.parametrize(("family", "options"), CASES)
def test_it_merges_as_it_runs(family, options):
    model = trained(family, **options)
    expected = logits(model, family)
    bits = {name: p.clone() for name, p in model.named_parameters()}
    for _, layer in clover_layers(model):
        a, b = (getattr(layer, part)["default"].get("weight") for part in ("clover_A", "clover_B"))
        maps = map_base_tensor(layer, layer.base_weight.transposed(), ["default"]) - layer.base_weight.transposed()
        delta = layer.get_delta_weight("default")
        delta = delta if layer.base_weight.fan_in_fan_out else delta.mT
        assert relative(delta, maps + (b @ a).mT) < TOLERANCE[torch.float32]
        break
    model.merge_adapter()
    assert relative(logits(model, family), expected) < TOLERANCE[torch.float32]
    model.unmerge_adapter()
    assert all(torch.equal(p, bits[name]) for name, p in model.named_parameters())
    assert relative(logits(model.merge_and_unload(safe_merge=True), family), expected) < TOLERANCE[torch.float32]


def test_only_it_leaves_the_row_space():
    """Grouped values: the rows of W span part of the hidden size, and no map of the output reaches the rest."""
    for rank in (0, 2):
        model = trained(low_rank=rank, target_modules=["v_proj"])
        _, layer = clover_layers(model)[0]
        weight, delta = layer.base_weight.transposed().mT, layer.get_delta_weight("default")
        rows = torch.linalg.qr(weight.mT)[0]
        outside = relative(delta @ rows @ rows.mT, delta)
        assert outside > 0.1 if rank else outside < 1e-5


@pytest.mark.parametrize("save_bases", [True, False, "folded"])
def test_it_is_saved_and_reloaded(save_bases, tmp_path):
    model = trained(save_bases=save_bases)
    expected = logits(model, "llama")
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        torch.manual_seed(55)
        again = PeftModel.from_pretrained(build("llama"), tmp_path, **options).eval()
        assert relative(logits(again, "llama"), expected) < 1e-5
    assert sum(".clover_A." in name for name in load_file(tmp_path / WEIGHTS)) == len(clover_layers(model))


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "unasked"])
def test_a_file_that_does_not_fit_changes_nothing(damage, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(name for name in tensors if ".clover_B." in name)
    if damage == "missing":
        del tensors[key]
    elif damage == "unasked":
        trained(low_rank=0).save_pretrained(tmp_path)
        tensors = {**load_file(tmp_path / WEIGHTS), key: tensors[key]}
    else:
        tensors[key] = tensors[key][:, :1].contiguous() if damage == "shape" else tensors[key] * float("nan")
    save_file(tensors, tmp_path / WEIGHTS)
    base = build("llama").eval()
    before = logits(base, "llama")
    with pytest.raises(ValueError, match=r"expected|NaN or infinite"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(base, "llama"), before)
    assert not clover_layers(base)


def test_mixed_batches_and_several_adapters():
    model = trained()
    model.add_adapter("plain", CloverConfig())
    perturb(model, seed=4)
    batch = inputs("llama")
    expected = {}
    for name in ("default", "plain"):
        model.set_adapter(name)
        with torch.no_grad():
            expected[name] = model(**batch).logits
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["plain", "default"]).logits
    assert relative(mixed[0], expected["plain"][0]) < 1e-5
    assert relative(mixed[1], expected["default"][1]) < 1e-5


def test_it_is_trained_and_refused_where_it_has_no_meaning(tmp_path):
    model = adapted(clover_dropout=0.1).train()
    model(**inputs("llama")).logits.square().mean().backward()
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if ".clover_B." in n)
    assert any(not torch.equal(p, torch.zeros_like(p)) for n, p in model.named_parameters() if ".clover_A." in n)
    for wrong in (-1, 1.5, True, "2"):
        with pytest.raises(ValueError, match=r"CloverConfig\.low_rank: expected a positive integer"):
            CloverConfig(low_rank=wrong)
    trained().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected low_rank=0 as in the loaded adapter, found 2"):
        hotswap_adapter(trained(low_rank=0), str(tmp_path))
    with pytest.raises(ValueError, match="found one that is trained"):
        initialize_from_activations(trained(), [inputs("llama")])


def test_autocast_and_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        model = trained(dtype=dtype)
        assert logits(model, "llama").dtype == dtype
    model = trained()
    expected = logits(model, "llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(logits(model, "llama").float(), expected) < 0.05
