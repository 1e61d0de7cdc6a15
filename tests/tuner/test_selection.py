"""Which modules the fields of a config select, and what blocks, ranks and bases those get."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from clover_peft import CloverConfig, CloverLayer
from clover_peft.tuner.layers import clover_layers
from tests.support.adapters import layers, layers_by_name, only_spec
from tests.support.tiny import build, logits, relative


def _adapted(family: str = "llama", **choices) -> dict[str, CloverLayer]:
    return layers_by_name(get_peft_model(build(family), CloverConfig(**choices)))


def test_defaults_are_key_value_and_up_projection() -> None:
    layers = _adapted()
    assert set(layers) == {
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
    }
    spec = only_spec(layers["model.layers.0.self_attn.v_proj"])
    found = (spec.blocks, spec.size, spec.r, spec.s_matrix, spec.basis, spec.truncate)
    assert found == (2, 12, 12, "full", "pair", False)
    assert only_spec(layers["model.layers.0.self_attn.k_proj"]).basis == "qr"
    up = only_spec(layers["model.layers.0.mlp.up_proj"])
    assert (up.blocks, up.size) == (2, 40)  # the largest divisor of 80 that is at most 64


@pytest.mark.parametrize(("value", "expected"), [(0, {0}), (1, {1}), ([0], {0}), ([0, 1], {0, 1}), (None, {0, 1})])
def test_layers_to_transform_counts_from_zero(value: int | list[int] | None, expected: set[int]) -> None:
    layers = _adapted(layers_to_transform=value)
    assert {int(name.split(".")[2]) for name in layers} == expected


def test_layers_pattern_names_the_counted_list() -> None:
    assert {name.split(".")[2] for name in _adapted(layers_to_transform=1, layers_pattern="layers")} == {"1"}
    with pytest.raises(ValueError, match="not found in the base model"):
        _adapted(target_modules=["v_proj"], layers_to_transform=0, layers_pattern="stages")


@pytest.mark.parametrize("exclude", [["up_proj"], r".*\.up_proj", {"up_proj"}], ids=str)
def test_exclude_modules_leaves_modules_out(exclude: object) -> None:
    assert {name.rpartition(".")[2] for name in _adapted(exclude_modules=exclude)} == {"k_proj", "v_proj"}


def test_exclude_modules_can_name_one_layer() -> None:
    layers = _adapted(target_modules=["v_proj"], exclude_modules=["layers.0.self_attn.v_proj"])
    assert list(layers) == ["model.layers.1.self_attn.v_proj"]


def test_rank_pattern_goes_before_r() -> None:
    layers = _adapted(r=4, rank_pattern={"v_proj": 3, r"layers\.1\.self_attn\.k_proj": 5})
    assert only_spec(layers["model.layers.0.self_attn.v_proj"]).r == 3
    assert only_spec(layers["model.layers.1.self_attn.v_proj"]).r == 3
    assert only_spec(layers["model.layers.0.self_attn.k_proj"]).r == 4
    assert only_spec(layers["model.layers.1.self_attn.k_proj"]).r == 5
    assert layers["model.layers.1.self_attn.k_proj"].clover_S["default"].weight.shape == (2, 5, 5)


def test_rank_pattern_that_matches_nothing_is_reported() -> None:
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match any targeted module"):
        _adapted(rank_pattern={"z_proj": 3})


def test_rank_pattern_alone_truncates_only_what_it_names() -> None:
    layers = _adapted(truncate=True, rank_pattern={"v_proj": 3})
    assert only_spec(layers["model.layers.0.self_attn.v_proj"]).truncate
    assert not only_spec(layers["model.layers.0.self_attn.k_proj"]).truncate


def test_regular_expression_selects_by_whole_path() -> None:
    layers = _adapted(target_modules=r".*\.1\.self_attn\.[kv]_proj")
    assert set(layers) == {"model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"}


def test_all_linear_is_every_linear_but_the_output_head() -> None:
    model = build("llama")
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert set(layers_by_name(get_peft_model(model, CloverConfig(target_modules="all-linear")))) == linears


def test_all_linear_takes_conv1d_too() -> None:
    names = {name.rpartition(".")[2] for name in _adapted("gpt2", target_modules="all-linear")}
    assert names == {"c_attn", "c_proj", "c_fc"}


def test_partner_named_as_a_target_gets_a_map_of_its_own() -> None:
    layers = _adapted(target_modules=["v_proj", "o_proj", "q_proj"])
    assert only_spec(layers["model.layers.0.self_attn.v_proj"]).basis == "pair"
    assert only_spec(layers["model.layers.0.self_attn.o_proj"]).part == "linear"
    query = only_spec(layers["model.layers.0.self_attn.q_proj"])
    assert (query.part, query.blocks, query.size) == ("q", 4, 12)


@pytest.mark.parametrize(("size", "blocks"), [(12, 2), (6, 4), (4, 6), (1, 24)])
def test_block_size_splits_heads(size: int, blocks: int) -> None:
    for name, layer in _adapted(block_size=size, target_modules=["k_proj", "v_proj"]).items():
        assert (only_spec(layer).size, only_spec(layer).blocks) == (size, blocks), name


@pytest.mark.parametrize(
    ("heads", "size", "message", "advised"),
    [
        (3, 24, "block_size=24 does not divide the projection's 36 features; choose 12, a divisor of it, or 36", 36),
        (4, 36, "block_size=36 does not divide the projection's 48 features; choose 12, a divisor of it, or 24", 24),
        (
            4,
            5,
            "neither divides a head's 12 features nor is a multiple of them; choose 12, a divisor of it, or 24",
            24,
        ),
        (
            4,
            90,
            "neither divides a head's 12 features nor is a multiple of them; choose 12, a divisor of it, or 48",
            48,
        ),
        (1, 24, "block_size=24 does not divide the projection's 12 features; choose 12, a divisor of it$", 6),
    ],
)
@pytest.mark.parametrize("cross_layer", [True, False])
def test_a_block_size_that_does_not_fit_says_which_do(heads, size, message, advised, cross_layer) -> None:
    shape = dict(num_attention_heads=heads, num_key_value_heads=heads, hidden_size=12 * heads)
    option = " with cross_layer=False" if cross_layer and advised > 12 else ""
    with pytest.raises(ValueError, match=f"k_proj: .*{message}{option}"):
        get_peft_model(build("llama", **shape), CloverConfig(block_size=size, cross_layer=cross_layer))
    config = CloverConfig(block_size=advised, cross_layer=cross_layer and advised <= 12)
    for layer in layers_by_name(get_peft_model(build("llama", **shape), config)).values():
        assert only_spec(layer).size in (advised, 40)  # 40: the up-projection's


def test_a_block_size_that_does_not_fit_a_fused_projection_names_the_part() -> None:
    with pytest.raises(ValueError, match="c_attn: block_size=36 does not divide its part k's 48 features; choose 12"):
        get_peft_model(build("gpt2"), CloverConfig(block_size=36))


def test_a_block_size_without_heads_says_that_it_does_nothing() -> None:
    for model, targets in ((build("llama"), ["up_proj"]), (nn.Sequential(nn.Linear(8, 8)), ["0"])):
        with pytest.warns(UserWarning, match=r"block_size=4 cuts attention heads.*without effect.*mlp_block_size"):
            get_peft_model(model, CloverConfig(block_size=4, target_modules=targets))


def test_block_size_joins_heads_of_intra_layer_targets() -> None:
    for name, layer in _adapted(block_size=24, cross_layer=False, target_modules=["k_proj", "v_proj"]).items():
        assert (only_spec(layer).size, only_spec(layer).blocks) == (24, 1), name
    assert only_spec(_adapted(block_size=24, target_modules=["k_proj"])["model.layers.0.self_attn.k_proj"]).size == 24


def test_a_projection_narrower_than_a_block_is_one_block() -> None:
    shape = dict(hidden_size=48, intermediate_size=80, vocab_size=64)
    config = CloverConfig(mlp_block_size=80, target_modules=["up_proj", "down_proj"])
    for name, layer in layers_by_name(get_peft_model(build("llama", **shape), config)).items():
        assert (only_spec(layer).size, only_spec(layer).blocks) == (80 if "up" in name else 48, 1), name


def test_a_block_that_no_projection_fills_is_said() -> None:
    config = CloverConfig(mlp_block_size=96, target_modules=["k_proj", "up_proj"])
    with pytest.warns(UserWarning, match="mlp_block_size=96 is more .* of 80 features at most; pass 80 or less"):
        assert (
            only_spec(layers_by_name(get_peft_model(build("llama"), config))["model.layers.0.mlp.up_proj"]).size == 80
        )


@pytest.mark.parametrize(("size", "blocks"), [(80, 1), (40, 2), (16, 5), (1, 80)])
def test_mlp_block_size_cuts_up_projections(size: int, blocks: int) -> None:
    for name, layer in _adapted(mlp_block_size=size, target_modules=["up_proj"]).items():
        assert (only_spec(layer).size, only_spec(layer).blocks) == (size, blocks), name


@pytest.mark.parametrize(
    ("choices", "basis", "form"),
    [
        (dict(), "qr", "full"),
        (dict(basis="svd"), "svd", "full"),
        (dict(basis="qr"), "qr", "full"),
        (dict(r=4), "svd", "full"),
        (dict(r=12), "qr", "full"),
        (dict(s_matrix="diagonal"), "svd", "diagonal"),
        (dict(s_matrix="diagonal", r=4), "svd", "diagonal"),
    ],
    ids=str,
)
def test_basis_of_intra_layer_targets_follows_the_choices(choices: dict, basis: str, form: str) -> None:
    for layer in _adapted(target_modules=["k_proj"], **choices).values():
        assert (only_spec(layer).basis, only_spec(layer).s_matrix) == (basis, form)


def test_cross_layer_false_pairs_nothing() -> None:
    for name, layer in _adapted("opt", cross_layer=False).items():
        assert only_spec(layer).partner is None, name
        assert only_spec(layer).basis == "qr", name
    paired = {name.rpartition(".")[2] for name, layer in _adapted("opt").items() if only_spec(layer).basis == "pair"}
    assert paired == {"k_proj", "v_proj"}


@pytest.mark.parametrize("bias", ["none", "all", "clover_only"])
def test_bias_decides_which_biases_are_trained(bias: str) -> None:
    model = get_peft_model(build("opt"), CloverConfig(target_modules=["v_proj"], bias=bias))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    every = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    ours = {name for name in every if "v_proj" in name}
    assert ours
    assert trained == {"none": set(), "all": every, "clover_only": ours}[bias]
    assert any("clover_S" in name for name, p in model.named_parameters() if p.requires_grad)


def test_modules_to_save_and_token_indices_are_trained() -> None:
    config = CloverConfig(target_modules=["v_proj"], modules_to_save=["lm_head"], trainable_token_indices=[3, 5])
    model = get_peft_model(build("llama", tie_word_embeddings=False), config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head.modules_to_save.default.weight" in name for name in trained)
    assert any("embed_tokens" in name and "trainable_tokens_delta" in name for name in trained)


def test_init_weights_false_is_visibly_elsewhere() -> None:
    model = build("llama")
    before = logits(model, "llama")
    changed = logits(get_peft_model(model, CloverConfig(init_weights=False)), "llama")
    assert torch.isfinite(changed).all()
    assert relative(changed, before) > 1e-2


def test_every_tower_of_a_multimodal_model_is_adapted_by_its_own_row() -> None:
    text = dict(
        vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, head_dim=12
    )
    vision = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = Gemma3Config(
        text_config=dict(**text, num_key_value_heads=2),
        vision_config=dict(**vision, patch_size=14),
        mm_tokens_per_image=4,
    )
    model = Gemma3ForConditionalGeneration(config)
    model = get_peft_model(model, CloverConfig())
    basis = {name: layer.specs["default"][0].basis for name, layer in clover_layers(model.base_model.model)}
    text_attention, vision_attention = "model.language_model.layers.0.self_attn", "model.vision_tower.encoder.layers.0"
    assert basis[f"{text_attention}.k_proj"] == "qr"  # rotary, and normalised
    assert basis[f"{text_attention}.v_proj"] == "pair"
    assert basis[f"{vision_attention}.self_attn.k_proj"] == "pair"
    assert basis[f"{vision_attention}.mlp.fc1"] == "qr"


def test_rank_larger_than_a_part_of_a_fused_projection_trains_that_part_whole() -> None:
    model = get_peft_model(build("gpt_neox"), CloverConfig(r=8, target_modules=["query_key_value"]))
    layer = next(module for module in model.modules() if isinstance(module, CloverLayer))
    assert {spec.part: spec.r for spec in layer.specs["default"]} == {"k_rotary": 4, "k": 8, "v": 8}


def test_misspelt_names_are_answered_with_near_ones() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=r"\{'v_porj'\} not found in the base model; v_porj: did you mean v_proj"):
        get_peft_model(model, CloverConfig(target_modules=["v_porj"]))
    with pytest.raises(ValueError, match=r"not found in the base model; its linear modules are called down_proj, .*"):
        get_peft_model(model, CloverConfig(target_modules=["zzz"]))
    assert not layers(model)
    with pytest.warns(UserWarning, match=r"no module is called self_attn\.k_porj, the others are adapted; .* k_proj"):
        adapted = get_peft_model(model, CloverConfig(target_modules=["v_proj", "self_attn.k_porj"]))
    assert len(layers(adapted)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(build("llama"), CloverConfig(target_modules=["v_proj", "layers.0.self_attn.k_proj", "lm_head"]))


def test_misspelt_names_to_exclude_are_answered_with_near_ones() -> None:
    with pytest.warns(
        UserWarning,
        match=r"exclude_modules: no module is called k_prj, nothing is left out .*k_prj: did you mean k_proj",
    ):
        assert len(_adapted(exclude_modules=["k_prj", "up_proj"])) == 4
    with pytest.warns(
        UserWarning, match="exclude_modules: no module is called zzz, .*; its linear modules are called"
    ):
        assert len(_adapted(exclude_modules=["zzz"])) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _adapted(exclude_modules=["up_proj", "layers.0.self_attn.k_proj", "layers.1.mlp"])
