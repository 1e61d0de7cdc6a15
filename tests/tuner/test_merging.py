"""A merged model computes what the unmerged one does, and unmerging restores every bit."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from clover_peft import CloverConfig
from clover_peft.tuner.fused_maps import apply_maps
from tests.support.adapters import FORMS, activate, adapted, base_tensors, layers, loss_and_grads, same, several
from tests.support.tiny import TOLERANCE, build, logits, perturb, relative


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "deepseek_v3"])
def test_merged_computes_what_unmerged_does_and_unmerging_restores_the_bits(family, dtype):
    model = adapted(family, dtype=dtype)
    before, expected = base_tensors(model), logits(model, family)
    model.merge_adapter()
    assert not same(base_tensors(model), before)
    assert [t.dtype for t in base_tensors(model)] == [t.dtype for t in before]
    assert [t.stride() for t in base_tensors(model)] == [t.stride() for t in before]
    assert relative(logits(model, family), expected) < TOLERANCE[dtype]
    model.unmerge_adapter()
    assert same(base_tensors(model), before)
    assert torch.equal(logits(model, family), expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_twenty_merges_and_unmerges_leave_no_drift(dtype):
    model = adapted("qwen2", dtype=dtype)
    before = base_tensors(model)
    model.merge_adapter()
    merged = base_tensors(model)
    for _ in range(20):
        model.unmerge_adapter()
        assert same(base_tensors(model), before)
        model.merge_adapter()
        assert same(base_tensors(model), merged)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_delta_weight_is_merged_minus_base_in_the_layout_of_the_base(form, family):
    model = adapted(family, **FORMS[form])
    weights = [layer.get_base_layer().weight.detach().clone() for layer in layers(model)]
    deltas = [layer.get_delta_weight("default") for layer in layers(model)]
    model.merge_adapter()
    for layer, weight, delta in zip(layers(model), weights, deltas, strict=True):
        assert isinstance(layer.get_base_layer(), nn.Linear) == (family != "gpt2")
        assert delta.shape == weight.shape
        assert relative(layer.get_base_layer().weight, weight + delta) < TOLERANCE[torch.float32]
        assert relative(layer.get_base_layer().weight - weight, delta) < 1e-4
        assert torch.equal(layer.get_delta_weight("default"), delta)


def test_delta_weight_of_a_conv1d_is_what_it_adds_to_the_output():
    layer = layers(adapted("gpt2"))[0]
    x = torch.randn(5, 48)
    bias = layer.get_base_layer().bias
    effect = layer(x) - layer.get_base_layer()(x)
    expected = x @ layer.get_delta_weight("default") + (apply_maps(bias, layer.maps(["default"])) - bias)
    assert relative(effect, expected) < TOLERANCE[torch.float32]


def test_a_second_adapter_merged_on_top_adds_up_and_unmerging_restores_the_bits():
    model = several({"a": {}, "b": {"s_matrix": "diagonal"}}, "qwen2")
    before = base_tensors(model)
    expected = logits(activate(model, ["a", "b"]), "qwen2")
    model.merge_adapter()
    at_once = base_tensors(model)
    model.unmerge_adapter()
    model.merge_adapter(["a"])
    with pytest.warns(UserWarning, match="additionally merging b"):
        model.merge_adapter(["b"])
    assert same(base_tensors(model), at_once)
    assert relative(logits(model, "qwen2"), expected) < TOLERANCE[torch.float32]
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter(["a"])
    assert same(base_tensors(model), at_once)
    model.unmerge_adapter()
    assert same(base_tensors(model), before)


def test_merging_by_name_does_not_depend_on_what_is_active():
    model = several({"a": {}, "b": {"r": 4}}, "qwen2")
    before = base_tensors(model)
    expected = logits(activate(model, "b"), "qwen2")
    activate(model, "a")
    model.merge_adapter(adapter_names=["b"])
    assert all(layer.merged_adapters == ["b"] for layer in layers(model))
    assert relative(logits(model, "qwen2"), expected) < TOLERANCE[torch.float32]
    model.unmerge_adapter()
    assert same(base_tensors(model), before)
    merged = model.merge_and_unload(adapter_names=["b"])
    assert relative(logits(merged, "qwen2"), expected) < TOLERANCE[torch.float32]


def test_a_string_is_not_a_list_of_adapters_to_merge():
    model = adapted()
    before = base_tensors(model)
    with pytest.raises(TypeError, match="list of strings"):
        model.merge_adapter(adapter_names="default")
    assert same(base_tensors(model), before)


def test_setting_an_adapter_unmerges_first():
    model = several({"a": {}, "b": {"r": 4}})
    before = base_tensors(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("b")
    assert same(base_tensors(model), before)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_merge_and_unload_gives_a_plain_model_with_the_same_function(family, safe_merge):
    model = adapted(family)
    expected = logits(model, family)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert type(merged) is type(build(family))
    assert not layers(merged)
    assert list(merged.state_dict()) == list(build(family).state_dict())
    assert relative(logits(merged, family), expected) < TOLERANCE[torch.float32]


def test_safe_merge_gives_the_bits_of_a_plain_merge():
    plain, safe = adapted("qwen2").merge_and_unload(), adapted("qwen2").merge_and_unload(safe_merge=True)
    assert same(list(plain.state_dict().values()), list(safe.state_dict().values()))


@pytest.mark.parametrize("action", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_safe_merge_refuses_a_broken_adapter_and_leaves_the_model_as_it_was(action, value):
    model = adapted("qwen2")
    with torch.no_grad():
        next(iter(layers(model)[-1].clover_S["default"].parameters())).view(-1)[0] = value
    before = base_tensors(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        getattr(model, action)(safe_merge=True)
    assert same(base_tensors(model), before)
    assert len(layers(model)) == 6
    assert not any(layer.merged for layer in layers(model))
    with model.disable_adapter():
        assert torch.equal(logits(model, "qwen2"), logits(build("qwen2"), "qwen2"))


@pytest.mark.parametrize("action", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_that_fails_keeps_what_was_merged_before(action):
    model = several({"good": {}, "broken": {}}, "qwen2")
    with torch.no_grad():
        next(iter(layers(model)[-1].clover_S["broken"].parameters())).view(-1)[0] = float("inf")
    model.merge_adapter(["good"])
    before = base_tensors(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        getattr(model, action)(adapter_names=["broken"], safe_merge=True)
    assert same(base_tensors(model), before)
    assert all(layer.merged_adapters == ["good"] for layer in layers(model))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_unload_gives_back_the_base_bit_for_bit(merged, dtype):
    model = adapted("qwen2", dtype=dtype)
    if merged:
        model.merge_adapter()
    unloaded = model.unload()
    base = build("qwen2", dtype)
    assert type(unloaded) is type(base)
    assert list(unloaded.state_dict()) == list(base.state_dict())
    assert same(list(unloaded.state_dict().values()), list(base.state_dict().values()))


def test_the_weight_kept_for_unmerging_is_neither_trained_nor_saved(tmp_path):
    model = adapted("qwen2")

    def names() -> list[list[str]]:
        return [list(model.state_dict()), list(dict(model.named_parameters())), list(dict(model.named_buffers()))]

    before = names()
    model.save_pretrained(tmp_path / "unmerged")
    model.merge_adapter()
    assert names() == before
    model.save_pretrained(tmp_path / "merged")
    files = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("unmerged", "merged")]
    assert files[0] == files[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_weight_kept_for_unmerging_follows_the_model(dtype):
    model = adapted("qwen2")
    expected = [t.to(dtype) for t in base_tensors(model)]
    model.merge_adapter()
    model.to(dtype)
    model.unmerge_adapter()
    assert same(base_tensors(model), expected)


def test_merging_bfloat16_rounds_once():
    """The merged weight is the nearest bfloat16 of the exact one: nothing is rounded on the way."""
    model = adapted("qwen2", dtype=torch.bfloat16)
    exact = []
    for layer in layers(model):
        wide = copy.deepcopy(layer).double()
        exact.append(apply_maps(wide.base_weight.transposed().double(), wide.maps(["default"])).mT)
    model.merge_adapter()
    for layer, weight in zip(layers(model), exact, strict=True):
        error = (layer.get_base_layer().weight.double() - weight).abs() / weight.abs().clamp(min=1e-3)
        assert float(error.max()) < 2**-8


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_weight_that_something_else_has_written_into_is_not_unmerged(family):
    model = adapted(family)
    model.merge_adapter()
    layer = layers(model)[0]
    weight = layer.get_base_layer().weight
    merged = weight.detach().clone()
    weight.data[0, 0] += 1.0
    with pytest.raises(ValueError, match="found that something has written into it since"):
        model.unmerge_adapter()
    assert layer.merged, "nothing is lost"
    weight.data.copy_(merged)
    model.unmerge_adapter()
    assert not layer.merged


def lora_around(clover: PeftModel) -> PeftModel:
    config = LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    return get_peft_model(clover.base_model.model, config, "lora")


def test_lora_around_a_clover_layer_is_not_merged_before_it():
    """Its update is added behind the maps; merged first, the maps would act on it too."""
    both = lora_around(adapted("llama"))
    expected = logits(both, "llama")
    with pytest.raises(ValueError, match=r"v_proj: .*such as an adapter of another method around this one"):
        both.merge_adapter()
    both.unmerge_adapter()
    assert relative(logits(both, "llama"), expected) < 1e-5


@pytest.mark.parametrize("moved", [False, True])
def test_a_refused_merge_of_lora_is_not_forgotten(moved):
    """CLOVER's own merge would map LoRA's update, which is in one weight by then."""
    clover = adapted("llama")
    both = lora_around(clover)
    expected = logits(both, "llama")
    with pytest.raises(ValueError, match="such as an adapter"):
        both.merge_adapter()
    if moved:
        both.to(torch.float64).to(torch.float32)
    with pytest.raises(ValueError, match="such as an adapter"):
        both.merge_adapter()
    with pytest.raises(ValueError, match="expected to be merged before the Linear around it"):
        clover.merge_adapter()
    both.unmerge_adapter()
    clover.merge_adapter()
    assert relative(logits(both, "llama"), expected) < 1e-5


@pytest.mark.parametrize("how", ["merged", "unloaded", "one after the other"])
def test_lora_around_a_clover_layer_is_merged_after_it(how):
    clover = several({"default": {}, "b": {}})
    both = lora_around(clover)
    clover.base_model.set_adapter(["default", "b"])
    expected = logits(both, "llama")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "All adapters are already merged")
        if how == "unloaded":
            assert relative(logits(clover.merge_and_unload(), "llama"), expected) < 1e-5
            return
        if how == "merged":
            clover.merge_adapter(["default", "b", "lora"])
            assert relative(logits(both, "llama"), expected) < 1e-5
    if how == "one after the other":  # the second merge starts from the base's own weights, without LoRA's update
        clover.merge_adapter(["default", "lora"])
        with pytest.raises(ValueError, match="merge all adapters in one call"):
            clover.merge_adapter(["b"])
    with pytest.raises(ValueError, match="such as an adapter of another method around this one"):
        both.unmerge_adapter()


CHANGES: dict[str, Callable[[PeftModel, nn.Parameter], object]] = {
    "trained": lambda model, weight: weight.requires_grad_(True).data.mul_(1.5),
    "trained, then frozen": lambda model, weight: weight.data.mul_(1.5),
    "loaded": lambda model, weight: model.load_state_dict(
        {n: torch.rand_like(t) for n, t in model.state_dict().items() if n.endswith("base_layer.weight")}, strict=False
    ),
    "moved": lambda model, weight: model.to(torch.float64).to(torch.float32),
    "allocated anew": lambda model, weight: setattr(weight, "data", torch.rand_like(weight)),
    "a layer emptied": lambda model, weight: layers(model)[0].base_layer.to_empty(device="cpu").weight.data.fill_(0.1),
    "lora inside": lambda model, weight: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_is_meant_to_change_is_merged(change):
    if change == "lora inside":
        inner = get_peft_model(build("llama"), LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
        model = get_peft_model(inner.base_model.model, CloverConfig(target_modules=["v_proj"]), "outer")
        perturb(model)
        layers(model)[0].base_layer.merge()
        layers(model)[1].base_layer.merge()
    else:
        model = adapted("llama")
    CHANGES[change](model, layers(model)[0].get_base_layer().weight)
    expected = logits(model, "llama")
    for _ in range(2):
        model.merge_adapter()
        assert relative(logits(model, "llama"), expected) < 1e-5
        if change != "lora inside":
            model.unmerge_adapter()


def test_an_update_of_tokens_below_the_layer_is_merged_first():
    """A tied head with trained tokens: their layer is inside CLOVER's."""
    options = {"target_modules": ["lm_head"], "trainable_token_indices": [20, 30]}
    model = get_peft_model(build("llama", tie_word_embeddings=True), CloverConfig(**options, mlp_block_size=16))
    perturb(model)
    expected = logits(model, "llama")
    with pytest.raises(
        ValueError, match=r"lm_head: .*found TrainableTokensLayer with an update.*merge that adapter first"
    ):
        model.merge_adapter()
    assert relative(logits(model, "llama"), expected) < 1e-5


def test_lora_trains_on_a_merged_clover_model():
    merged = adapted("qwen2").merge_and_unload()
    expected = logits(merged, "qwen2")
    model = get_peft_model(merged, LoraConfig(target_modules=["v_proj", "up_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(logits(model, "qwen2"), expected)
    _, grads = loss_and_grads(model, "qwen2")
    assert len(grads) == 8
    assert torch.equal(logits(model.unload(), "qwen2"), expected)


def test_clover_trains_on_a_model_with_lora_merged():
    lora = get_peft_model(
        build("qwen2"), LoraConfig(target_modules=["v_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    merged = lora.merge_and_unload()
    expected = logits(merged, "qwen2")
    model = get_peft_model(merged, CloverConfig())
    assert torch.equal(logits(model, "qwen2"), expected)
    perturb(model)
    changed = logits(model, "qwen2")
    assert relative(changed, expected) > 1e-3
    assert relative(logits(model.merge_and_unload(), "qwen2"), changed) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("merged", [False, True])
def test_clover_over_lora_layers_merges_only_what_it_can_read(merged):
    """The weight a merge maps is the base's: an update that is still beside it would be left out without a word."""
    config = LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    lora = get_peft_model(build("llama"), config).eval()
    if merged:
        lora.merge_adapter()
    plain = logits(lora, "llama")
    model = lora.base_model.model
    inject_adapter_in_model(CloverConfig(target_modules=["k_proj", "v_proj"]), model, adapter_name="clover")
    assert torch.equal(logits(lora, "llama"), plain)
    perturb(model)
    expected = logits(lora, "llama")
    if merged:
        for layer in layers(model):
            layer.merge()
        assert relative(logits(lora, "llama"), expected) < TOLERANCE[torch.float32]
    else:
        for layer in layers(model):
            with pytest.raises(ValueError, match="merge"):
                layer.merge()
        assert torch.equal(logits(lora, "llama"), expected)


@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda module: nn.utils.prune.l1_unstructured(module, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "parametrized weight_norm", "parametrized spectral_norm", "masked"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_torch_computes_in_each_pass_is_not_merged_into(compute):
    torch.manual_seed(0)
    base, x = nn.Sequential(OrderedDict(fc1=nn.Linear(32, 64))).eval(), torch.randn(3, 32)
    compute(base.fc1)
    expected = base(x)
    model = get_peft_model(base, CloverConfig(target_modules=["fc1"], mlp_block_size=16)).eval()
    assert torch.equal(model(x), expected)
    perturb(model)
    adapted_output = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"fc1: expected a weight of its own.*remove_weight_norm"):
            merge()
        torch.testing.assert_close(model(x), adapted_output)


class Masked(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * torch.ones_like(self.weight).tril(), self.bias)


class Rounded(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.sign() * self.weight.abs().mean(), self.bias)


class Normalised(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x, dim=-1), self.weight, self.bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return 0.25 * super().forward(x)


class Matmul(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


def around(projection: nn.Module, **options):
    """A model of one projection, with an adapter that has an effect."""
    model = get_peft_model(
        nn.Sequential(OrderedDict(fc1=projection)), CloverConfig(target_modules=["fc1"], mlp_block_size=8, **options)
    ).eval()
    perturb(model)
    return model


@pytest.mark.parametrize("options", [{}, {"low_rank": 2}], ids=str)
@pytest.mark.parametrize("kind", [Masked, Rounded, Normalised, Scaled, Matmul])
def test_a_projection_that_computes_something_else_is_not_merged_into(kind, options):
    torch.manual_seed(0)
    model, x = around(kind(16, 16), **options), torch.randn(5, 16)
    expected = model(x)
    if kind is Matmul or (kind is Scaled and not options):
        model.merge_adapter()
        assert relative(model(x), expected) < TOLERANCE[torch.float32]
        model.unmerge_adapter()
        model = model.merge_and_unload(safe_merge=True)
    else:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=rf"fc1: .* {kind.__name__}.forward does something else"):
                merge()
    assert relative(model(x), expected) < TOLERANCE[torch.float32]


class Packed(nn.Module):
    """Two weights of four bits in a byte, as formats hold them that peft does not know."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.scale = dense.weight.detach().abs().max() / 7
        levels = (dense.weight.detach() / self.scale).round().to(torch.int8) + 8
        self.weight = nn.Parameter((levels[:, ::2] * 16 + levels[:, 1::2]).to(torch.uint8), requires_grad=False)

    def forward(self, x):
        levels = torch.stack([self.weight // 16, self.weight % 16], dim=-1).flatten(1)
        return x @ ((levels.to(x.dtype) - 8) * self.scale).T


def test_a_packed_weight_without_a_backend_is_no_plain_weight(tmp_path):
    torch.manual_seed(0)
    dense, x = nn.Linear(16, 16, bias=False), torch.randn(5, 16)
    for save_bases in (True, "folded"):
        trained = around(copy.deepcopy(dense), save_bases=save_bases)
        trained.save_pretrained(tmp_path)
        packed = nn.Sequential(OrderedDict(fc1=Packed(dense)))
        base = packed(x)
        with pytest.raises(ValueError, match="fc1: expected weights to compute bases from, found uint8"):
            get_peft_model(copy.deepcopy(packed), CloverConfig(target_modules=["fc1"], mlp_block_size=8))
        model = PeftModel.from_pretrained(packed, tmp_path).eval()
        expected = apply_maps(base, layers(trained)[0].maps(["default"]))
        assert relative(model(x), expected) < TOLERANCE[torch.float32]
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(TypeError, match="fc1: expected a weight to merge into, found uint8 in a form"):
                merge()
        assert relative(model(x), expected) < TOLERANCE[torch.float32]
