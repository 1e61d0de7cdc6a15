"""clover plan --mla: what it counts is what a conversion makes, and it refuses what a conversion refuses."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf

from clover_peft import convert_to_mla
from clover_peft.convert.plan import measure_rates, plan_mla
from tests.support.tiny import build, inputs, load_script

script = load_script("plan")


def planned(folder, capsys, *options) -> dict:
    assert script.main(["--model", str(folder), "--json", "--mla", *map(str, options)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore:calibration. .* are few")
@pytest.mark.parametrize("method", ["clover", "transmla"])
@pytest.mark.parametrize("sizes", [{"cache_reduction": 0.5}, {"kv_lora_rank": 9, "rope_dims": 4}, {}])
@pytest.mark.parametrize(
    ("family", "choices"), [("llama", {}), ("qwen2", {}), ("llama", {"tie_word_embeddings": True})]
)
def test_the_sizes_are_those_of_a_conversion(family, choices, sizes, method):
    model = build(family, **choices)
    _, report = convert_to_mla(
        model, [{"input_ids": inputs(family)["input_ids"].repeat(1, 3)}], method=method, **sizes
    )
    with torch.device("meta"):
        empty = type(model)(model.config)
    plan = plan_mla(empty, method=method, **sizes)
    assert (plan.rope_dims, plan.kv_lora_rank) == (report.rope_dims, report.kv_lora_rank)
    assert plan.parameters[0] == report.parameters[0]
    # Where all heads keep a frequency's rotation, which the weights decide, heads have fewer dimensions without one.
    spared = (plan.parameters[1] - report.parameters[1]) / len(report.layers)
    assert spared == 0 if method == "transmla" else 0 <= spared < 0.2 * sum(plan.parameters)
    assert plan.cache_bytes == report.cache_bytes
    assert set(plan.stages) == set(report.seconds)


def test_llama_2_7b_is_planned_without_weights(tmp_path, capsys):
    config = hf.LlamaConfig(num_key_value_heads=32, architectures=["LlamaForCausalLM"], dtype="float16")
    config.save_pretrained(tmp_path)
    assert script.main(["--model", str(tmp_path), "--mla", "0.6875"]) == 2
    assert "expected bfloat16 or float32 weights, found torch.float16" in capsys.readouterr().err
    plan = planned(tmp_path, capsys, 0.6875, "--dtype", "bfloat16", "--batch-size", 1)
    assert plan["cache_bytes"] == [524288, 163840]
    assert (plan["rope_dims"], plan["kv_lora_rank"]) == (128, 2432)
    assert plan["parameters"][0] == 6_738_415_616
    stages = plan["stages"]
    full, n = 4096 * 2, 4096 * 2 - 128
    assert stages["latent"]["eigen"] == 32 * 2 * n**3
    assert plan["layer_moments"] == 3 * 8 * n**2
    assert stages["rotation"]["held"]["original"] == 2 * plan["parameters"][0]
    # One of the two models, and one layer's decompositions: 8 matrices, the workspace of LAPACK among them.
    work = stages["latent"]["held"].pop("one layer in float64")
    assert work == 8 * 8 * n**2
    assert sum(stages["latent"]["held"].values()) < 1.3 * 2 * plan["parameters"][0]
    assert max(sum(stage["held"].values()) for stage in stages.values()) < 1.5 * 2 * plan["parameters"][0]
    # What enters 31 layers, a gradient, and the Fisher information.
    assert stages["latent"]["files"] == 32 * (plan["tokens"] * 4096 * 2 + 4 * n**2)
    # Two operations for each weight of a layer and each token, and the attention's.
    passes = 32 * (2 * (4 * 4096**2 + 3 * 4096 * 11008) + 4 * 4096 * 512)
    assert stages["rotation"]["matmul"] == pytest.approx(passes * plan["tokens"], rel=0.05)
    more = planned(tmp_path, capsys, 0.6875, "--dtype", "bfloat16", "--batch-size", 32, "--rows", 128)["stages"]
    saved = 2 * (3 * 11008 + 32 * (2 * 256 + 128 + 128) + n) + 4 * (2 * 4096 + n + 32 * 512)
    assert more["latent"]["held"]["activations"] == 32 * 512 * saved
    assert more["rotation"]["matmul"] == pytest.approx(2 * stages["rotation"]["matmul"], rel=0.01)
    assert full == plan["cache_bytes"][0] // 2 // 32


def test_seconds_are_estimated_from_what_this_machine_does(tmp_path, capsys):
    build("llama").config.save_pretrained(tmp_path)
    plan = planned(tmp_path, capsys, 0.5, "--measure")
    for name, stage in plan["stages"].items():
        expected = sum(stage[kind] / rate for kind, rate in plan["rates"].items())
        assert plan["seconds"][name] == pytest.approx(expected)
    assert script.main(["--model", str(tmp_path), "--mla", "0.5", "--measure"]) == 0
    printed = capsys.readouterr().out
    assert "seconds here" in printed
    assert "rotary key of" in printed
    assert all(rate > 0 for rate in measure_rates(torch.bfloat16, 8).values())


@pytest.mark.parametrize(
    ("family", "choices", "message"),
    [
        ("qwen3", {}, "nothing else, but it has k_norm"),
        ("gemma3_text", {}, "nothing else, but it has"),
        ("opt", {}, "nothing else, but it has decoder"),
        ("gpt2", {}, "lacks"),
        ("mistral", {"sliding_window": 8}, "found a sliding window of 8"),
        ("granite", {"embedding_multiplier": 12.0, "attention_multiplier": 12**-0.5}, "found outputs that differ"),
        ("granite", {"attention_multiplier": 1.0}, "expected the softmax scale"),
        ("t5", {}, "expected"),
    ],
)
def test_what_a_conversion_refuses_is_refused_in_one_sentence(family, choices, message, tmp_path, capsys):
    model = build(family, **choices)
    model.config.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises((ValueError, TypeError)) as refused:
        plan_mla(empty)
    assert message in str(refused.value)
    assert script.main(["--model", str(tmp_path), "--mla", "0.5", "--model-class", type(model).__name__]) == 2
    assert str(refused.value) in capsys.readouterr().err


def test_a_quantised_model_is_refused(tmp_path):
    config = build("llama").config
    config.quantization_config = {"quant_method": "bitsandbytes"}
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="expected weights that are not quantised"):
        plan_mla(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mla", "1.5"], "--mla 1.5: expected a share above 0 and below 1"),
        (["--mla"], "--mla: expected the share of the cache to remove or --kv-lora-rank, and not both"),
        (["--mla", "0.5", "--kv-lora-rank", "4"], "--mla: expected the share of the cache"),
        (["--mla", "0.5", "--rows", "0"], "--rows: expected a positive number, found 0"),
        (["--mla", "0.5", "r=4"], "fields of CloverConfig: expected none beside --mla"),
        (["--mla", "0.5", "--match", "q_proj"], "--match: expected none beside --mla"),
        (["--rope-dims", "4"], "--rope-dims: expected --mla with it, found none"),
        (["--mla", "0.5", "--rope-dims", "3"], "rope_dims: expected an even number"),
    ],
)
def test_options_that_do_not_go_together(arguments, message, tmp_path, capsys):
    build("llama").config.save_pretrained(tmp_path)
    assert script.main(["--model", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
