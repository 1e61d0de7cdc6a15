"""Routed experts: stacks of weights in one parameter, adapted with `target_parameters`."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import clover_peft
from clover_peft import CloverConfig, hotswap_adapter
from clover_peft.base_model.families import FAMILIES as TABLE
from clover_peft.tuner.experts import CloverExperts
from tests.support.adapters import activate, adapted, layers_by_name, loss_and_grads, only_spec, same
from tests.support.tiny import FAMILIES as TINY
from tests.support.tiny import TOLERANCE, build, inputs, logits, perturb, relative

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]
# What makes a mixture of experts of a family that need not be one.
MIXED = {
    "gemma4_text": dict(
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=4,
        moe_intermediate_size=32,
        experts_implementation="eager",
    )
}
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
ONLY = {"target_modules": [], "target_parameters": STACKS, "mlp_block_size": 8}
OPTIONS = [
    {},
    {"s_matrix": "diagonal"},
    {"r": 4},
    {"r": 4, "truncate": True},
    {"save_bases": False},
    {"save_bases": "folded"},
    {"target_modules": None},
    {"mlp_block_size": None},
]
each_family = pytest.mark.parametrize("family", FAMILIES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
each_kernel = pytest.mark.parametrize("kernel", ["eager", "grouped_mm", "batched_mm"])


def stacks(model: nn.Module) -> dict[str, CloverExperts]:
    """The adapted stacks by their paths."""
    found = [module for module in model.modules() if isinstance(module, CloverExperts)]
    return {layer.name: layer for layer in found}


def adapted_features(family: str, layer: CloverExperts) -> list[int]:
    """The output features of every expert that have a map, in order."""
    weight = layer.weight.mT if family == "gpt_oss" else layer.weight
    features = list(range(weight.shape[1]))
    if layer.base_weight.parameter == "down_proj":
        return features
    return features[1::2] if family == "gpt_oss" else features[len(features) // 2 :]


def by_the_formula(family: str, layer: CloverExperts, matrices: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weights, and biases if there are any, with `(I + M_b)` before the rows of every block b, one by one."""
    spec = only_spec(layer)
    rows = (layer.weight.mT if family == "gpt_oss" else layer.weight).detach().clone()
    bias = layer.base_weight.own_biases
    bias = None if bias is None else bias.detach().clone()
    features = adapted_features(family, layer)
    mapped, shifted = rows.clone(), None if bias is None else bias.clone()
    block = 0
    for expert in range(len(rows)):
        for first in range(0, len(features), spec.size):
            own = features[first : first + spec.size]
            mapped[expert, own] = rows[expert, own] + matrices[block] @ rows[expert, own]
            if bias is not None:
                shifted[expert, own] = bias[expert, own] + matrices[block] @ bias[expert, own]
            block += 1
    assert block == spec.blocks
    return (mapped.mT if family == "gpt_oss" else mapped), shifted


@each_kernel
@each_dtype
@each_family
def test_a_new_or_disabled_adapter_is_the_base_bit_for_bit(family, dtype, kernel):
    model = build(family, dtype, experts_implementation=kernel)
    expected = logits(model, family)
    model = get_peft_model(model, CloverConfig(**ONLY)).eval()
    assert {path.rpartition("mlp.")[2] for path in stacks(model)} == set(STACKS)
    assert torch.equal(logits(model, family), expected)
    perturb(model)
    assert not torch.equal(logits(model, family), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, family), expected)
    assert torch.equal(logits(model.unload(), family), expected)


@pytest.mark.parametrize("family", [name for name, family in TABLE.items() if family.experts])
def test_each_block_of_each_expert_has_a_map_of_its_own(family):
    model = build(family, **MIXED.get(family, {}))
    if family not in FAMILIES and not any(name.endswith(STACKS[0]) for name, _ in model.named_parameters()):
        pytest.skip(f"this version of transformers has other names for {family}'s experts")
    expected = logits(model, family)
    model = get_peft_model(model, CloverConfig(**ONLY)).eval()
    assert torch.equal(logits(model, family), expected)
    assert stacks(model)
    perturb(model)
    for layer in stacks(model).values():
        spec = only_spec(layer)
        weight, biases = by_the_formula(family, layer, spec.map(layer.tensors("default", spec)))
        found = layer.adapted(["default"])
        assert relative(found[layer.base_weight.parameter], weight) < TOLERANCE[torch.float32]
        assert (len(found) == 2) == (biases is not None) == (family == "gpt_oss")
        if biases is not None:
            assert relative(found[f"{layer.base_weight.parameter}_bias"], biases) < TOLERANCE[torch.float32]


@each_family
def test_bases_are_those_of_each_experts_own_rows(family):
    """C of a block makes its rows orthonormal, its own and no other's."""
    model = get_peft_model(build(family, torch.float64), CloverConfig(**ONLY, basis="svd", max_condition=1e4))
    for layer in stacks(model).values():
        spec = only_spec(layer)
        u = layer.tensors("default", spec).c
        weight = layer.weight.mT if family == "gpt_oss" else layer.weight
        rows = weight[:, adapted_features(family, layer)].reshape(spec.blocks, spec.size, -1)
        biases = layer.base_weight.own_biases
        if biases is not None:
            bias = biases[:, adapted_features(family, layer)].reshape(spec.blocks, spec.size, 1)
            rows = torch.cat([rows, bias], -1)
        product = u @ rows
        assert relative(product @ product.mT, torch.eye(spec.size).expand(spec.blocks, -1, -1)) < 1e-8


@each_kernel
@each_family
def test_gradients_of_s_are_those_of_the_formula(family, kernel):
    model = adapted(family, model=build(family, experts_implementation=kernel), **ONLY)
    _, found = loss_and_grads(model, family)
    assert len(found) == len(stacks(model))
    eager = adapted(family, **ONLY)
    by_name = {layer.name: name for name, layer in eager.named_modules() if isinstance(layer, CloverExperts)}
    base = build(family)
    leaves = {}
    for path, layer in stacks(eager).items():
        spec = only_spec(layer)
        tensors = layer.tensors("default", spec)
        leaves[path] = tensors.s.detach().clone().requires_grad_()
        weight, biases = by_the_formula_with_gradients(family, layer, spec.map(tensors._replace(s=leaves[path])))
        holder, _, parameter = path.rpartition(".")
        module = base.get_submodule(holder)
        delattr(module, parameter)
        setattr(module, parameter, weight)
        if biases is not None:
            delattr(module, f"{parameter}_bias")
            setattr(module, f"{parameter}_bias", biases)
    loss_and_grads(base, family)
    for path, leaf in leaves.items():
        name = f"{by_name[path]}.clover_S.default.{path.rpartition('.')[2]}"
        assert relative(found[name], leaf.grad) < TOLERANCE[torch.float32]
        assert leaf.grad.abs().sum() > 0


def by_the_formula_with_gradients(family: str, layer: CloverExperts, matrices: Tensor) -> tuple[Tensor, Tensor | None]:
    """`by_the_formula` with the maps as one matrix for each expert, through which gradients pass."""
    features, experts = adapted_features(family, layer), len(layer.weight)
    weight = layer.weight.mT if family == "gpt_oss" else layer.weight
    blocks = matrices.unflatten(0, (experts, -1))
    whole = []
    for expert in range(experts):
        place = torch.eye(weight.shape[1])[features]
        whole.append(torch.eye(weight.shape[1]) + place.T @ torch.block_diag(*blocks[expert]) @ place)
    maps = torch.stack(whole)
    biases = layer.base_weight.own_biases
    mapped = maps @ weight
    biases = None if biases is None else (maps @ biases.unsqueeze(-1)).squeeze(-1)
    return (mapped.mT if family == "gpt_oss" else mapped), biases


@pytest.mark.parametrize("reentrant", [False, True])
@each_family
def test_gradient_checkpointing_changes_no_gradient(family, reentrant):
    _, expected = loss_and_grads(adapted(family, **ONLY), family)
    model = adapted(family, **ONLY).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _, found = loss_and_grads(model, family)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < TOLERANCE[torch.float32]


@each_kernel
@each_dtype
@each_family
def test_merging_is_the_unmerged_model_and_can_be_undone(family, dtype, kernel, tmp_path):
    model = build(family, dtype, experts_implementation=kernel)
    names, kinds = set(model.state_dict()), [type(module) for module in model.modules()]
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = adapted(family, model=model, **ONLY)
    expected = logits(model, family)
    model.merge_adapter(safe_merge=True)
    assert relative(logits(model, family), expected) < TOLERANCE[dtype]
    with model.disable_adapter():  # takes the merge back
        disabled = logits(model, family)
    assert torch.equal(disabled, logits(build(family, dtype, experts_implementation=kernel), family))
    assert torch.equal(logits(model, family), expected)
    model.merge_adapter()
    model.unmerge_adapter()
    inner = model.get_base_model()
    found = {name.replace("base_layer.", ""): t for name, t in inner.state_dict().items() if "clover_" not in name}
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in own.items())
    merged = model.merge_and_unload()
    assert relative(logits(merged, family), expected) < TOLERANCE[dtype]
    assert set(merged.state_dict()) == names
    assert [type(module) for module in merged.modules()] == kinds
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@each_family
def test_a_reload_under_another_seed_computes_the_same(family, options, tmp_path):
    model = adapted(family, **{**ONLY, **options})
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    again = PeftModel.from_pretrained(build(family), tmp_path)
    exact = options.get("save_bases") != "folded"
    found, expected = logits(again, family), logits(model, family)
    assert torch.equal(found, expected) if exact else relative(found, expected) < TOLERANCE[torch.float32]
    assert sorted(again.peft_config["default"].target_parameters) == sorted(STACKS)
    empty = PeftModel.from_pretrained(build(family), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(empty, family), found)
    with pytest.raises(ValueError, match="expected the weights of the base model"):
        PeftModel.from_pretrained(build(family, seed=5), tmp_path)


@each_family
def test_adapters_of_different_stacks_live_together_and_load_alone(family, tmp_path):
    """Peft's LoRA refuses them: there, names in files depend on the other stacks that are adapted."""
    model = get_peft_model(build(family), CloverConfig(**{**ONLY, "target_parameters": STACKS[:1]}), adapter_name="up")
    model.add_adapter("both", CloverConfig(**ONLY))
    model.add_adapter("down", CloverConfig(**{**ONLY, "target_parameters": STACKS[1:]}))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len({layer.name for layer in stacks(model).values()}) // 2
    assert all(".clover_S.up." in name for name in trained)  # the adapters that were added are not active
    perturb(model)
    model.eval()
    outputs = {name: logits(activate(model, name), family) for name in ("up", "both", "down")}
    assert not torch.equal(outputs["up"], outputs["both"])
    model.save_pretrained(tmp_path)
    for name, expected in outputs.items():
        alone = PeftModel.from_pretrained(build(family), tmp_path / name)
        assert torch.equal(logits(alone, family), expected)
    together = PeftModel.from_pretrained(build(family), tmp_path / "down", adapter_name="down")
    for name in ("up", "both"):
        together.load_adapter(tmp_path / name, name)
    for name, expected in outputs.items():
        assert torch.equal(logits(activate(together, name), family), expected)
    activate(model, ["up", "down"])
    expected = logits(model, family)
    model.merge_adapter()
    assert relative(logits(model, family), expected) < TOLERANCE[torch.float32]
    model.unmerge_adapter()
    model.delete_adapter("both")
    assert torch.equal(logits(model, family), expected)
    assert relative(logits(model.merge_and_unload(), family), expected) < TOLERANCE[torch.float32]


@each_family
def test_two_adapters_of_the_same_stacks_add_their_maps(family):
    model = get_peft_model(build(family), CloverConfig(**ONLY), adapter_name="a")
    model.add_adapter("b", CloverConfig(**ONLY))
    perturb(model)
    model.eval()
    activate(model, ["a", "b"])
    expected = logits(model, family)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert relative(logits(activate(model, "sum"), family), expected) < TOLERANCE[torch.float32]


def test_a_hotswap_reaches_the_experts(tmp_path):
    for seed in (1, 2):
        model = get_peft_model(build("mixtral"), CloverConfig(**ONLY))
        perturb(model, seed=seed)
        model.save_pretrained(tmp_path / str(seed))
    expected = logits(model.eval(), "mixtral")
    model = PeftModel.from_pretrained(build("mixtral"), tmp_path / "1")
    hotswap_adapter(model, str(tmp_path / "2"))
    assert torch.equal(logits(model, "mixtral"), expected)


def test_parameters_are_chosen_as_modules_are():
    options = {**ONLY, "target_modules": ["v_proj"]}
    model = get_peft_model(build("mixtral"), CloverConfig(**options, layers_to_transform=1))
    assert set(layers_by_name(model)) == {
        *("model.layers.1.self_attn.v_proj", "model.layers.1.mlp.experts", "model.layers.1.mlp.experts.base_layer"),
    }
    model = get_peft_model(build("mixtral"), CloverConfig(**options, exclude_modules=[STACKS[0]]))
    assert {path.rpartition(".")[2] for path in stacks(model)} == {"down_proj"}
    model = get_peft_model(build("mixtral"), CloverConfig(**ONLY, rank_pattern={"experts.down_proj": 3}))
    assert {path.rpartition(".")[2]: layer.r["default"] for path, layer in stacks(model).items()} == {
        "down_proj": 3,
        "gate_up_proj": 8,
    }
    model = get_peft_model(build("mixtral"), CloverConfig(target_parameters=STACKS))
    assert {spec.size for layer in stacks(model).values() for spec in layer.specs["default"]} == {40, 48}
    assert any(name.endswith("v_proj") for name in layers_by_name(model))  # the table's own targets too


@pytest.mark.parametrize("family", sorted(name for name in TINY if name in TABLE and TABLE[name].experts))
def test_all_linear_modules_are_loaded_again_where_stacks_have_their_names(tmp_path, family):
    """Such as `down_proj`, a shared expert's projection and the experts' parameter: only the projection is adapted."""
    model = get_peft_model(build(family), CloverConfig(target_modules="all-linear", mlp_block_size=None))
    assert not stacks(model)
    perturb(model)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(build(family), tmp_path)
    assert torch.equal(logits(loaded, family), logits(model.eval(), family))


def test_a_name_of_projections_and_of_a_stack():
    with pytest.warns(
        UserWarning, match=r"down_proj is also model\.layers\.0\.mlp\.experts\.down_proj.*left out; pass"
    ):
        model = get_peft_model(build("qwen2_moe"), CloverConfig(target_modules=["down_proj"]))
    assert set(layers_by_name(model)) == {f"model.layers.{i}.mlp.shared_expert.down_proj" for i in range(2)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        both = CloverConfig(target_modules=["down_proj"], target_parameters=["experts.down_proj"])
        assert len(layers_by_name(get_peft_model(build("qwen2_moe"), both))) == 4
        model = get_peft_model(build("qwen2_moe"), CloverConfig(**ONLY))
        model.add_adapter("b", both)
        assert len(layers_by_name(model)) == 6


def test_a_name_of_a_stack_alone_is_refused():
    with pytest.raises(ValueError, match=r"found a stack of 4 experts.*target_parameters=\['experts\.down_proj'\]"):
        get_peft_model(build("mixtral"), CloverConfig(target_modules=["v_proj", "down_proj"]))


def test_one_of_two_names_of_a_stack_may_be_a_projection_s():
    with pytest.warns(UserWarning, match="left out; pass"):
        model = get_peft_model(build("qwen2_moe"), CloverConfig(target_modules=["down_proj", "experts.down_proj"]))
    assert len(layers_by_name(model)) == 2


def test_factors_are_those_of_the_weights():
    model = adapted("mixtral", **ONLY)
    layer = stacks(model)["model.layers.0.mlp.experts.down_proj"]
    found = clover_peft.explicit_factors(model, "layers.0.mlp.experts.down_proj")["down_proj"]
    rows = layer.adapted(["default"])["down_proj"].detach().reshape(found.V.shape[0], 8, -1)
    assert relative(found.product(), rows) < TOLERANCE[torch.float32]


def test_a_copy_and_an_unpickled_model_compute_the_same(tmp_path):
    model = adapted("gpt_oss", **ONLY)
    expected = logits(model, "gpt_oss")
    other = copy.deepcopy(model)
    perturb(other, seed=9)
    assert torch.equal(logits(model, "gpt_oss"), expected)
    torch.save(model, tmp_path / "model")
    assert torch.equal(logits(torch.load(tmp_path / "model", weights_only=False), "gpt_oss"), expected)


def test_casting_and_moving_keep_the_maps_in_float32_and_the_merged_weights_right():
    model = adapted("gpt_oss", **ONLY)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert {p.dtype for name, p in model.named_parameters() if "clover_S" in name} == {torch.float32}
    expected = logits(adapted("gpt_oss", dtype=torch.bfloat16, **ONLY), "gpt_oss")
    assert relative(logits(model, "gpt_oss"), expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.slow
@each_family
def test_a_compiled_model_computes_and_learns_the_same(family):
    model = adapted(family, model=build(family, experts_implementation="batched_mm"), **ONLY)
    expected, gradients = loss_and_grads(model, family)
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    found, compiled_gradients = loss_and_grads(model, family)
    assert abs(found - expected) < 1e-5
    for name, gradient in gradients.items():
        assert relative(compiled_gradients[name], gradient) < TOLERANCE[torch.float32]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clover_dropout": 0.1}, "clover_dropout and low_rank"),
        ({"low_rank": 2}, "clover_dropout and low_rank"),
        ({"target_parameters": "experts.gate_up_proj"}, "list of names"),
    ],
)
def test_options_without_a_meaning_for_experts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CloverConfig(**{**ONLY, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["experts.up_proj"]}, "ends none"),
        ({"target_parameters": ["gate.weight"]}, "table of architectures knows"),
        ({"mlp_block_size": 7}, "choose a divisor of"),
        ({"r": 9}, "larger than a block"),
    ],
    ids=str,
)
def test_what_does_not_fit_leaves_the_model_as_it_was(options, message):
    model = build("mixtral")
    expected, before = logits(model, "mixtral"), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, CloverConfig(**{**ONLY, **options}))
    assert [type(m) for m in model.modules()] == before
    assert torch.equal(logits(model, "mixtral"), expected)


def test_stacks_with_an_unknown_layout_are_refused():
    with pytest.raises(ValueError, match=r"experts.*_proj.*table of architectures knows.*mixtral"):
        get_peft_model(build("qwen3_next"), CloverConfig(**ONLY))


def test_quantised_experts_are_refused():
    model = build("mixtral")
    for module in model.modules():
        if hasattr(module, "gate_up_proj"):
            module.gate_up_proj = nn.Parameter(module.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"gate_up_proj.*16 bits or more.*float8.*unquantised"):
        get_peft_model(model, CloverConfig(**ONLY))


def test_spread_experts_are_refused():
    model = build("mixtral")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.*spread over processes"):
        get_peft_model(model, CloverConfig(**ONLY))


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "zero3"])
def test_sharded_training_is_refused(variable, monkeypatch):
    module = "clover_peft.tuner.targets"
    name = "is_fsdp_enabled" if variable == "ACCELERATE_USE_FSDP" else "is_deepspeed_zero3_enabled"
    monkeypatch.setattr(f"{module}.{name}", lambda: True)
    with pytest.raises(ValueError, match="FSDP or DeepSpeed's ZeRO-3"):
        get_peft_model(build("mixtral"), CloverConfig(**ONLY))


def test_offloaded_experts_are_refused_in_the_forward_pass():
    model = adapted("mixtral", **ONLY)
    model.get_base_model().model.layers[0].mlp.experts.get_base_layer().to("meta")
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.*sharded or offloaded"):
        logits(model, "mixtral")


def test_adapters_by_sample_are_refused():
    model = adapted("mixtral", **ONLY)
    with pytest.raises(ValueError, match="experts see tokens without their samples"):
        model(**inputs("mixtral"), adapter_names=["default", "__base__"])
    base = model(**inputs("mixtral"), adapter_names=["__base__", "__base__"]).logits
    assert torch.equal(base, logits(build("mixtral"), "mixtral"))


@pytest.mark.parametrize("function", ["balance_updates", "initialize_from_activations", "lora_errors", "merge_onto"])
def test_functions_that_need_projections_refuse_experts(function):
    model = get_peft_model(build("mixtral"), CloverConfig(**ONLY))
    before = base_tensors_of_stacks(model)
    argument = {
        "lora_errors": [2],
        "merge_onto": build("mixtral"),
    }.get(function, [inputs("mixtral")])
    with pytest.raises(ValueError, match=r"experts\..*_proj.*without target_parameters"):
        getattr(clover_peft, function)(model, argument)
    assert same(base_tensors_of_stacks(model), before)


def test_peft_refuses_a_conversion_to_lora():
    from peft import convert_to_lora

    with pytest.raises(TypeError, match="CloverExperts"):
        convert_to_lora(adapted("mixtral", **ONLY), rank=2)


def base_tensors_of_stacks(model: nn.Module) -> list[Tensor]:
    return [layer.weight.detach().clone() for layer in stacks(model).values()]
