"""A choice that does not fit the model is an error that names it, and leaves the model untouched."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from clover_peft import CloverConfig
from clover_peft.tuner.layer import CloverLayer
from clover_peft.tuner.layers import clover_layers
from tests.support.adapters import layers_by_name, untouched
from tests.support.tiny import TOLERANCE, build, logits, perturb, relative, through_transformers


def _last(model: nn.Module, suffix: str) -> str:
    return [name for name, _ in model.named_modules() if name.endswith(suffix)][-1]


@pytest.mark.parametrize("way", ["get_peft_model", "inject_adapter_in_model"])
@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(r=13), "layers.0.self_attn.k_proj: r=13 is larger than a block of 12 features"),
        (
            dict(rank_pattern={r"1\.self_attn\.v_proj": 13}),
            "layers.1.self_attn.v_proj: r=13 is larger",
        ),
        (dict(r=7, block_size=6), "k_proj: r=7 is larger than a block of 6 features"),
        (dict(r=12, mlp_block_size=10), "up_proj: r=12 is larger than a block of 10 features"),
        (
            dict(head_dim=7),
            "k_proj: expected head_dim=12, which this model's heads have, found head_dim=7; leave it out",
        ),
        (dict(head_dim=6), "k_proj: expected head_dim=12, which this model's heads have, found head_dim=6"),
        (dict(num_heads=2), "k_proj: num_heads describes models .* does not know, but 'llama' is in it"),
        (dict(block_size=5), "k_proj: block_size=5 neither divides a head's 12 features nor is a multiple of them"),
        (dict(block_size=48), "k_proj: block_size=48 does not divide the projection's 24 features"),
        (
            dict(mlp_block_size=7),
            "up_proj: mlp_block_size=7 does not divide the projection's 80 features; choose .* such as 40",
        ),
        (dict(block_size=24), "v_proj: block_size=24 spans several heads of 12.*cross_layer=False"),
        (dict(r=4, basis="qr"), "r=4 trains the leading directions of 12, but the QR basis has no order.*basis='svd'"),
        (dict(rank_pattern={"up_proj": 4}, basis="qr"), "up_proj: r=4 trains the leading directions"),
        (dict(target_modules=["no_such_proj"]), "no_such_proj.* not found in the base model"),
        (dict(layers_to_transform=2), "not found in the base model.*layers_to_transform': 2"),
        (dict(target_modules=["v_proj"], exclude_modules=["v_proj"]), "(?i)exclude"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_choice_that_does_not_fit_the_model_changes_nothing(way: str, choices: dict, message: str) -> None:
    model, config = build("llama"), CloverConfig(**choices)
    with untouched(model), pytest.raises(ValueError, match=f"(?s){message}"):
        get_peft_model(model, config) if way == "get_peft_model" else inject_adapter_in_model(config, model)


@pytest.mark.parametrize("target", ["embed_tokens", "input_layernorm", "mlp", "self_attn", "rotary_emb"])
def test_target_that_is_no_linear_projection_changes_nothing(target: str) -> None:
    model = build("llama")
    with (
        untouched(model),
        pytest.raises(TypeError, match=rf"{target}: expected a linear projection .*, found \w+; leave"),
    ):
        get_peft_model(model, CloverConfig(target_modules=["v_proj", target]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["v_proj.weight", "o_proj.weight", "up_proj.weight", "k_proj.bias"])
def test_weights_that_are_not_finite_in_the_last_layer_change_nothing(where: str, value: float) -> None:
    model = build("llama", attention_bias=True)
    parameter = model.get_parameter(_last(model, where.partition(".")[0]) + "." + where.partition(".")[2])
    with torch.no_grad():
        parameter.view(-1)[3] = value
    target = {"o_proj": "v_proj"}.get(where.partition(".")[0], where.partition(".")[0])
    message = rf"layers\.1\.\w+\.{target}: .*head\(s\) 0 contain NaN or infinite values"
    with untouched(model), pytest.raises(ValueError, match=message):
        get_peft_model(model, CloverConfig())


def test_heads_that_the_partner_cannot_share_are_refused() -> None:
    model = build("llama")  # 4 query heads of 12
    attention = model.model.layers[1].self_attn
    attention.v_proj = nn.Linear(48, 36, bias=False)  # 3 heads
    message = r"layers\.1\.self_attn\.v_proj: .*o_proj has 4 heads, which 3 key-value heads cannot.*cross_layer=False"
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, CloverConfig(target_modules=["v_proj"]))
    assert [type(module) for module in model.modules()] == modules
    assert not hasattr(model, "peft_config")
    assert "model.layers.1.self_attn.v_proj" in layers_by_name(
        get_peft_model(model, CloverConfig(target_modules=["v_proj"], cross_layer=False))
    )


def test_model_that_refused_an_adapter_takes_the_next_one() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="r=99"):
        get_peft_model(model, CloverConfig(rank_pattern={r"1\.mlp\.up_proj": 99}))
    before = logits(model, "llama")
    model = get_peft_model(model, CloverConfig())
    assert torch.equal(logits(model, "llama"), before)
    perturb(model)
    assert relative(logits(model, "llama"), before) > TOLERANCE[torch.float32]


@pytest.mark.parametrize("targets", [None, ["v_proj"], ["v_proj", "down_proj"]], ids=str)
def test_second_adapter_that_does_not_fit_leaves_the_first(targets: list[str] | None) -> None:
    model = get_peft_model(build("llama"), CloverConfig(target_modules=["v_proj", "up_proj"]))
    perturb(model)
    with untouched(model):
        with pytest.raises(ValueError, match="is larger than a block"):
            model.add_adapter("second", CloverConfig(target_modules=targets, r=3, rank_pattern={r"1\.\w+\.\w+": 99}))
        assert list(model.peft_config) == ["default"]
        assert model.active_adapters == ["default"]
        for layer in layers_by_name(model).values():
            assert list(layer.specs) == list(layer.clover_S) == list(layer.clover_U) == ["default"]
    model.add_adapter("second", CloverConfig(target_modules=targets))  # the name is free again


@pytest.mark.parametrize("inference_mode", [False, True])
def test_a_second_adapter_that_does_not_fit_freezes_nothing(inference_mode: bool) -> None:
    model = get_peft_model(build("llama"), CloverConfig(target_modules=["v_proj"]))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    second = CloverConfig(target_modules=["v_proj", "down_proj"], mlp_block_size=7, inference_mode=inference_mode)
    with pytest.raises(ValueError, match="mlp_block_size=7"):
        model.add_adapter("b", second)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@through_transformers
def test_transformers_add_adapter_that_does_not_fit_changes_nothing() -> None:
    model = build("llama").requires_grad_(True)
    before = logits(model, "llama")
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="r=99 is larger"):
        model.add_adapter(CloverConfig(rank_pattern={r"1\.mlp\.up_proj": 99}))
    assert [type(module) for module in model.modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model, "llama"), before)


def test_construction_and_injection_are_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        get_peft_model(build("llama"), CloverConfig())


def test_a_well_conditioned_head_in_bfloat16_gives_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    shape = dict(hidden_size=512, intermediate_size=512, num_attention_heads=8, num_key_value_heads=8, head_dim=64)
    get_peft_model(build("llama", torch.bfloat16, **shape), CloverConfig())
    assert not [w for w in recwarn if "condition" in str(w.message)]


def test_making_an_adapter_draws_no_random_numbers() -> None:
    model = build("llama")
    before = torch.get_rng_state()
    get_peft_model(model, CloverConfig())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rank_that_no_part_of_a_fused_projection_has_is_refused():
    with pytest.raises(ValueError, match=r"c_attn: r=500 is larger than a block of 12 features"):
        get_peft_model(build("gpt2"), CloverConfig(r=500, target_modules=["c_attn"]))


def test_a_width_without_divisors_is_reported():
    model = nn.Sequential(nn.Linear(16, 97))
    with pytest.warns(UserWarning, match="97 features have no divisor between 8 and 64, blocks are of 1"):
        get_peft_model(model, CloverConfig(target_modules=["0"]))


@pytest.mark.parametrize(
    ("family", "choices"),
    [
        ("llama", dict(target_modules="all-linear")),
        ("mixtral", dict(target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
        ("t5", dict(modules_to_save=["lm_head"])),
    ],
    ids=["all-linear", "a layer inside another", "wrapped modules"],
)
def test_the_layers_found_are_those_that_torch_names(family: str, choices: dict) -> None:
    model = get_peft_model(build(family), CloverConfig(**choices))
    model.twice = model.base_model  # a module in two places counts once
    named = [(path, module) for path, module in model.named_modules() if isinstance(module, CloverLayer)]
    assert named
    assert clover_layers(model) == named
    assert clover_layers(model, "other") == []
