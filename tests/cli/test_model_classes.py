"""Every command loads a model in the class that it was saved in, whatever the kind of model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from torch import nn

from clover_peft import CloverConfig
from clover_peft.experiments.commonsense.tasks import TASKS, Example, render
from tests.support.tiny import build, inputs, load_script, perturb, relative, seq_2_seq_by_peft

pytest.importorskip("trl", reason="finds models as training does: pip install clover-peft[train]")

plan_script, export_script, analyze_script = load_script("plan"), load_script("export"), load_script("analyze")
prune_script, spectra_script = load_script("prune"), load_script("spectra")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*weights alone.*")]


def _classifier() -> nn.Module:
    torch.manual_seed(0)
    config = build("bert").config
    return hf.BertForSequenceClassification(hf.BertConfig(**{**config.to_dict(), "num_labels": 3})).eval()


# Family of `tiny` -> the model, and the task that its adapter names.
MODELS = {
    "whisper": (lambda: build("whisper"), "SEQ_2_SEQ_LM"),
    "bert": (_classifier, "SEQ_CLS"),
    "vit": (lambda: build("vit"), None),
    "t5": (lambda: build("t5"), "SEQ_2_SEQ_LM"),
    "llava": (lambda: build("llava"), "CAUSAL_LM"),
    "llama": (lambda: build("llama"), "CAUSAL_LM"),
}


@torch.no_grad()
def run(model: nn.Module, family: str) -> torch.Tensor:
    return model.eval()(**inputs(family)).logits


def save(folder: Path, family: str, task: str | None) -> tuple[nn.Module, torch.Tensor, int]:
    """Saves a base and an adapter; the base, the adapter's logits, and how many parameters it trains."""
    base = MODELS[family][0]()
    base.save_pretrained(folder / "base")
    model = get_peft_model(MODELS[family][0](), CloverConfig(task_type=task))
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    perturb(model)
    model.save_pretrained(folder / "adapter")
    return base, run(model.get_base_model(), family), trained


ASKED = [
    pytest.param(family, with_task, marks=seq_2_seq_by_peft if with_task and task == "SEQ_2_SEQ_LM" else ())
    for family, (_, task) in MODELS.items()
    for with_task in (True, False)
]


@pytest.mark.parametrize(("family", "with_task"), ASKED)
def test_commands_use_the_model_s_own_class(family, with_task, tmp_path, capsys):
    base, expected, trained = save(tmp_path, family, MODELS[family][1] if with_task else None)
    assert plan_script.main(["--config-name", str(tmp_path / "base"), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["model_class"] == type(base).__name__
    assert planned["parameters"] == {
        "trainable": trained,
        "S": trained,
        "base": sum(p.numel() for p in base.parameters()),
    }
    assert export_script.main([str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    merged = type(base).from_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*token*"))  # transformers would make one up for T5
    assert merged.config.architectures == [type(base).__name__]
    assert relative(run(merged, family), expected) < 1e-4
    assert relative(run(base, family), expected) > 1e-3
    arguments = ["--adapter", str(tmp_path / "adapter"), "--no-pictures", "--out", str(tmp_path / "analysis")]
    assert analyze_script.main(arguments) == 0
    changed = json.loads((tmp_path / "analysis" / "analysis.json").read_text())["modules"][tmp_path.name]
    assert sum(module["update"]["rank"] > 0 for module in changed) == len(changed) > 0


@pytest.mark.parametrize("family", ["whisper", "bert", "vit", "t5"])
def test_pruning_uses_the_model_s_own_class(family, tmp_path, capsys):
    base = MODELS[family][0]()
    base.save_pretrained(tmp_path / "base")
    arguments = [str(tmp_path / "base"), "--ratio", "0.25", "--no-pictures", "--out", str(tmp_path / "out")]
    assert prune_script.main(arguments) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [type(base).__name__]
    assert spectra_script.main([str(tmp_path / "base")]) == 0


def _without_class(folder: Path) -> str:
    build("llama").save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["architectures"]
    path.write_text(json.dumps(config))
    return str(folder)


def _commands(folder: Path, base: str) -> dict[str, tuple]:
    """Command -> its module and arguments, with a model or an adapter that names no class."""
    adapted = get_peft_model(build("llama"), CloverConfig())
    adapted.peft_config["default"].base_model_name_or_path = base
    perturb(adapted)
    adapted.peft_config["default"].auto_mapping = None
    adapted.save_pretrained(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": None}))
    adapter = str(folder / "adapter")
    return {
        "export": (export_script, [adapter, str(folder / "out")]),
        "analyze": (analyze_script, ["--adapter", adapter, "--no-pictures", "--out", str(folder / "out")]),
        "prune": (prune_script, [base, "--ratio", "0.5", "--no-pictures", "--out", str(folder / "out")]),
        "spectra": (spectra_script, [base]),
    }


@pytest.mark.filterwarnings("ignore:.*not pruned.*")
@pytest.mark.parametrize("name", ["export", "analyze", "prune", "spectra"])
def test_a_model_without_a_class_needs_one_named(name, tmp_path, capsys):
    script, arguments = _commands(tmp_path, _without_class(tmp_path / "base"))[name]
    assert script.main(arguments) != 0
    message = capsys.readouterr().err
    assert "expected a class in `architectures` of config.json, found none" in message
    assert "pass --model-class" in message
    for wrong in ("NoSuchModel", "BertModel"):
        assert script.main([*arguments, "--model-class", wrong]) != 0
        assert f"--model-class {wrong}: expected" in capsys.readouterr().err
    assert script.main([*arguments, "--model-class", "LlamaForCausalLM"]) == 0


def test_a_configuration_made_by_hand_is_counted_as_a_language_model_or_refused(tmp_path, capsys):
    for family, code in (("llama", 0), ("whisper", 2), ("vit", 2)):
        build(family).config.save_pretrained(tmp_path / family)
        assert plan_script.main(["--config-name", str(tmp_path / family)]) == code
    shown = capsys.readouterr()
    assert shown.out.startswith("LlamaForCausalLM: ")
    assert shown.err.count("expected a class in `architectures` of config.json, found none") == 2


def test_a_decoder_alone_is_counted_where_it_is_named(tmp_path, capsys):
    build("whisper").save_pretrained(tmp_path)
    arguments = ["--config-name", str(tmp_path), "--model-class", "WhisperForCausalLM"]
    assert plan_script.main(arguments) == 0
    assert "WhisperForCausalLM" in capsys.readouterr().out


def test_training_and_evaluation_refuse_what_is_no_language_model(tmp_path, capsys):
    save(tmp_path, "whisper", None)
    evaluate, sft = load_script("evaluate"), load_script("sft")
    (tmp_path / "test").mkdir()
    row = render(TASKS["boolq"], Example("is it?", (), 1))
    (tmp_path / "test" / "boolq.jsonl").write_text(json.dumps(row))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    base, out = str(tmp_path / "base"), str(tmp_path / "run")
    asked = ["--model", base, "--data", str(tmp_path), "--tasks", "boolq", "--out", out]
    train = ["--config", "clover_full", f"model={base}", f"data={tmp_path}/rows.jsonl", f"output_dir={out}"]
    for script, arguments in ((evaluate, asked), (sft, [*train, "rows=null", "held_out_rows=0"])):
        assert script.main(arguments) == 2
        message = capsys.readouterr().err
        assert "expected a causal language model, found WhisperForConditionalGeneration" in message
