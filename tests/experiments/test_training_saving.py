"""What a training job leaves: record, card, adapter, merged model; and the check that it is what was trained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from clover_peft.experiments.training.run import run
from clover_peft.experiments.training.verify import main as verify_main
from clover_peft.experiments.training.verify import verify


def test_randomised_pissa_is_saved_as_plain_lora(settings, tmp_path):
    """Its base weights cannot be recomputed at load, so the difference to the original ones is saved."""
    run(settings("pissa", merge=True, **{"peft.init_lora_weights": "pissa_niter_2", "peft.r": 4}))
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == 8
    report = verify(tmp_path / "run")
    assert report["adapter"] < 1e-4
    assert report["merged"] < 1e-4


def test_record_card_and_summary(settings, tmp_path, capsys):
    record = run(settings(max_steps=4, merge=True))
    assert record == json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["settings"]["peft"]["peft_type"] == "CLOVER"
    assert record["adapter"]["config"]["peft_type"] == "CLOVER"
    assert record["adapter"]["config"]["s_matrix"] == "full"
    resolved = {
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "max_length": 512,
    }
    assert resolved.items() <= record["training"].items()
    assert record["training"]["optim"].startswith("adamw")
    assert record["seed"] == 0
    assert record["environment"]["versions"]["peft"]
    assert record["environment"]["git_revision"] is None or len(record["environment"]["git_revision"]) == 40
    assert record["model"] == {
        "name": "someone/tiny",
        "origin": "folder model",
        "license": "mit",
        "dtype": "torch.float32",
    }
    assert record["data"]["train_rows"] == 40
    assert len(record["data"]["fingerprint"]) == 64
    # keys and values 2 heads of 16 x 16 each, up 1 block of 64 x 64, 2 layers
    assert record["parameters"]["trainable"] == 2 * (2 * 256 + 2 * 256 + 64 * 64)
    assert record["peak_memory_bytes"] > 0
    assert (record["peak_gpu_bytes"] is None) == (not torch.cuda.is_initialized())
    assert record["tokens_per_second"] > 0
    assert record["seconds"]["init"] > 0
    assert record["loss"]["held_out_before"] > 0
    assert [set(item) for item in record["answers"]] == [{"question", "expected", "before", "after"}] * 2
    output = capsys.readouterr().out
    assert "trainable parameters: 10,240" in output
    assert "tokens/s" in output
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    for fact in ("import clover_peft", "base_model: someone/tiny", "licence: mit", "train.jsonl", "transformers "):
        assert fact in card
    assert "import clover_peft" not in (tmp_path / "run" / "merged" / "README.md").read_text()


def test_a_merge_that_fails_leaves_the_record_and_the_summary(settings, tmp_path, capsys):
    with pytest.raises(
        ValueError, match=r"^merge=true: expected weights that can be merged, found: .*the adapter and"
    ):
        run(settings("lora", merge=True, max_steps=4, **{"peft.learning_rate": 1e37}))
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["steps"] == 4
    assert record["peak_memory_bytes"] > 0
    assert "WARNING: training failed" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_folder_without_a_card_is_no_model_of_the_hub(settings, tiny, tmp_path):
    shutil.copytree(tiny.model, tmp_path / "plain", ignore=shutil.ignore_patterns("README.md"))
    run(settings(model=tmp_path / "plain", max_steps=1))
    card = ModelCard.load(tmp_path / "run" / "adapter" / "README.md")
    assert card.data.base_model is None
    assert "| base model | plain, folder plain, licence: not stated" in card.text


def test_the_merged_model_needs_nothing_of_ours(settings, tmp_path):
    run(settings(merge=True))
    script = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert type(model).__name__ == 'LlamaForCausalLM'\n"
        "assert not any(name.startswith(('clover_peft', 'peft')) for name in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run" / "merged")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_verify_reports_what_differs(settings, tmp_path, capsys):
    run(settings(merge=True, max_steps=8, **{"peft.learning_rate": 3e-2}))
    out = tmp_path / "run"
    assert verify_main([str(out), "--loss-fell"]) == 0
    said = capsys.readouterr().out
    assert "training loss: " in said
    assert (
        "logits of the reloaded adapter differ from the trained model's by at most 0.0e+00 (limit 1.0e-04): passed"
        in said
    )
    merged = next(line for line in said.splitlines() if line.startswith("logits of the merged model differ"))
    assert merged.endswith("(limit 1.0e-04): passed")
    assert "answers of both saved forms are the trained model's: passed" in said
    record = json.loads((out / "record.json").read_text())
    record["loss"]["last"] = record["loss"]["first"]
    (out / "record.json").write_text(json.dumps(record))
    assert verify_main([str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(out / "merged")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1.5)
    model.save_pretrained(out / "merged")
    capsys.readouterr()
    assert verify_main([str(out), "--loss-fell"]) == 1
    output = capsys.readouterr().out
    assert "FAILED: loss" in output
    assert "FAILED: merged, question 0: expected logits within 0.0001" in output
    assert "(limit 1.0e-04): FAILED" in output
    assert "answers of both saved forms" not in output
    assert "expected the answer" in output
    assert verify_main([str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_verified_by_its_own_measure(settings, tmp_path, dtype):
    """Merging rounds the weights; another model is still found out."""
    run(settings(merge=True, **{"model_init_kwargs.dtype": dtype}))
    out = tmp_path / "run"
    report = verify(out)
    assert report["merged"] > 1e-4
    assert report["problems"] == []
    model = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=dtype)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    model.save_pretrained(out / "merged")
    assert any("merged, question 0: expected logits" in problem for problem in verify(out)["problems"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_small_update_that_was_lost_is_found_out(settings, tiny, tmp_path, dtype, form):
    """The base in place of the trained model, whose logits are nearer to it than a few roundings of the largest."""
    slow = {"peft.learning_rate": 5e-4 if dtype == "bfloat16" else 5e-5}
    run(settings(merge=True, max_steps=2, **slow, **{"model_init_kwargs.dtype": dtype}))
    out = tmp_path / "run"
    assert verify(out)["problems"] == []
    if form == "merged":
        AutoModelForCausalLM.from_pretrained(tiny.model, dtype=dtype).save_pretrained(out / "merged")
    else:
        file = out / "adapter" / "adapter_model.safetensors"
        save_file({k: v.zero_() if "clover_S." in k else v for k, v in load_file(file).items()}, file)
    assert any(f"{form}, question " in problem for problem in verify(out)["problems"])
