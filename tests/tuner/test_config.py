"""Every impossible choice is an error that names it, at construction or injection, and leaves the model untouched."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PretrainedConfig, PreTrainedModel

from clover_peft import CloverConfig, CloverLayer
from clover_peft.tuner.bases import clover_layers
from tests.support.tiny import TOLERANCE, build, logits, perturb, relative


def _layers(model: nn.Module) -> dict[str, CloverLayer]:
    return {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, CloverLayer)
    }


def _adapted(family: str = "llama", **choices) -> dict[str, CloverLayer]:
    return _layers(get_peft_model(build(family), CloverConfig(**choices)))


def _one(layer: CloverLayer, adapter_name: str = "default"):
    (spec,) = layer.specs[adapter_name]
    return spec


@contextmanager
def _untouched(model: nn.Module, call=lambda model: logits(model, "llama")) -> Iterator[None]:
    """What fails inside must leave the model as it was: modules, tensors, gradient flags, configs, outputs."""
    with torch.no_grad():
        before = call(model)
    modules = [(name, module, type(module)) for name, module in model.named_modules()]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(id(parameter), name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    yield
    assert [(name, module, type(module)) for name, module in model.named_modules()] == modules
    assert [(id(p), name, p.requires_grad) for name, p in model.named_parameters()] == flags
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not getattr(model, "_hf_peft_config_loaded", False)
    assert model.state_dict().keys() == tensors.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), tensors[name].nan_to_num(7.0)), name
    with torch.no_grad():
        assert torch.equal(call(model).nan_to_num(7.0), before.nan_to_num(7.0))


# ---------------------------------------------------------------------- at construction


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("s_matrix", "half", "'full', 'diagonal'"),
        ("s_matrix", None, "'full', 'diagonal'"),
        ("s_matrix", "FULL", "'full', 'diagonal'"),
        ("basis", "lu", "None, 'qr', 'svd'"),
        ("basis", False, "None, 'qr', 'svd'"),
        ("bias", "lora_only", "'none', 'all', 'clover_only'"),
        ("bias", True, "'none', 'all', 'clover_only'"),
        ("bias", None, "'none', 'all', 'clover_only'"),
        ("save_bases", "fold", "True, False, 'folded'"),
        ("save_bases", None, "True, False, 'folded'"),
        ("save_bases", 1, "True, False, 'folded'"),
        ("cross_layer", "yes", "True, False"),
        ("cross_layer", 1, "True, False"),
        ("truncate", "no", "True, False"),
        ("truncate", None, "True, False"),
        ("init_weights", "pissa", "True, False"),
        ("check_base", 0, "True, False"),
        ("folded", "folded", "True, False"),
    ],
)
def test_value_outside_the_choices_is_refused(field: str, value: object, expected: str) -> None:
    message = f"CloverConfig.{field}: expected one of [{expected}], found {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        CloverConfig(**{field: value})


@pytest.mark.parametrize("field", ["r", "block_size", "mlp_block_size", "head_dim", "num_heads"])
@pytest.mark.parametrize("value", [0, -1, 2.0, 0.5, "8", True, False, [8], float("nan")])
def test_number_that_is_no_positive_integer_is_refused(field: str, value: object) -> None:
    message = f"CloverConfig.{field}: expected a positive integer or None, found {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        CloverConfig(**{field: value})


@pytest.mark.parametrize("rank", [0, -4, 1.5, "4", True, None])
def test_rank_pattern_with_no_positive_integer_is_refused(rank: object) -> None:
    message = f"CloverConfig.rank_pattern['v_proj']: expected a positive integer, found {rank!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        CloverConfig(rank_pattern={"k_proj": 4, "v_proj": rank})


@pytest.mark.parametrize("value", [["v_proj"], "v_proj", None, 4])
def test_rank_pattern_that_is_no_dict_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"CloverConfig\.rank_pattern: expected .*, found "):
        CloverConfig(rank_pattern=value)


@pytest.mark.parametrize("value", [1, 1.0, -0.1, 7, float("nan")])
def test_dropout_that_is_no_probability_below_one_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"CloverConfig\.clover_dropout: expected 0 <= p < 1, found "):
        CloverConfig(clover_dropout=value)


@pytest.mark.parametrize("value", ["0.1", None, [0.1], True])
def test_dropout_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"CloverConfig\.clover_dropout: expected .*, found "):
        CloverConfig(clover_dropout=value)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(s_matrix="diagonal", basis="qr"), "s_matrix='diagonal' has no meaning in the QR basis.*basis='svd'"),
        (dict(truncate=True), "truncate=True drops the directions beyond r; pass r=... or rank_pattern"),
        (dict(truncate=True, r=4, basis="qr"), "truncate=True needs leading directions.*basis='svd'"),
        (dict(target_modules=".*v_proj", layers_to_transform=0), "layers_to_transform cannot be used with a regular"),
        (
            dict(target_modules=".*v_proj", layers_to_transform=[1]),
            "layers_to_transform cannot be used with a regular",
        ),
        (
            dict(target_modules=".*v_proj", layers_pattern="layers"),
            "layers_pattern cannot be used with a regular expression",
        ),
        (dict(layers_pattern="layers"), "layers_pattern needs layers_to_transform"),
        (dict(target_modules=["v_proj"], layers_pattern=["layers"]), "layers_pattern needs layers_to_transform"),
        (dict(folded=True), "a folded adapter holds maps for inference and cannot be trained.*is_trainable=False"),
    ],
)
def test_combination_without_meaning_is_refused(choices: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)CloverConfig: .*{message}"):
        CloverConfig(**choices)


@pytest.mark.parametrize(
    "choices",
    [
        dict(),
        dict(r=1),
        dict(s_matrix="diagonal", basis="svd"),
        dict(s_matrix="full", basis="qr"),
        dict(truncate=True, r=4),
        dict(truncate=True, rank_pattern={"v_proj": 4}),
        dict(target_modules=["v_proj"], layers_to_transform=0, layers_pattern="layers"),
        dict(layers_to_transform=[0]),
        dict(target_modules="all-linear"),
        dict(folded=True, inference_mode=True),
        dict(clover_dropout=0),
        dict(clover_dropout=0.99),
        *(dict(save_bases=value) for value in (True, False, "folded")),
        *(dict(bias=value) for value in ("none", "all", "clover_only")),
    ],
    ids=str,
)
def test_meaningful_choices_are_kept(choices: dict) -> None:
    config = CloverConfig(**choices)
    for name, value in choices.items():
        found = getattr(config, name)
        assert found == (set(value) if isinstance(found, set) else value)


@pytest.mark.parametrize("key", ["rank", "lora_alpha", "targets_modules", "clover_alpha"])
def test_unknown_key_is_a_type_error(key: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{key}'"):
        CloverConfig(**{key: 8})


def test_every_field_says_what_it_is() -> None:
    described = CloverConfig.__doc__.partition("Args:")[2].partition("Raises:")[0]
    ours = [f for f in dataclasses.fields(CloverConfig) if f.name in CloverConfig.__annotations__]
    assert len(ours) > 20
    for field in ours:
        assert field.metadata.get("help"), field.name
        assert re.search(rf"^ +{field.name}: \S", described, re.MULTILINE), field.name


# ---------------------------------------------------------------------- at injection, known families


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
        (dict(block_size=5), "k_proj: block_size=5 neither divides nor is a multiple of 12"),
        (dict(block_size=48), "k_proj: block_size=48 neither divides nor is a multiple of 12"),
        (dict(mlp_block_size=7), "up_proj: mlp_block_size=7 neither divides nor is a multiple of 80"),
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
    with _untouched(model), pytest.raises(ValueError, match=f"(?s){message}"):
        get_peft_model(model, config) if way == "get_peft_model" else inject_adapter_in_model(config, model)


@pytest.mark.parametrize("target", ["embed_tokens", "input_layernorm", "mlp", "self_attn", "rotary_emb"])
def test_target_that_is_no_linear_projection_changes_nothing(target: str) -> None:
    model = build("llama")
    with (
        _untouched(model),
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
    with _untouched(model), pytest.raises(ValueError, match=message):
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
    assert "model.layers.1.self_attn.v_proj" in _layers(
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
    with _untouched(model):
        with pytest.raises(ValueError, match="is larger than a block"):
            model.add_adapter("second", CloverConfig(target_modules=targets, r=3, rank_pattern={r"1\.\w+\.\w+": 99}))
        assert list(model.peft_config) == ["default"]
        assert model.active_adapters == ["default"]
        for layer in _layers(model).values():
            assert list(layer.specs) == list(layer.clover_S) == list(layer.clover_U) == ["default"]
    model.add_adapter("second", CloverConfig(target_modules=targets))  # the name is free again


def test_transformers_add_adapter_that_does_not_fit_changes_nothing() -> None:
    model = build("llama").requires_grad_(True)
    before = logits(model, "llama")
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="r=99 is larger"):
        model.add_adapter(CloverConfig(rank_pattern={r"1\.mlp\.up_proj": 99}))
    assert [type(module) for module in model.modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model, "llama"), before)


# ---------------------------------------------------------------------- what the fields select


def test_defaults_are_key_value_and_up_projection() -> None:
    layers = _adapted()
    assert set(layers) == {
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
    }
    spec = _one(layers["model.layers.0.self_attn.v_proj"])
    assert (spec.blocks, spec.size, spec.r, spec.form, spec.basis, spec.truncate) == (2, 12, 12, "full", "pair", False)
    assert _one(layers["model.layers.0.self_attn.k_proj"]).basis == "qr"
    up = _one(layers["model.layers.0.mlp.up_proj"])
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
    assert _one(layers["model.layers.0.self_attn.v_proj"]).r == 3
    assert _one(layers["model.layers.1.self_attn.v_proj"]).r == 3
    assert _one(layers["model.layers.0.self_attn.k_proj"]).r == 4
    assert _one(layers["model.layers.1.self_attn.k_proj"]).r == 5
    assert layers["model.layers.1.self_attn.k_proj"].clover_S["default"].weight.shape == (2, 5, 5)


def test_rank_pattern_that_matches_nothing_is_reported() -> None:
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match any targeted module"):
        _adapted(rank_pattern={"z_proj": 3})


def test_rank_pattern_alone_truncates_only_what_it_names() -> None:
    layers = _adapted(truncate=True, rank_pattern={"v_proj": 3})
    assert _one(layers["model.layers.0.self_attn.v_proj"]).truncate
    assert not _one(layers["model.layers.0.self_attn.k_proj"]).truncate


def test_regular_expression_selects_by_whole_path() -> None:
    layers = _adapted(target_modules=r".*\.1\.self_attn\.[kv]_proj")
    assert set(layers) == {"model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"}


def test_all_linear_is_every_linear_but_the_output_head() -> None:
    model = build("llama")
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert set(_layers(get_peft_model(model, CloverConfig(target_modules="all-linear")))) == linears


def test_all_linear_takes_conv1d_too() -> None:
    names = {name.rpartition(".")[2] for name in _adapted("gpt2", target_modules="all-linear")}
    assert names == {"c_attn", "c_proj", "c_fc"}


def test_partner_named_as_a_target_gets_a_map_of_its_own() -> None:
    layers = _adapted(target_modules=["v_proj", "o_proj", "q_proj"])
    assert _one(layers["model.layers.0.self_attn.v_proj"]).basis == "pair"
    assert _one(layers["model.layers.0.self_attn.o_proj"]).part == "linear"
    query = _one(layers["model.layers.0.self_attn.q_proj"])
    assert (query.part, query.blocks, query.size) == ("q", 4, 12)


@pytest.mark.parametrize(("size", "blocks"), [(12, 2), (6, 4), (4, 6), (1, 24)])
def test_block_size_splits_heads(size: int, blocks: int) -> None:
    for name, layer in _adapted(block_size=size, target_modules=["k_proj", "v_proj"]).items():
        assert (_one(layer).size, _one(layer).blocks) == (size, blocks), name


def test_a_block_size_without_heads_says_that_it_does_nothing() -> None:
    for model, targets in ((build("llama"), ["up_proj"]), (nn.Sequential(nn.Linear(8, 8)), ["0"])):
        with pytest.warns(UserWarning, match=r"block_size=4 cuts attention heads.*without effect.*mlp_block_size"):
            get_peft_model(model, CloverConfig(block_size=4, target_modules=targets))


def test_block_size_joins_heads_of_intra_layer_targets() -> None:
    for name, layer in _adapted(block_size=24, cross_layer=False, target_modules=["k_proj", "v_proj"]).items():
        assert (_one(layer).size, _one(layer).blocks) == (24, 1), name
    assert _one(_adapted(block_size=24, target_modules=["k_proj"])["model.layers.0.self_attn.k_proj"]).size == 24


@pytest.mark.parametrize(("size", "blocks"), [(80, 1), (40, 2), (16, 5), (1, 80)])
def test_mlp_block_size_cuts_up_projections(size: int, blocks: int) -> None:
    for name, layer in _adapted(mlp_block_size=size, target_modules=["up_proj"]).items():
        assert (_one(layer).size, _one(layer).blocks) == (size, blocks), name


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
        assert (_one(layer).basis, _one(layer).form) == (basis, form)


def test_cross_layer_false_pairs_nothing() -> None:
    for name, layer in _adapted("opt", cross_layer=False).items():
        assert _one(layer).partner is None, name
        assert _one(layer).basis == "qr", name
    paired = {name.rpartition(".")[2] for name, layer in _adapted("opt").items() if _one(layer).basis == "pair"}
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


# ---------------------------------------------------------------------- models that the table does not know


class _StrangeConfig(PretrainedConfig):
    model_type = "strange_for_clover"

    def __init__(self, hidden_size: int = 24, **kwargs) -> None:
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class _Strange(PreTrainedModel):
    """Two layers that name their projections as nobody else does."""

    config_class = _StrangeConfig

    def __init__(self, config: _StrangeConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"mix": nn.Linear(width, width), "grow": nn.Linear(width, 2 * width)}) for _ in range(2)
        )
        self.back = nn.Linear(2 * width, width)
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.back(torch.tanh(block["grow"](block["mix"](x))))
        return x


def _strange() -> _Strange:
    torch.manual_seed(0)
    model = _Strange(_StrangeConfig()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def _call(model: nn.Module) -> Tensor:
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize(
    ("choices", "where"),
    [(dict(), "target_modules"), (dict(target_modules=["grow"]), r"blocks\.0\.grow"), (dict(head_dim=6), "")],
    ids=str,
)
def test_unknown_family_is_told_how_to_be_described(choices: dict, where: str) -> None:
    model = _strange()
    message = f"{where}.*strange_for_clover.*target_modules=.*head_dim=.*num_heads=.*known: .*llama.*whisper"
    with _untouched(model, _call), pytest.raises(ValueError, match=f"(?s){message}"):
        get_peft_model(model, CloverConfig(**choices))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(head_dim=7), "mix: 24 features are not a multiple of head_dim 7"),
        (dict(num_heads=5), "mix: 24 features are not a multiple of num_heads 5"),
        (dict(head_dim=6, num_heads=3), "24 output features make 4 heads of head_dim 6, but num_heads is 3"),
        (dict(mlp_block_size=7), "mlp_block_size=7 neither divides"),
        (dict(head_dim=6, r=7), "r=7 is larger than a block of 6"),
    ],
    ids=str,
)
def test_description_that_does_not_fit_an_unknown_model_changes_nothing(choices: dict, message: str) -> None:
    model = _strange()
    with _untouched(model, _call), pytest.raises(ValueError, match=message):
        get_peft_model(model, CloverConfig(target_modules=["mix"], **choices))


@pytest.mark.parametrize(
    ("choices", "shape"),
    [
        (dict(head_dim=6), (4, 6, 6)),
        (dict(num_heads=3), (3, 8, 8)),
        (dict(head_dim=6, num_heads=4), (4, 6, 6)),
        (dict(mlp_block_size=12), (2, 12, 12)),
        (dict(head_dim=6, block_size=3), (8, 3, 3)),
        (dict(head_dim=6, r=2, s_matrix="diagonal"), (4, 2)),
    ],
    ids=str,
)
def test_unknown_model_works_once_it_is_described(choices: dict, shape: tuple[int, ...]) -> None:
    model = _strange()
    before = _call(model)
    model = get_peft_model(model, CloverConfig(target_modules=["mix"], **choices))
    layers = _layers(model)
    assert set(layers) == {"blocks.0.mix", "blocks.1.mix"}
    assert {tuple(layer.clover_S["default"].weight.shape) for layer in layers.values()} == {shape}
    assert torch.equal(_call(model), before)
    perturb(model)
    after = _call(model)
    assert relative(after, before) > TOLERANCE[torch.float32]
    model.merge_adapter()
    assert relative(_call(model), after) < TOLERANCE[torch.float32]
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(_call(model), before)


@pytest.mark.parametrize("targets", [["0", "2"], "all-linear", r"[02]"], ids=str)
def test_plain_module_without_a_config_needs_target_modules_only(targets: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 10)).eval()
    before = _call(model)
    model = get_peft_model(model, CloverConfig(target_modules=targets))
    shapes = {name: _one(layer).s_shape for name, layer in _layers(model).items()}
    assert shapes == {"0": (1, 48, 48), "2": (1, 10, 10)}
    assert torch.equal(_call(model), before)
    perturb(model)
    after = _call(model)
    assert relative(after, before) > TOLERANCE[torch.float32]
    assert relative(_call(model.merge_and_unload(safe_merge=True)), after) < TOLERANCE[torch.float32]


def test_plain_module_without_target_modules_is_refused() -> None:
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 10)).eval()
    with _untouched(model, _call), pytest.raises(ValueError, match=r"target_modules=\[\.\.\.\]"):
        get_peft_model(model, CloverConfig())


def test_construction_and_injection_are_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        get_peft_model(build("llama"), CloverConfig())


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


def test_a_well_conditioned_head_in_bfloat16_gives_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    shape = dict(hidden_size=512, intermediate_size=512, num_attention_heads=8, num_key_value_heads=8, head_dim=64)
    get_peft_model(build("llama", torch.bfloat16, **shape), CloverConfig())
    assert not [w for w in recwarn if "condition" in str(w.message)]


def test_making_an_adapter_draws_no_random_numbers() -> None:
    model = build("llama")
    before = torch.get_rng_state()
    get_peft_model(model, CloverConfig())
    assert torch.equal(torch.get_rng_state(), before)


def test_rank_larger_than_a_part_of_a_fused_projection_trains_that_part_whole() -> None:
    model = get_peft_model(build("gpt_neox"), CloverConfig(r=8, target_modules=["query_key_value"]))
    layer = next(module for module in model.modules() if isinstance(module, CloverLayer))
    assert {spec.part: spec.r for spec in layer.specs["default"]} == {"k_rotary": 4, "k": 8, "v": 8}


def test_a_rank_that_no_part_of_a_fused_projection_has_is_refused():
    with pytest.raises(ValueError, match=r"c_attn: r=500 is larger than any of its blocks, of at most 12 features"):
        get_peft_model(build("gpt2"), CloverConfig(r=500, target_modules=["c_attn"]))


def test_a_width_without_divisors_is_reported():
    model = nn.Sequential(nn.Linear(16, 97))
    with pytest.warns(UserWarning, match="97 features have no divisor between 8 and 64, blocks are of 1"):
        get_peft_model(model, CloverConfig(target_modules=["0"]))


def test_dropout_and_truncation_are_refused_together():
    with pytest.raises(ValueError, match="use one of the two"):
        CloverConfig(truncate=True, r=4, clover_dropout=0.1)
