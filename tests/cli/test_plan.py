"""scripts/plan.py: what it counts is what a real adapter has."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from safetensors.torch import load_file

from clover_peft import CloverConfig
from tests.support.tiny import build, load_script

script = load_script("plan")


def test_llama_2_70b_is_planned_without_weights(tmp_path, capsys):
    hf.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32000,
    ).save_pretrained(tmp_path)
    assert script.main(["--model", str(tmp_path / "config.json"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    s = 80 * (8 * 128**2 + 8 * 128**2 + 448 * 64**2)
    assert plan["parameters"] == {"trainable": s, "S": s, "base": 68_976_648_192}
    assert plan["bytes"]["S"] == 4 * s
    assert plan["bytes"]["adamw"] == 8 * s
    assert len(plan["layers"]) == 80
    first = plan["layers"]["model.layers.0"]
    assert [module.rpartition(".")[2] for module in first] == ["k_proj", "v_proj", "up_proj"]
    value = first["model.layers.0.self_attn.v_proj"]
    assert value["slices"] == [
        {"part": "v", "blocks": 8, "size": 128, "r": 128, "basis": "pair", "parameters": 8 * 128**2}
    ]
    assert value["gram_flops"] == 2 * 8192 * 128 * (8 * 128 + 64 * 128)  # the values' rows, the output's columns
    assert script.main(["--model", str(tmp_path), "r=16", "s_matrix=diagonal"]) == 0
    assert f"{80 * 16 * (8 + 8 + 448):,} trainable of 68,976,648,192" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5", "phi3", "deepseek_v2"])
@pytest.mark.parametrize("choices", [{}, {"r": 4, "s_matrix": "diagonal"}, {"bias": "all"}, {"modules_to_save": True}])
def test_the_plan_is_what_is_saved(family, choices, tmp_path):
    model = build(family)
    if "modules_to_save" in choices:
        head = model.get_output_embeddings()
        choices = {"modules_to_save": [next(name for name, module in model.named_modules() if module is head)]}
    plan = script.plan(model.config, CloverConfig(**choices), type(model).__name__)
    assert plan["parameters"]["base"] == sum(p.numel() for p in model.parameters())
    for save_bases, planned in plan["adapter_file"].items():
        how = save_bases if save_bases == "folded" else save_bases == "true"
        adapted = get_peft_model(build(family), CloverConfig(save_bases=how, **choices))
        assert plan["parameters"]["trainable"] == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        adapted.save_pretrained(tmp_path / save_bases)
        tensors = load_file(tmp_path / save_bases / "adapter_model.safetensors")
        assert planned == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("family", "changes", "choices"),
    [
        ("llama", {}, {"target_modules": ["lm_head", "k_proj"]}),  # peft saves the whole head, too
        ("llama", {}, {"target_modules": ["lm_head", "k_proj"], "r": 4, "bias": "all"}),
        ("llama", {"tie_word_embeddings": True}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("llama", {}, {"trainable_token_indices": [1, 2]}),
        ("bert", {}, {"bias": "all"}),  # its head has one bias under two names
        ("albert", {}, {"bias": "all"}),
        ("bert", {}, {"bias": "clover_only"}),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_the_plan_has_what_peft_saves_beside_the_adapter(family, changes, choices, tmp_path):
    model = build(family, **changes)
    planned = script.plan(model.config, CloverConfig(**choices), type(model).__name__)["adapter_file"]
    found = {}
    for name, how in {"true": True, "false": False, "folded": "folded"}.items():
        adapted = get_peft_model(build(family, **changes), CloverConfig(save_bases=how, **choices))
        adapted.save_pretrained(tmp_path / name)
        found[name] = sum(t.nbytes for t in load_file(tmp_path / name / "adapter_model.safetensors").values())
    assert planned == found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_layer_is_measured(family, tmp_path, capsys):
    build(family).config.save_pretrained(tmp_path)
    assert script.main(["--model", str(tmp_path), "--measure", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert measured["layer"].endswith(".0")
    assert measured["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rr=3"], "rr=3: expected key=value with a field of CloverConfig"),
        (["r"], "r: expected key=value"),
        (["r=0"], "CloverConfig.r: expected a positive integer or None, found 0"),
        (["r=1000"], "r=1000 is larger than a block"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_sentence(arguments, message, tmp_path, capsys):
    build("llama").config.save_pretrained(tmp_path)
    assert script.main(["--model", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_ranks_that_match_are_those_of_real_adapters(tmp_path, capsys):
    from peft import LoraConfig

    config = hf.LlamaConfig(
        vocab_size=96, hidden_size=576, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert script.main(["--model", str(tmp_path), "--json", "--match", *targets]) == 0
    found = json.loads(capsys.readouterr().out)
    budget = found["parameters"]["trainable"]
    for method, chosen in found["match"].items():
        lora = LoraConfig(
            r=chosen["r"], rank_pattern=chosen["rank_pattern"], target_modules=targets, use_dora=method == "dora"
        )
        with torch.device("meta"):
            model = get_peft_model(hf.LlamaForCausalLM(config), lora)
        assert chosen["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert abs(chosen["parameters"] / budget - 1) < 0.01
    assert script.main(["--model", str(tmp_path), "--match", "q_proj"]) == 0
    assert "as large: lora with r=" in capsys.readouterr().out
    assert script.main(["--model", str(tmp_path), "--match", "zzz"]) == 2
    assert "--match zzz: expected a linear module of the model, found none" in capsys.readouterr().err
    assert script.main(["--model", str(tmp_path), "s_matrix=diagonal", "r=1", "--match", "q_proj"]) == 2
    assert "expected modules that fit" in capsys.readouterr().err
