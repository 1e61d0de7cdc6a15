"""target_modules="all-linear" finds modules that have adapters already, CLOVER's and other tuners'."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as hf
from peft import get_peft_model
from torch import nn

import clover_peft
from clover_peft import CloverConfig
from clover_peft.tuner.layers import clover_layers
from tests.support.tiny import TOLERANCE, build, logits, perturb, relative

LORA = dict(r=2, init_lora_weights=False)


def adapted(model: nn.Module, adapter_name: str, attribute: str) -> set[str]:
    """The paths of the projections that have an adapter, without the tuner layers around them."""
    layers = ((path, getattr(module, attribute, ())) for path, module in model.named_modules())
    return {path.replace(".base_layer", "") for path, tensors in layers if adapter_name in tensors}


def linears(model: nn.Module) -> set[str]:
    head = model.get_output_embeddings()
    return {path for path, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("first", [None, "all-linear"])
@pytest.mark.parametrize("way", ["add_adapter", "inject"])
def test_a_second_adapter(family: str, first: str | None, way: str) -> None:
    model = build(family)
    expected = adapted(
        peft.inject_adapter_in_model(CloverConfig(target_modules="all-linear"), build(family)), "default", "clover_S"
    )
    second = CloverConfig(target_modules="all-linear")
    if way == "inject":
        peft.inject_adapter_in_model(CloverConfig(target_modules=first), model)
        peft.inject_adapter_in_model(second, model, "second")
        inner = model
    else:
        wrapped = peft.get_peft_model(model, CloverConfig(target_modules=first))
        wrapped.add_adapter("second", second)
        inner = wrapped.get_base_model()
    assert adapted(inner, "second", "clover_S") == expected
    assert not any("clover" in path for path in expected)


@pytest.mark.parametrize("first", [None, "all-linear"])
def test_lora_on_clover(first: str | None) -> None:
    model = build("llama")
    expected, before = linears(model), logits(model, "llama")
    clover_peft.CloverModel(model, CloverConfig(target_modules=first), "one")
    config = peft.LoraConfig(target_modules="all-linear", **LORA)
    peft.LoraModel(model, {"two": config}, "two")
    assert adapted(model, "two", "lora_A") == expected
    assert not torch.equal(logits(model, "llama"), before)


@pytest.mark.parametrize("first", [["v_proj"], "all-linear"], ids=str)
def test_clover_on_lora(first: list[str] | str) -> None:
    model = build("llama")
    expected = linears(model)
    peft.LoraModel(model, peft.LoraConfig(target_modules=first, **LORA), "one")
    before = logits(model, "llama")
    clover_peft.CloverModel(model, {"two": CloverConfig(target_modules="all-linear")}, "two")
    assert adapted(model, "two", "clover_S") == expected
    assert torch.equal(logits(model, "llama"), before)
    perturb(model)
    assert not torch.equal(logits(model, "llama"), before)


MAMBA = {
    "mamba": (hf.MambaForCausalLM, hf.MambaConfig, {"state_size": 8, "time_step_rank": 4}),
    "mamba2": (
        hf.Mamba2ForCausalLM,
        hf.Mamba2Config,
        {"state_size": 8, "num_heads": 4, "head_dim": 24, "n_groups": 1},
    ),
}


@pytest.mark.parametrize("family", MAMBA)
def test_projections_that_a_state_space_layer_reads_past_the_module_are_refused(family):
    model_class, config_class, more = MAMBA[family]

    def base():
        return model_class(config_class(vocab_size=32, hidden_size=48, num_hidden_layers=2, **more))

    for target in (["out_proj"], "all-linear"):
        with pytest.raises(ValueError, match=r"reads its weight past it.*exclude_modules"):
            get_peft_model(base(), CloverConfig(target_modules=target, mlp_block_size=4))
    read = ["out_proj"] if family == "mamba2" else ["out_proj", "x_proj", "dt_proj"]
    model = get_peft_model(base(), CloverConfig(target_modules="all-linear", exclude_modules=read, mlp_block_size=4))
    assert {name.rpartition(".")[2] for name, _ in clover_layers(model)} == {"in_proj"}
    model(input_ids=torch.arange(8).view(1, 8)).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if p.requires_grad)


def test_projections_that_a_speech_model_reads_past_the_module_are_refused():
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    convolutions = dict(conv_dim=(8,), conv_kernel=(4,), conv_stride=(4,), num_conv_pos_embeddings=4)
    config = hf.WavLMConfig(**sizes, **convolutions, num_conv_pos_embedding_groups=2)
    with pytest.raises(ValueError, match=r"WavLMAttention reads its weight past it.*exclude_modules") as refused:
        get_peft_model(hf.WavLMModel(config), CloverConfig(target_modules=["v_proj"], head_dim=8))
    for name in ("q", "k", "v", "out"):
        assert f"attention.{name}_proj" in str(refused.value)
    feed_forward = CloverConfig(target_modules=["intermediate_dense"], mlp_block_size=16)
    assert len(list(clover_layers(get_peft_model(hf.WavLMModel(config), feed_forward)))) == 1


def test_weights_that_are_read_beside_another_use_are_refused():
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    convolutions = dict(conv_dim=(8,), conv_kernel=(4,), conv_stride=(4,), num_conv_pos_embeddings=4)
    more = dict(num_conv_pos_embedding_groups=2, tdnn_dim=(32, 32), tdnn_kernel=(1, 1), tdnn_dilation=(1, 1))
    speaker = hf.Wav2Vec2ForXVector(hf.Wav2Vec2Config(**sizes, **convolutions, **more, xvector_output_dim=32))
    with pytest.raises(ValueError, match=r"TDNNLayer reads its weight past it"):
        get_peft_model(speaker, CloverConfig(target_modules=["kernel"], mlp_block_size=4))


@pytest.mark.parametrize("exact", [False, True])
def test_a_branch_that_an_option_opens_counts_where_it_is_open(exact):
    model = build("bloom", pretraining_tp=2, slow_but_exact=exact)
    config = CloverConfig(target_modules=["dense_4h_to_h"])
    if not exact:
        assert len(list(clover_layers(get_peft_model(model, config)))) == 2
        return
    with pytest.raises(ValueError, match="BloomMLP reads its weight past it"):
        get_peft_model(model, config)


def test_projections_of_diffusers_are_fused_with_merged_adapters_alone():
    pytest.importorskip("diffusers", reason="needs the dev extra")
    base = build("unet")
    plain = copy.deepcopy(base)
    model = get_peft_model(base, CloverConfig())
    perturb(model)
    expected = logits(model, "unet")
    with pytest.raises(ValueError, match=r"to_\w: expected a merged adapter, found one that fuse_projections would"):
        base.fuse_qkv_projections()
    assert relative(logits(model, "unet"), expected) < TOLERANCE[torch.float32]
    model.merge_adapter()
    base.fuse_qkv_projections()
    assert relative(logits(model, "unet"), expected) < TOLERANCE[torch.float32]
    before = logits(plain, "unet")
    plain.fuse_qkv_projections()
    assert relative(logits(plain, "unet"), before) < TOLERANCE[torch.float32]


class Penalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        return self.fc(x), self.fc.weight.square().sum()


def test_a_weight_that_is_read_beside_a_call_is_a_warning():
    with pytest.warns(UserWarning, match=r"Penalised calls fc, and also reads its weight.*exclude_modules=\['fc'\]"):
        get_peft_model(Penalised(), CloverConfig(target_modules=["fc"], mlp_block_size=4))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        return self.encoder(x)


def test_the_output_of_torch_s_attention_is_refused():
    for targets in (["self_attn.out_proj"], "all-linear"):
        with pytest.raises(ValueError, match=r"MultiheadAttention reads.*exclude_modules=\['self_attn.out_proj'\]"):
            get_peft_model(Transformer(), CloverConfig(target_modules=targets, head_dim=8))


def test_torch_s_fast_path_past_an_adapter_is_refused():
    config = CloverConfig(target_modules=["linear1", "linear2"])
    with pytest.raises(ValueError, match=r"linear1: .*EncoderLayer reads its weight.*set_fastpath_enabled\(False\)"):
        get_peft_model(Transformer(), config)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        base, x = Transformer(), torch.randn(2, 5, 32)
        expected = base.eval().requires_grad_(False)(x)
        model = get_peft_model(base, config).eval()
        assert torch.equal(model(x), expected)
        perturb(model)
        with torch.no_grad():
            found = model(x)
        assert not torch.allclose(found, expected, atol=1e-3)
        torch.testing.assert_close(found, model.train()(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
