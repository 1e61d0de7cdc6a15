"""Weighted sums of adapters, and which adapters cannot be summed."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from clover_peft import CloverConfig
from clover_peft.tuner.layers import clover_layers
from tests.support.adapters import several, two_trained
from tests.support.tiny import TOLERANCE, build, logits, perturb, relative

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("options", [{}, {"s_matrix": "diagonal"}, {"r": 4}, {"r": 4, "truncate": True}])
def test_a_weighted_adapter_is_the_weighted_sum_of_the_maps(options):
    model = two_trained(**options).eval()
    model.add_weighted_adapter(["a", "b"], [0.7, -0.2], "sum")
    for _, layer in clover_layers(model):
        for spec in layer.specs["sum"]:
            a, b, total = (spec.residual_map(layer.tensors(name, spec)) for name in ("a", "b", "sum"))
            zero = spec.residual_map(layer.tensors("a", spec)._replace(s=torch.zeros_like(layer.tensors("a", spec).s)))
            assert relative(total - zero, 0.7 * (a - zero) - 0.2 * (b - zero)) < TOLERANCE[torch.float32]
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum." in name)
    model.set_adapter("sum")
    assert not torch.equal(logits(model, "llama"), logits(build("llama"), "llama"))


def test_a_weighted_adapter_covers_the_modules_of_all(tmp_path):
    model = get_peft_model(build("llama"), CloverConfig(target_modules=["v_proj"]), adapter_name="a")
    model.add_adapter("b", CloverConfig(target_modules=["up_proj"]))
    perturb(model)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    model.base_model.set_adapter(["a", "b"])
    both = logits(model, "llama")
    model.set_adapter("sum")
    assert relative(logits(model, "llama"), both) < TOLERANCE[torch.float32]
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "sum")
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


@pytest.mark.parametrize("options", [{}, {"init_weights": False}])
def test_low_rank_parts_stand_side_by_side(options, tmp_path):
    ranks = {"a": 2, "b": 3, "plain": 0, "elsewhere": 1}
    targets = {name: ["up_proj" if name == "elsewhere" else "v_proj"] for name in ranks}
    model = build("llama").eval()
    for name, rank in ranks.items():
        config = CloverConfig(target_modules=targets[name], low_rank=rank, **options)
        if name == "a":
            model = get_peft_model(model, config, adapter_name="a")
        else:
            model.add_adapter(name, config)
    perturb(model)
    weights = {"a": 0.7, "b": -0.4, "plain": 1.5, "elsewhere": 2.0}
    for _, layer in clover_layers(model):
        layer.set_scale("b", 0.5)
    deltas = {
        path: sum(weights[name] * layer.get_delta_weight(name).double() for name in ranks if name in layer.specs)
        for path, layer in clover_layers(model)
    }
    model.add_weighted_adapter(list(ranks), list(weights.values()), "sum")
    assert model.peft_config["sum"].low_rank == 6
    for path, layer in clover_layers(model):
        assert relative(layer.get_delta_weight("sum").double(), deltas[path]) < TOLERANCE[torch.float32]
    model.set_adapter("sum")
    expected = logits(model, "llama")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path / "sum"), "llama"), expected)
    trained = [p for name, p in model.named_parameters() if ".clover_A.sum" in name]
    assert all(bool(row.any()) for p in trained for row in p), "a row of zeros beside a column of zeros never learns"


def test_truncating_adapters_stay_truncating_when_they_are_saved_folded(tmp_path):
    model = several({name: {"r": 4, "truncate": True} for name in ("a", "b")})
    model.add_weighted_adapter(["a", "b"], [0.25, 0.75], "sum")
    model.set_adapter("sum")
    expected = logits(model, "llama")
    for name in ("a", "b"):
        model.peft_config[name].save_bases = "folded"
        model.save_pretrained(tmp_path, selected_adapters=[name])
    folded = PeftModel.from_pretrained(build("llama"), tmp_path / "a", adapter_name="a")
    folded.load_adapter(tmp_path / "b", "b")
    before = logits(folded, "llama")
    with pytest.raises(ValueError, match="at most one active adapter with truncate=True"):
        folded.base_model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="at most one merged adapter with truncate=True"):
        folded.merge_adapter(["a", "b"])
    with pytest.raises(ValueError, match=r"whose sum is 1, found 2; change the weights"):
        folded.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
    assert torch.equal(logits(folded, "llama"), before)
    folded.add_weighted_adapter(["a", "b"], [0.25, 0.75], "sum")
    folded.set_adapter("sum")
    assert relative(logits(folded, "llama"), expected) < TOLERANCE[torch.float32]
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "a", is_trainable=True)
    assert not again.peft_config["default"].truncate, "its S is that of whole blocks"
    again.peft_config["default"].save_bases = True
    again.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "again")
    assert relative(logits(loaded, "llama"), before) < TOLERANCE[torch.float32]


def test_low_rank_parts_and_experts_are_combined_apart():
    model = get_peft_model(build("mixtral"), CloverConfig(target_modules=["v_proj"], low_rank=2), adapter_name="a")
    model.add_adapter("b", CloverConfig(target_parameters=["experts.gate_up_proj"]))
    for order in (["a", "b"], ["b", "a"]):
        with pytest.raises(ValueError, match=r"expected none of experts beside low-rank parts .* found \['b'\]"):
            model.add_weighted_adapter(order, [1.0, 1.0], "sum")
    assert list(model.peft_config) == ["a", "b"]


def test_a_weighted_adapter_remembers_the_precision_of_its_base(tmp_path):
    model = get_peft_model(build("llama", torch.bfloat16), CloverConfig(), adapter_name="a")
    perturb(model)
    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build("llama", torch.bfloat16).float(), tmp_path / "a", adapter_name="a")
    model.add_weighted_adapter(["a"], [0.5], "sum")
    assert model.peft_config["sum"].base_precision == "bfloat16"
    model.save_pretrained(tmp_path / "sum", selected_adapters=["sum"])
    again = PeftModel.from_pretrained(build("llama", torch.bfloat16), tmp_path / "sum" / "sum")
    assert again.peft_config["default"].base_precision == "bfloat16"


def test_adapters_that_do_not_fit_together_are_not_combined():
    model = two_trained()
    model.add_adapter("small", CloverConfig(r=4))
    model.add_adapter("head", CloverConfig(modules_to_save=["lm_head"]))
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=r"layers.0.*different bases"):
        model.add_weighted_adapter(["a", "small"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match="whole modules or tokens"):
        model.add_weighted_adapter(["a", "head"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match=r"weights: expected one .*; pass each adapter once"):
        model.add_weighted_adapter(["a", "b"], [1.0], "sum")
    with pytest.raises(ValueError, match="exists already"):
        model.add_weighted_adapter(["a"], [1.0], "b")
    with pytest.raises(ValueError, match=r"expected some of .* found \['c'\]; correct the names, or load"):
        model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match="combination_type: expected 'linear', found 'svd'; leave it out"):
        model.add_weighted_adapter(["a"], [1.0], "sum", combination_type="svd")
    with pytest.raises(TypeError, match=r"found \['density', 'svd_rank'\]; leave them out"):
        model.add_weighted_adapter(["a"], [1.0], "sum", svd_rank=4, density=0.5)
    assert set(model.state_dict()) == before
    assert "sum" not in model.peft_config


def test_adapters_in_other_bases_are_not_combined():
    model = two_trained()
    _, layer = clover_layers(model)[0]
    with torch.no_grad():
        layer.tensors("b", layer.specs["b"][0]).c.mul_(1.5)
    with pytest.raises(ValueError, match="different bases"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")


def test_fingerprints_that_rounding_sets_apart_are_no_other_bases():
    model = two_trained()
    _, layer = clover_layers(model)[0]
    with torch.no_grad():
        layer.tensors("b", layer.specs["b"][0]).norm.mul_(1 + 3e-7)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert "sum" in model.peft_config
