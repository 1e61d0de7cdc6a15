"""`CloverConfig.from_lora`: the same modules, about as many parameters, and a report of what was chosen."""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from clover_peft import CloverConfig
from tests.support.tiny import build

SHAPES: dict[str, hf.PretrainedConfig] = {
    "llama": hf.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=1000,
    ),
    "qwen2": hf.Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=2, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=1000,
    ),
    "gpt2": hf.GPT2Config(n_layer=2, vocab_size=1000),
    "whisper": hf.WhisperConfig(
        d_model=512, encoder_layers=2, decoder_layers=2, encoder_attention_heads=8, decoder_attention_heads=8,
        encoder_ffn_dim=2048, decoder_ffn_dim=2048, vocab_size=1000, architectures=["WhisperForConditionalGeneration"],
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    ),
}  # fmt: skip
CLASSES = {
    "llama": hf.LlamaForCausalLM,
    "qwen2": hf.Qwen2ForCausalLM,
    "gpt2": hf.GPT2LMHeadModel,
    "whisper": hf.WhisperForConditionalGeneration,
}


def trained(name: str, config: Any) -> int:
    with torch.device("meta"):
        adapted = get_peft_model(CLASSES[name](SHAPES[name]), config)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def reported(lora: LoraConfig, model: Any, caplog: pytest.LogCaptureFixture) -> tuple[CloverConfig, str, bool]:
    """The config, the report, and whether it was a warning."""
    caplog.set_level(logging.INFO, logger="clover_peft")
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = CloverConfig.from_lora(lora, model)
    said = [str(each.message) for each in caught if "from_lora" in str(each.message)]
    (only,) = [*said, *(message for message in caplog.messages if "from_lora" in message)]
    return config, only, bool(said)


@pytest.mark.parametrize("r", [8, 32])
@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("name", SHAPES)
def test_counts_are_those_of_real_adapters_and_near(name: str, targets: str | None, r: int, caplog) -> None:
    if name == "whisper" and targets is None:
        targets = r".*(q|v)_proj"  # peft has no default for it
    lora = LoraConfig(r=r, target_modules=targets)
    config, said, warned = reported(lora, SHAPES[name], caplog)
    assert said.startswith("CloverConfig.from_lora: chose ")
    assert warned == ("the nearest that blocks of these modules reach" in said)
    here, there = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+)(?: trained numbers| \([-+])", said))
    assert trained(name, config) == here
    assert trained(name, lora) == there
    assert abs(here / there - 1) <= 0.1 or "the nearest that blocks of these modules reach" in said


def test_what_has_a_counterpart_is_mapped_and_the_rest_is_named() -> None:
    model = build("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], exclude_modules=["layers.1.self_attn.q_proj"], lora_dropout=0.1,
        lora_alpha=32, bias="lora_only", modules_to_save=["lm_head"], layers_to_transform=[0, 1], use_dora=True,
        task_type="CAUSAL_LM", rank_pattern={"v_proj": 4},
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"left out: .*lora_alpha \(CLOVER has no alpha.*use_dora"):
        config = CloverConfig.from_lora(lora, model)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.exclude_modules == {"layers.1.self_attn.q_proj"}
    assert (config.clover_dropout, config.bias, config.task_type) == (0.1, "clover_only", "CAUSAL_LM")
    assert (config.modules_to_save, config.layers_to_transform) == (["lm_head"], [0, 1])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    adapted = get_peft_model(model, config)
    assert sum("clover_S" in name for name, _ in adapted.named_parameters()) == 3


def test_experts_are_counted(caplog) -> None:
    model = build("mixtral")
    lora = LoraConfig(r=4, target_modules=[], target_parameters=["experts.down_proj"])
    config, said, _ = reported(lora, model, caplog)
    here = int(re.findall(r"([\d,]+) trained numbers", said)[0].replace(",", ""))
    adapted = get_peft_model(model, config)
    assert here == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


COUNTED: list[dict[str, Any]] = [
    dict(use_dora=True),
    dict(lora_bias=True),
    dict(rank_pattern={"v_proj": 16}),
    dict(init_lora_weights="pissa", modules_to_save=["lm_head"]),
]


@pytest.mark.parametrize("options", COUNTED, ids=str)
def test_the_count_is_that_of_peft(options: dict[str, Any], caplog) -> None:
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], **options)
    _, said, _ = reported(lora, build("llama"), caplog)
    adapted = get_peft_model(build("llama"), lora)
    there = sum(p.numel() for n, p in adapted.named_parameters() if p.requires_grad and "modules_to_save" not in n)
    assert f"where the LoRA has {there:,} (" in said


USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("targets", ["all-linear", USUAL], ids=["all-linear", "usual"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_mixtures_of_experts(family: str, targets: Any, caplog) -> None:
    """Peft replaces names of experts' modules by parameters, and adds routers to them, for models with stacks."""
    lora = LoraConfig(r=4, target_modules=targets)
    config, said, is_warning = reported(lora, build(family), caplog)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings(
            "ignore", "target_modules: down_proj is also"
        )  # Qwen2's experts, which LoRA passes over
        ours = get_peft_model(build(family), config).base_model
    theirs = get_peft_model(build(family), lora).base_model
    assert set(ours.targeted_module_names) == set(theirs.targeted_module_names)
    routers = {path for path in theirs.targeted_parameter_names if path.endswith("gate.weight")}
    assert set(ours.targeted_parameter_names) == set(theirs.targeted_parameter_names) - routers
    assert f"{sum(p.numel() for p in ours.parameters() if p.requires_grad):,} trained numbers" in said
    assert bool(routers) == ("gate.weight" in said)
    if targets == USUAL and not theirs.targeted_parameter_names:
        unused = [name for name in USUAL if not any(path.endswith(name) for path in theirs.targeted_module_names)]
        assert all(name in said for name in unused)
        assert is_warning or not unused


def test_one_narrow_projection_does_not_decide_the_size_of_all_blocks(caplog) -> None:
    """Qwen2's mixtures of experts have a gate of one feature."""
    with torch.device("meta"):
        config = hf.Qwen2MoeConfig(num_hidden_layers=2, num_experts=4, vocab_size=1000)
        model = hf.Qwen2MoeForCausalLM(config)
        chosen, said, is_warning = reported(LoraConfig(r=16, target_modules="all-linear"), model, caplog)
        assert any(path.endswith("shared_expert_gate") for path in get_peft_model(model, chosen).targeted_module_names)
    assert not is_warning, said


def test_names_that_are_misspelt_or_excluded_are_left_to_the_model(caplog) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_prj", "lm_head"], exclude_modules=["lm_head"])
    config, said, _ = reported(lora, build("llama"), caplog)
    assert config.target_modules == {"q_proj", "v_prj", "lm_head"}
    assert "without" not in said
    with pytest.warns(UserWarning, match="v_prj: did you mean v_proj"):
        get_peft_model(build("llama"), config)
    config, said, _ = reported(lora, build("mixtral"), caplog)
    assert "without v_prj" in said
    assert config.target_modules == {"q_proj", "lm_head"}


def test_a_parameter_of_one_module_is_refused() -> None:
    lora = LoraConfig(target_modules=[], target_parameters=["gate.weight"])
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate\.weight: expected .* found the shape \(4, 48\)"):
        CloverConfig.from_lora(lora, build("mixtral"))


def test_a_quantised_model_is_counted_and_left_alone(caplog) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="needs the quant extra: pip install clover-peft[quant]")
    lora, plain = LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), build("llama")
    _, expected, _ = reported(lora, plain, caplog)
    attention = plain.model.layers[0].self_attn
    attention.q_proj = bnb.nn.Linear4bit(48, 48, bias=False).to("cpu")
    weight = attention.q_proj.weight.clone()
    _, said, _ = reported(lora, plain, caplog)
    assert said == expected
    assert torch.equal(attention.q_proj.weight, weight)
    assert not any("lora" in name for name, _ in plain.named_modules())


def test_without_a_model_the_count_is_open() -> None:
    with pytest.warns(UserWarning, match="no model is given"):
        config = CloverConfig.from_lora(LoraConfig(r=64, target_modules=["v_proj"]))
    assert (config.r, config.block_size, config.target_modules) == (None, None, {"v_proj"})


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(layer_replication=[(0, 1)]), "found layer_replication"),
        (LoraConfig(alora_invocation_tokens=[1], task_type="CAUSAL_LM"), "found alora_invocation_tokens"),
        (LoraConfig(target_modules=["no_such"]), "found: Target modules {'no_such'} not found in the base model"),
    ],
)
def test_what_cannot_be_mapped_is_refused(lora: LoraConfig, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CloverConfig.from_lora(lora, build("llama"))


def test_a_budget_out_of_reach_is_said() -> None:
    with pytest.warns(UserWarning, match="the nearest that blocks of these modules reach"):
        CloverConfig.from_lora(LoraConfig(r=4096, target_modules=["v_proj"]), build("llama"))


def test_an_embedding_is_refused() -> None:
    with pytest.raises(TypeError, match="embed_tokens"):
        CloverConfig.from_lora(LoraConfig(target_modules=["embed_tokens"]), build("llama"))
