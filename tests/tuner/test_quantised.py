"""Quantised bases: bitsandbytes in 8 and 4 bits, HQQ, torchao; a stub where a library cannot run without a GPU."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import peft.tuners.tuners_utils
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)
from transformers.pytorch_utils import Conv1D

import clover_peft.tuner.layer
from clover_peft import (
    CloverConfig,
    CloverLayer,
    balance_updates,
    dequantize,
    initialize_from_activations,
    initialize_from_contrast,
    merge_onto,
    own_text,
)
from clover_peft.base_model.weight import BaseWeight
from clover_peft.tuner.base_check import WEIGHT_ERROR
from clover_peft.tuner.layers import clover_layers
from clover_peft.tuner.merging import map_base_tensor
from clover_peft.tuner.update_scale import SENSITIVITY, update_sensitivities
from tests.support.tiny import is_older, perturb, relative
from tests.support.trainers import StopAfter, settings

bnb = pytest.importorskip("bitsandbytes", reason="needs the quant extra: pip install clover-peft[quant]")

IDS = torch.arange(3, 40).unsqueeze(0)
WIDTHS = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A folder with a small model whose widths every quantisation can cut."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        initializer_range=0.09,
        **WIDTHS,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return str(folder)


def plain(folder: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def with_config(folder: str, config) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    ).eval()


def eight_bits(folder: str) -> nn.Module:
    return with_config(folder, BitsAndBytesConfig(load_in_8bit=True))


def four_bits(folder: str, packed: bool = False) -> nn.Module:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = with_config(folder, config)
    for module in model.modules():  # see `check_packing`
        if isinstance(module, bnb.nn.Linear4bit) and not packed:
            module.support_avx512bf16_for_cpu = False
    return model


def hqq(folder: str) -> nn.Module:
    """Transformers' own loading with HQQ needs a GPU."""
    if is_older("5.20"):
        pytest.skip("transformers made the weight of HQQ's layers read-only then")
    quantize = pytest.importorskip("hqq.core.quantize", reason="needs HQQ: pip install hqq")
    model = plain(folder).requires_grad_(False)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
                    new = quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
                    setattr(parent, name, new)
    return model


def torchao(folder: str) -> nn.Module:
    library = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
    return with_config(folder, TorchAoConfig(library.Int8WeightOnlyConfig()))


KINDS: dict[str, Callable[[str], nn.Module]] = {"8bit": eight_bits, "nf4": four_bits, "hqq": hqq, "torchao": torchao}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits.float()


def effect_error(found: Tensor, expected: Tensor, base: Tensor) -> float:
    """Of what an adapter changes."""
    return float((found - expected).norm() / (expected - base).norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choices", [{}, {"r": 8, "s_matrix": "diagonal"}], ids=["full", "leading diagonal"])
def test_an_adapter_on_a_quantised_base(kind, choices, tiny, tmp_path):
    base = KINDS[kind](tiny)
    untouched = logits(base)
    model = get_peft_model(base, CloverConfig(**choices))
    assert torch.equal(logits(model), untouched)
    perturb(model)
    adapted = logits(model)
    assert relative(adapted, untouched) > 0.05
    with model.disable_adapter():
        assert torch.equal(logits(model), untouched)

    # The plain formula, on the weights that the quantised ones stand for.
    dense = plain(tiny)
    for path, layer in clover_layers(model.base_model.model):
        target = dense.get_submodule(path)
        with torch.no_grad():
            for spec in layer.specs["default"]:
                s, c, e, *_ = layer.tensors("default", spec)
                s = s if s.ndim == 3 else torch.diag_embed(s)
                change = s @ c if e is None else e @ s @ c
                whole = layer.get_base_weight().unflatten(0, (spec.blocks, spec.size))
                delta = (change @ whole.to(change)).flatten(0, 1)
                assert relative(layer.get_delta_weight("default"), delta) < 1e-4
                target.weight.copy_(layer.get_base_weight() + delta)

    loss = model.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 and p.dtype == torch.float32 for p in trained.values())
    model.eval()

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(KINDS[kind](tiny), tmp_path)
    assert torch.equal(logits(again), adapted)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_unmerging(kind, tiny):
    model = get_peft_model(KINDS[kind](tiny), CloverConfig())
    untouched = logits(model)
    perturb(model)
    adapted = logits(model)
    wanted = {p: layer.get_base_weight() + layer.get_delta_weight("default") for p, layer in clover_layers(model)}
    change = sum(layer.get_delta_weight("default").square().sum() for _, layer in clover_layers(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.merge_adapter()
    error = sum((layer.get_base_weight() - wanted[path]).square().sum() for path, layer in clover_layers(model))
    said = [str(w.message) for w in caught if "rounding is" in str(w.message)]
    lost = effect_error(logits(model), adapted, untouched)
    if kind in ("nf4", "hqq"):
        assert len(said) == 1  # once, not once a layer
        assert "clover_peft.dequantize(model)" in said[0]
        shown = int(said[0].split("rounding is ")[1].split("%")[0]) / 100
        assert shown == pytest.approx(float((error / change).sqrt()), abs=0.01)
        assert lost > 0.1
    else:
        assert not said
        assert lost < 0.1
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model), untouched)
    first = {path: layer.get_base_weight().clone() for path, layer in clover_layers(model)}
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert all(torch.equal(layer.get_base_weight(), first[path]) for path, layer in clover_layers(model))
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_merge_starts_from_the_original_weights(kind, tiny):
    model = get_peft_model(KINDS[kind](tiny), CloverConfig())
    model.add_adapter("second", CloverConfig(s_matrix="diagonal"))
    perturb(model)
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter()
    together = logits(model)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    assert torch.equal(logits(model), together)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_into_the_dequantised_base_loses_nothing(kind, tiny, tmp_path):
    model = get_peft_model(KINDS[kind](tiny), CloverConfig())
    untouched = logits(model)
    perturb(model)
    adapted = logits(model)
    assert dequantize(model) is model
    assert {type(layer.get_base_layer()) for _, layer in clover_layers(model)} == {nn.Linear}
    # bitsandbytes multiplies in 8 bits with activations that it rounds
    allowed = 5e-2 if kind == "8bit" else 1e-4
    assert effect_error(logits(model), adapted, untouched) < allowed
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = model.merge_and_unload(safe_merge=True)
    assert relative(logits(merged), before) < 1e-5
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(merged))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", ["none", "clover_only", "all"])
def test_the_dense_update_goes_onto_other_weights(kind, bias, tiny):
    model = get_peft_model(
        KINDS[kind](tiny), CloverConfig(bias=bias, modules_to_save=["lm_head"], trainable_token_indices=[5])
    )
    perturb(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "clover_S" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    original, base = plain(tiny), plain(tiny)
    assert merge_onto(model, base) is base
    tokens = model.base_model.model.model.embed_tokens.token_adapter
    assert torch.equal(base.model.embed_tokens.weight, tokens.get_merged_weights(["default"]))
    assert torch.equal(base.lm_head.weight, model.base_model.model.lm_head.modules_to_save["default"].weight)
    adapted = dict(clover_layers(model.base_model.model))
    for name, parameter in base.named_parameters():
        path, _, kind_of = name.rpartition(".")
        if path in adapted and kind_of == "weight":
            change = parameter - original.get_parameter(name)
            assert relative(change, adapted[path].get_delta_weight("default")) < 1e-5
        elif path in adapted:
            mapped = map_base_tensor(adapted[path], adapted[path].base_weight.bias, ["default"])
            assert torch.equal(parameter, mapped)
        elif kind_of == "bias":
            assert torch.equal(parameter, model.base_model.model.get_submodule(path).bias)
            trained = bias == "all" and kind != "hqq"  # whose biases are no parameters
            assert torch.equal(parameter, original.get_parameter(name)) != trained
        elif path not in ("lm_head", "model.embed_tokens"):
            assert torch.equal(parameter, original.get_parameter(name))


def conv1d_folder(tmp_path) -> str:
    """A GPT-2, whose projections transformers stores transposed, and turns into linear ones when it quantises them."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


@pytest.mark.parametrize("targets", [None, ["attn.c_proj"]], ids=["default", "square"])
def test_the_dense_update_goes_onto_weights_of_another_layout(targets, tmp_path):
    folder = conv1d_folder(tmp_path)
    model = get_peft_model(four_bits(folder), CloverConfig(target_modules=targets))
    perturb(model)
    original, base = plain(folder), plain(folder)
    merge_onto(model, base)
    for path, layer in clover_layers(model.base_model.model):
        assert isinstance(base.get_submodule(path), Conv1D)
        assert not isinstance(layer.get_base_layer(), Conv1D)
        change = base.get_parameter(f"{path}.weight") - original.get_parameter(f"{path}.weight")
        assert relative(change, layer.get_delta_weight("default").mT) < 1e-5
    base_too = dequantize(model).merge_and_unload()
    expected = logits(base_too) - logits(dequantize(four_bits(folder)))
    assert effect_error(logits(base), logits(original) + expected, logits(original)) < 0.3


def test_formats_of_one_library_are_different_precisions():
    library = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
    found = []
    for config in (library.Int8WeightOnlyConfig(), library.Float8WeightOnlyConfig()):
        model = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
        library.quantize_(model, config)
        found.append(BaseWeight(model[0], quantization_kwargs={"get_apply_tensor_subclass": lambda: None}).precision)
    assert found[0] != found[1]
    assert all(precision.startswith("torchao ") for precision in found)


def test_a_base_that_lacks_a_trained_module_stays_as_it_was(tiny):
    model = get_peft_model(four_bits(tiny), CloverConfig(modules_to_save=["lm_head"], trainable_token_indices=[5]))
    perturb(model)
    for lacks in ("lm_head", "model.embed_tokens"):
        base = plain(tiny)
        base.set_submodule(lacks, nn.Identity())
        before = copy.deepcopy(base.state_dict())
        with pytest.raises(ValueError, match=f"{lacks}.weight: expected a tensor"):
            merge_onto(model, base)
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_what_cannot_be_merged_onto_is_refused_and_stays_as_it_was(tiny):
    model = get_peft_model(four_bits(tiny), CloverConfig())
    perturb(model)
    with pytest.raises(ValueError, match=r"self_attn\.k_proj: expected plain weights in base, found bnb 8bit"):
        merge_onto(model, eight_bits(tiny))
    with pytest.raises(ValueError, match="adapter 'other': expected a model with this CLOVER adapter"):
        merge_onto(model, plain(tiny), "other")
    with pytest.raises(ValueError, match="expected a model without adapters"):
        merge_onto(model, get_peft_model(plain(tiny), LoraConfig(target_modules=["q_proj"])))
    shallow = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=1, num_attention_heads=4, **WIDTHS))
    model.peft_config["default"].check_base = False
    with pytest.raises(ValueError, match="from 128 to 64 features in base, found 128 to 128"):
        merge_onto(model, shallow)
    shallow.model.layers[0] = plain(tiny).model.layers[0]
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.k_proj: expected this projection in base, found none"
    ):
        merge_onto(model, shallow)
    model.peft_config["default"].check_base = True
    other = plain(tiny)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.normal_()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj .*expected the weights of the base model"):
        merge_onto(model, other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match="expected a model with quantised projections, found none; use the model"):
        dequantize(get_peft_model(plain(tiny), CloverConfig()))
    model.merge_adapter()
    with pytest.raises(ValueError, match="an adapter is merged; call unmerge_adapter first"):
        dequantize(model)


@pytest.mark.parametrize("kind", ["8bit", "nf4"])
def test_a_reload_onto_other_precision_warns_with_its_error(kind, tiny, tmp_path):
    model = get_peft_model(KINDS[kind](tiny), CloverConfig())
    untouched = logits(model)
    perturb(model)
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    change = {path: layer.get_delta_weight("default") for path, layer in clover_layers(model)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(plain(tiny), tmp_path)
    said = [str(w.message) for w in caught if "of its effect is rounding" in str(w.message)]
    pairs = [(layer.get_delta_weight("default"), change[path]) for path, layer in clover_layers(loaded)]
    error = (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt()
    assert effect_error(logits(loaded), adapted, untouched) > 0
    if kind == "nf4":
        assert len(said) == 1
        assert "clover_peft.merge_onto(model, base)" in said[0]
        shown = int(said[0].split("about ")[1].split("%")[0]) / 100
        assert shown == pytest.approx(float(error), rel=0.2)
    else:
        assert bool(said) == (float(error) > 0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(KINDS[kind](tiny), tmp_path)


def test_what_rounding_changes_in_normal_weights():
    """The table behind the warning."""
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    four, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    eight, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    rounded = {
        "bfloat16": weight.bfloat16(),
        "float16": weight.half(),
        "bnb 4bit": bnb.functional.dequantize_4bit(four, state),
        "bnb 8bit": eight * scale.unsqueeze(1) / 127,
    }
    for precision, values in rounded.items():
        assert relative(values.float(), weight) == pytest.approx(WEIGHT_ERROR[precision], rel=0.15)


# --- S stays in float32 ----------------------------------------------------------------------------


def cast_what_is_trained(model: nn.Module) -> None:
    """As TRL does with every quantised model."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_behind_the_back_loses_no_bit(kind, tiny, tmp_path):
    model = get_peft_model(KINDS[kind](tiny), CloverConfig())
    perturb(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    cast_what_is_trained(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    model.train()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    # a resumed run loads into what was cast
    cast_what_is_trained(model)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    # and what was trained meanwhile is not taken back
    with torch.no_grad():
        for name in before:
            model.get_parameter(name).add_(1.0)
    cast_what_is_trained(model)
    model.train()
    assert all(torch.equal(model.get_parameter(name), value + 1) for name, value in before.items())
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    clone = copy.deepcopy(model)
    cast_what_is_trained(clone)
    clone.train()
    assert all(torch.equal(clone.get_parameter(name), value + 1) for name, value in before.items())


@pytest.mark.parametrize("how", ["peft_config", "wrapped"])
def test_trl_trains_s_in_float32(how, tiny, tmp_path):
    trl = pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")
    datasets = pytest.importorskip("datasets", reason="needs the train extra")

    rows = torch.randint(3, 96, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    model, config = four_bits(tiny), CloverConfig()
    if how == "wrapped":
        model = get_peft_model(model, config)
        perturb(model)
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    class Watch(trl.trainer.sft_trainer.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if how == "wrapped" and state.global_step == 0:
                model.train()
                self.same = all(torch.equal(model.get_parameter(name), value) for name, value in start.items())

    watch = Watch()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings(tmp_path, bf16=False, dataset_kwargs={"skip_prepare_dataset": True})),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=tokenizer(),
        peft_config=config if how == "peft_config" else None,
        callbacks=[watch],
    )
    trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {s.dtype for p in trained for s in trainer.optimizer.state[p].values() if s.ndim} == {torch.float32}
    assert all(p.any() for p in trained)
    assert {b.dtype for n, b in trainer.model.named_buffers() if ".clover_" in n} == {torch.float32}
    assert how != "wrapped" or watch.same


def test_trl_resumes_bit_for_bit_on_a_quantised_base(tiny, tmp_path):
    trl = pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")
    datasets = pytest.importorskip("datasets", reason="needs the train extra")

    rows = torch.randint(3, 96, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()

    def run(folder: str, stop: int | None = None, resume: bool = False) -> dict[str, Tensor]:
        torch.manual_seed(11 if resume else 0)
        options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "save_strategy": "steps", "save_steps": 2}
        trainer = trl.SFTTrainer(
            model=four_bits(tiny),
            args=trl.SFTConfig(**settings(tmp_path / folder, bf16=False, **options)),
            train_dataset=datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}),
            processing_class=tokenizer(),
            peft_config=CloverConfig(),
            callbacks=[] if stop is None else [StopAfter(stop)],
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    whole = run("whole")
    run("killed", stop=2)
    resumed = run("killed", resume=True)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


# --- traps ----------------------------------------------------------------------------------------


def packs_for_the_cpu(model: nn.Module) -> bool:
    """Run an evaluation, and where this machine does not repack for it, say that it did."""
    logits(model)
    weights = [module.weight for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    really = all(getattr(weight.quant_state, "packing_format_for_cpu", False) for weight in weights)
    for weight in weights:
        weight.quant_state.packing_format_for_cpu = True
    return really


def test_weights_that_were_repacked_for_the_cpu_are_noticed(tiny, tmp_path):
    trained = get_peft_model(four_bits(tiny), CloverConfig())
    perturb(trained)
    trained.save_pretrained(tmp_path)

    base = four_bits(tiny, packed=True)
    packs_for_the_cpu(base)
    with pytest.raises(TypeError, match=r"layers\.0\.self_attn\.k_proj: .*repacked for the CPU"):
        get_peft_model(base, CloverConfig())
    assert not any(isinstance(module, CloverLayer) for module in base.modules())

    model = PeftModel.from_pretrained(four_bits(tiny, packed=True), tmp_path)
    packs_for_the_cpu(model)
    for action in (model.train, model.merge_adapter, lambda: dequantize(model)):
        with pytest.raises(TypeError, match="support_avx512bf16_for_cpu = False"):
            action()
    assert not any(layer.merged for _, layer in clover_layers(model))


@pytest.mark.parametrize("start", ["activations", "own text", "contrast", "scale"])
def test_starts_from_data_do_not_have_weights_repacked(start, tiny):
    base = four_bits(tiny, packed=True)
    seen = []
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True  # as on the CPUs that repack
            module.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    known = [{"input_ids": torch.randint(3, 90, (4, 64), generator=torch.Generator().manual_seed(i))} for i in (0, 1)]
    with_labels = [{**batch, "labels": batch["input_ids"]} for batch in known]
    if start == "own text":
        own_text(base, rows=2, length=4)
    else:
        model = get_peft_model(base, CloverConfig(low_rank=2 if start == "contrast" else 0))
        assert not seen
        if start == "activations":
            initialize_from_activations(model, known)
        elif start == "contrast":
            initialize_from_contrast(model, known, known)
        else:
            balance_updates(model, with_labels)
    assert seen
    assert all(seen)  # bitsandbytes repacks in evaluation mode alone


class Forward4bit(nn.Linear):
    """A projection that can only be run, as GPTQ's and AWQ's: their libraries need a GPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.load_state_dict(linear.state_dict())
        self.hidden = [self.weight]
        del self.weight
        self.qweight = nn.Parameter(torch.zeros(4, dtype=torch.int32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.hidden[0], self.bias)


def forward_only(folder: str) -> nn.Module:
    model = plain(folder)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, Forward4bit(linear))
    return model


@pytest.fixture
def stub(monkeypatch) -> SimpleNamespace:
    real = clover_peft.base_model.weight.resolve_quantization_backend

    def resolve(base: nn.Module, **kwargs):
        return ForwardOnlyQuantizationBackend("gptq") if isinstance(base, Forward4bit) else real(base, **kwargs)

    for module in (clover_peft.base_model.weight, clover_peft.tuner.dequantize, peft.tuners.tuners_utils):
        if hasattr(module, "resolve_quantization_backend"):
            monkeypatch.setattr(module, "resolve_quantization_backend", resolve)


@pytest.mark.usefixtures("stub")
def test_weights_that_cannot_be_read_take_adapters_with_bases(tiny, tmp_path):
    trained = get_peft_model(plain(tiny), CloverConfig())
    perturb(trained)
    for save_bases in (True, "folded", False):
        trained.peft_config["default"].save_bases = save_bases
        trained.save_pretrained(tmp_path / str(save_bases))
    for save_bases in (True, "folded"):
        loaded = PeftModel.from_pretrained(forward_only(tiny), tmp_path / str(save_bases))
        assert relative(logits(loaded), logits(trained)) < 1e-5
        before = logits(loaded)
        with pytest.raises(TypeError, match="gptq"):
            loaded.merge_adapter()
        assert torch.equal(logits(loaded), before)
    loaded = PeftModel.from_pretrained(forward_only(tiny), tmp_path / "True", is_trainable=True).train()
    loaded(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for p in loaded.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"can be dequantised, found gptq.*use clover_peft\.merge_onto"):
        dequantize(loaded)
    base = forward_only(tiny)
    with pytest.raises((TypeError, ValueError), match=r"gptq.*bases"):
        get_peft_model(base, CloverConfig())
    with pytest.raises((TypeError, ValueError), match=r"gptq.*bases"):
        PeftModel.from_pretrained(base, tmp_path / "False")
    assert not any(isinstance(module, CloverLayer) for module in base.modules())


@pytest.mark.parametrize("kind", ["8bit", "nf4"])
def test_updates_are_balanced_through_a_quantised_base(kind, tiny, one_thread):
    base = four_bits(tiny, packed=True) if kind == "nf4" else KINDS[kind](tiny)
    model = get_peft_model(base, CloverConfig()).train()
    with torch.no_grad():
        before = logits(model)
    ids = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(1))
    balance_updates(model, [{"input_ids": ids, "labels": ids}])  # in evaluation mode, yet nothing is repacked
    with torch.no_grad():
        assert torch.equal(logits(model), before)
    found = torch.cat(list(update_sensitivities(model, [{"input_ids": ids, "labels": ids}]).values()))
    torch.testing.assert_close(found, torch.full_like(found, SENSITIVITY), rtol=1e-2, atol=0)


def test_updates_cannot_be_balanced_through_repacked_weights(tiny):
    model = get_peft_model(four_bits(tiny, packed=True), CloverConfig())
    if not packs_for_the_cpu(model):
        pytest.skip("bitsandbytes does not repack on this machine")
    ids = torch.arange(3, 19).view(1, -1)
    with pytest.raises(TypeError, match="bitsandbytes repacked"):
        balance_updates(model, [{"input_ids": ids, "labels": ids}])
