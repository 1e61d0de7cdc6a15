"""`BaseWeight` on single projections: plain, Conv1D, quantised, offloaded, sharded, merged into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import clover_peft.runtime.sharding
from clover_peft import CloverConfig
from clover_peft.base_model.slices import HeadSlice, Partner
from clover_peft.base_model.weight import (
    BaseWeight,
    base_of,
    base_weight,
    feature_counts,
    has_module,
    is_projection,
    partner_weight,
)
from tests.support.adapters import layers
from tests.support.tiny import TOLERANCE, build, is_older, perturb, relative

IN, OUT = 64, 128
pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(bias: bool, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """The projection that all others store in their own way."""
    module = nn.Linear(IN, OUT, bias=bias)
    with torch.no_grad():
        module.weight.copy_(random(OUT, IN, seed=1) / 8)
        if bias:
            module.bias.copy_(random(OUT, seed=2))
    return module.to(dtype).requires_grad_(False)


def conv1d(bias: bool) -> Conv1D:
    module = Conv1D(OUT, IN)  # it always has a bias
    module.weight.data, module.bias.data = linear(bias).weight.mT.contiguous(), torch.zeros(OUT)
    if bias:
        module.bias.data = linear(bias).bias
    return module.requires_grad_(False)


def eight_bits(bias: bool) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="needs the quant extra: pip install clover-peft[quant]")
    module = bnb.nn.Linear8bitLt(IN, OUT, bias=bias, has_fp16_weights=False)
    module.load_state_dict(linear(bias).state_dict())
    return module.to("cpu")  # quantises


def four_bits(bias: bool) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="needs the quant extra: pip install clover-peft[quant]")
    module = bnb.nn.Linear4bit(IN, OUT, bias=bias, quant_type="nf4", compute_dtype=torch.float32)
    module.load_state_dict(linear(bias).state_dict())
    module.support_avx512bf16_for_cpu = False  # the CPU's own packing cannot be read back
    return module.to("cpu")


def hqq(bias: bool) -> nn.Module:
    if is_older("5.20"):
        pytest.skip("transformers made the weight of HQQ's layers read-only then")
    quantize = pytest.importorskip("hqq.core.quantize", reason="needs HQQ: pip install hqq")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    return quantize.HQQLinear(linear(bias), config, compute_dtype=torch.float32, device="cpu")


PLAIN: dict[str, Callable[[bool], nn.Module]] = {
    "linear": linear,
    "bfloat16": lambda bias: linear(bias, torch.bfloat16),
    "conv1d": conv1d,
}
QUANTISED: dict[str, Callable[[bool], nn.Module]] = {"8bit": eight_bits, "nf4": four_bits, "hqq": hqq}
KINDS = {**PLAIN, **QUANTISED}
# How far the stored weight is from the one that was stored.
ROUNDED = {"linear": 0.0, "bfloat16": 2e-3, "conv1d": 0.0, "8bit": 1e-2, "nf4": 0.12, "hqq": 0.12}
# How far the projection's own product is from one with the weight that is read; in 8 bits the input is rounded too.
COMPUTED = {"bfloat16": TOLERANCE[torch.bfloat16], "8bit": 2e-2}


class Owner(nn.Module, BaseTunerLayer):
    """As little of a tuner layer as the quantisations need: where they put the projection that they write to."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


def read(kind: str, bias: bool = True) -> BaseWeight:
    return BaseWeight(Owner(KINDS[kind](bias)), "model.v_proj")


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_that_is_read_is_the_one_that_multiplies(kind, bias):
    base, own = read(kind, bias), linear(bias)
    found = base.transposed()
    assert (base.in_features, base.out_features) == tuple(found.shape) == (IN, OUT)
    assert not base.is_merged
    assert relative(found, own.weight.mT) <= ROUNDED[kind]
    if bias:
        assert relative(base.bias, own.bias) <= ROUNDED["bfloat16"]
    elif kind == "conv1d":
        assert not base.bias.any()
    else:
        assert base.bias is None
    x = random(5, IN, seed=3).to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    expected = x.float() @ found.float() + (0 if base.bias is None else base.bias.float())
    assert relative(base.module(x), expected) < COMPUTED.get(kind, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("kind", "stored", "precision", "merges_in"),
    [
        ("linear", torch.float32, "float32", torch.float32),
        ("bfloat16", torch.bfloat16, "bfloat16", torch.bfloat16),
        ("conv1d", torch.float32, "float32", torch.float32),
        ("8bit", torch.int8, "bnb 8bit", torch.float32),
        ("nf4", torch.uint8, "bnb 4bit", torch.float32),
        ("hqq", torch.uint8, "hqq 4bit", torch.float32),
    ],
)
def test_it_knows_how_the_weight_is_stored(kind, stored, precision, merges_in):
    base = read(kind)
    assert base.stored.dtype == stored
    assert base.precision == precision
    assert base.merge_dtype == merges_in
    assert base.is_readable
    assert base.is_present


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_weights_are_read_without_a_copy_and_go_back_into_their_own_layout(kind):
    base = read(kind)
    assert base.transposed().data_ptr() == base.module.weight.data_ptr()
    assert torch.equal(base.as_stored(base.transposed()), base.module.weight)
    assert base.as_stored(base.transposed()).shape == base.module.weight.shape


# ---------------------------------------------------------------------- writing and restoring


def written(base: BaseWeight, seed: int = 4) -> tuple[Tensor, Tensor]:
    """Another weight, as in the projection's own layout, and another bias."""
    before = base.transposed()
    change = 0.3 * random(IN, OUT, seed=seed) * before.float().std()
    bias = None if base.bias is None else base.bias + 1
    return base.as_stored(before + change.to(before)), bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_written_weight_is_used_and_the_base_models_own_is_still_read(kind, bias):
    base = read(kind, bias)
    before, own_bias = base.transposed().clone(), None if base.bias is None else base.bias.clone()
    weight, new_bias = written(base)
    base.write(weight.clone(), None if new_bias is None else new_bias.clone())
    assert base.is_merged
    assert torch.equal(base.transposed(), before)
    assert (base.bias is None) if own_bias is None else torch.equal(base.bias, own_bias)
    x = random(5, IN, seed=3).to(weight.dtype)
    transposed = weight if base.fan_in_fan_out else weight.mT
    expected = x.float() @ transposed.float() + (0 if new_bias is None else new_bias.float())
    assert relative(base.module(x), expected) < max(ROUNDED[kind], COMPUTED.get(kind, TOLERANCE[torch.float32]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_taken_back_bit_for_bit(kind, bias):
    base = read(kind, bias)
    module, stored = base.module, base.stored.clone()
    before, own_bias = base.transposed().clone(), None if base.bias is None else base.bias.clone()
    outputs = module(random(5, IN, seed=3).to(before.dtype))
    for seed in (4, 5):  # the second time from the same weights
        for _ in range(2):  # the second write replaces the first, and not what is kept
            base.write(*written(base, seed))
        base.restore()
        assert not base.is_merged
        assert base.module is module
        assert base.stored.dtype == stored.dtype
        assert torch.equal(base.stored, stored)
        assert torch.equal(base.transposed(), before)
        assert (base.bias is None) if own_bias is None else torch.equal(base.bias, own_bias)
        assert torch.equal(base.module(random(5, IN, seed=3).to(before.dtype)), outputs)


@pytest.mark.parametrize("kind", PLAIN)
def test_writing_a_plain_weight_rounds_nothing(kind):
    base = read(kind)
    weight, bias = written(base)
    base.write(weight.clone(), bias)
    assert base.rounding == (0.0, 0.0)
    assert torch.equal(base.module.weight, weight)


@pytest.mark.parametrize("kind", QUANTISED)
def test_writing_a_quantised_weight_tells_the_change_and_the_rounding(kind):
    base = read(kind)
    before = base.transposed()
    weight, bias = written(base)
    base.write(weight.clone(), bias)
    change, error = base.rounding
    assert change == pytest.approx(float((weight.mT - before).square().sum()), rel=1e-4)
    now = BaseWeight(base.owner).transposed()
    assert error == pytest.approx(float((weight.mT - now).square().sum()), rel=1e-4)
    assert 0 < error < (2 * ROUNDED[kind]) ** 2 * float(weight.square().sum())


class InPlace(QuantizationBackend):
    """A backend that writes into the packed weight, which is not called `weight`."""

    backend_name, supports_merge = "in place", True

    def get_base_weight(self, module):
        return module.qweight.data * module.scale

    def set_base_weight(self, module, weight):
        module.qweight.data.copy_(weight)


class Renewing(InPlace):
    """A backend that puts a new packed weight in the place of the old one."""

    def set_base_weight(self, module, weight):
        module.qweight = nn.Parameter(weight)


@pytest.mark.parametrize("backend", [InPlace, Renewing])
def test_a_backend_that_cannot_be_unmerged_is_refused(backend, monkeypatch):
    module = nn.Linear(IN, OUT, bias=False)
    module.qweight, module.scale = module.weight, torch.ones(1)
    del module.weight
    base = BaseWeight(module, "model.q_proj")
    monkeypatch.setattr(base, "backend", backend())
    with pytest.raises(TypeError, match=r"model\.q_proj: .*in place backend.* changed the old one"):
        base.write(torch.ones(OUT, IN), None)
    assert not base.is_merged


def test_a_weight_of_eight_bits_is_merged_in_float32():
    module = linear(bias=False, dtype=torch.float8_e4m3fn)
    assert BaseWeight(module).merge_dtype == torch.float32


@pytest.mark.parametrize("kind", PLAIN)
def test_what_is_kept_follows_casts(kind):
    base = read(kind)
    weight, bias = base.transposed().clone(), base.bias.clone()
    base.write(*written(base))
    base.apply(lambda tensor: tensor.double())
    base.restore()
    assert base.precision == "float64"
    assert torch.equal(base.transposed(), weight.double())
    assert torch.equal(base.bias, bias.double())
    base.apply(lambda tensor: tensor.half())  # nothing is kept
    assert base.precision == "float64"


# ---------------------------------------------------------------------- weights that are elsewhere


def test_an_offloaded_weight_is_there_within_whole_only():
    module = linear(True)
    expected = module.weight.mT.clone()
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    add_hook_to_module(module, AlignDevicesHook("cpu", offload=True, weights_map=weights))
    base = BaseWeight(module)
    assert not base.is_present
    with base.whole():
        with base.whole():  # the inner one takes nothing away
            assert base.is_present
        assert base.is_present
        assert torch.equal(base.transposed(), expected)
    assert not base.is_present
    with pytest.raises(RuntimeError, match="inside"), base.whole():
        raise RuntimeError("inside")
    assert not base.is_present


def test_a_weight_that_zero3_has_sharded_is_whole_within_whole_only(monkeypatch):
    """A stand-in for DeepSpeed: a parameter is empty but within its context."""
    module = linear(True)
    expected, whole = module.weight.mT.clone(), {id(p): p.data for p in module.parameters()}
    for parameter in module.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)

    @contextmanager
    def gather(parameters: list[nn.Parameter], modifier_rank: int | None = 0) -> Iterator[None]:
        assert modifier_rank is None  # read, not written
        for parameter in parameters:
            parameter.data = whole[id(parameter)]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    monkeypatch.setattr(clover_peft.runtime.sharding, "gather_params_ctx", gather)
    base = BaseWeight(module)
    assert (base.in_features, base.out_features) == (IN, OUT)
    with base.whole():
        with base.whole():
            pass
        assert torch.equal(base.transposed(), expected)
        assert base.bias.shape == (OUT,)
    assert not module.weight.numel()


def test_a_weight_on_the_meta_device_is_not_present():
    base = BaseWeight(nn.Linear(IN, OUT, device="meta"))
    assert not base.is_present
    assert base.is_readable
    assert base.precision == "float32"


def test_a_weight_that_its_quantisation_only_runs_is_not_read(monkeypatch):
    module = linear(True)
    monkeypatch.setattr(
        "clover_peft.base_model.weight.resolve_quantization_backend",
        lambda module, **_: ForwardOnlyQuantizationBackend("gptq"),
    )
    base = BaseWeight(module)
    assert not base.is_readable
    assert not base.is_present
    assert base.precision == "gptq"
    with pytest.raises(TypeError, match="gptq"):
        base.transposed()


def test_a_weight_that_was_repacked_for_the_cpu_is_not_read():
    module = linear(True)
    module.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    base = BaseWeight(module, "model.v_proj")
    with pytest.raises(
        TypeError, match=r"model\.v_proj: expected a 4-bit weight .*support_avx512bf16_for_cpu = False"
    ):
        base.transposed()


# ---------------------------------------------------------------------- which projection


@pytest.mark.parametrize(
    "module", [nn.Embedding(4, 3), nn.LayerNorm(4), nn.MultiheadAttention(4, 2), nn.Conv2d(1, 1, 1)]
)
def test_what_is_no_projection_is_refused_by_name(module):
    assert not is_projection(module)
    with pytest.raises(TypeError, match=rf"model\.x: expected a linear projection .*, found {type(module).__name__}"):
        BaseWeight(module, "model.x")


def test_a_projection_without_a_weight_is_refused_by_name():
    module = nn.Module()
    module.in_features, module.out_features = 4, 3
    with pytest.raises(TypeError, match=r"model\.x: expected a linear projection with a weight"):
        BaseWeight(module, "model.x").stored  # noqa: B018 - reading it raises


def test_the_projection_is_found_inside_of_wrappers():
    model = get_peft_model(build("llama"), CloverConfig(target_modules=["v_proj"], modules_to_save=["lm_head"]))
    attention = model.base_model.model.model.layers[0].self_attn
    assert type(base_of(attention.v_proj)) is nn.Linear
    assert base_of(attention.v_proj) is attention.v_proj.base_layer
    assert base_of(attention.o_proj) is attention.o_proj
    head = model.base_model.model.lm_head
    assert base_of(head) is head.original_module
    assert feature_counts(base_of(head), "lm_head")[1] == 96
    lora = get_peft_model(build("llama"), LoraConfig(target_modules=["v_proj"])).base_model.model
    assert type(base_of(lora.model.layers[0].self_attn.v_proj)) is nn.Linear


def test_a_module_is_there_or_not():
    model = build("llama")
    assert has_module(model, "model.layers.0.self_attn")
    assert not has_module(model, "model.layers.9.self_attn")
    assert not has_module(model, "model.config")


def adapted() -> PeftModel:
    model = get_peft_model(build("llama"), CloverConfig())
    perturb(model)
    return model


def test_a_tuner_layer_is_read_by_its_own_reader_which_knows_what_is_merged():
    model = adapted()
    inner, plain = model.base_model.model, build("llama")
    model.merge_adapter()
    for layer in layers(model):
        found = base_weight(inner, layer.base_weight.path)
        assert found is layer.base_weight
        assert found.is_merged
        assert torch.equal(found.transposed(), plain.get_submodule(found.path).weight.mT)
        assert not torch.equal(found.transposed(), found.module.weight.mT)
    other = base_weight(inner, "model.layers.0.self_attn.o_proj")
    assert other.path == "model.layers.0.self_attn.o_proj"
    assert torch.equal(other.transposed(), plain.model.layers[0].self_attn.o_proj.weight.mT)


@pytest.mark.parametrize("reads", [True, False])
def test_a_partners_heads_are_in_its_last_dimension(reads):
    """A partner that reads the heads has them in its inputs, and its bias is not theirs; another has them in both."""
    model = build("qwen2")
    path, heads = ("mlp.down_proj", HeadSlice.plain(5, 16)) if reads else ("self_attn.k_proj", HeadSlice.plain(2, 12))
    path = f"model.layers.0.{path}"
    partner = Partner(path, heads, reads=reads)
    module = model.get_submodule(path)
    with partner_weight(model, partner) as (rows, bias):
        assert torch.equal(rows, module.weight if reads else module.weight.mT)
        assert rows.shape == (48, heads.features)
        assert (bias is None) if reads else torch.equal(bias, module.bias)
