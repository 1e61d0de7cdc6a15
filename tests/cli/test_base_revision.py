"""Adapters of a revision of their base: commands load that revision, from a hub's cache. No network."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.tiny import load_script, perturb

pytest.importorskip("trl", reason="borrows the tokenizer of the trainers' tests: pip install clover-peft[train]")
from clover_peft.io import hub_models, locate
from tests.support.tiny_chat import save_chat_model

export_script, analyze_script, evaluate_script = (load_script(name) for name in ("export", "analyze", "evaluate"))
KEY = "model.layers.0.self_attn.o_proj.weight"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with `some/base`, whose revision v2 has twice the weights of main; an adapter of v2 beside it."""
    folder = tmp_path / "hub" / "models--some--base"
    (folder / "refs").mkdir(parents=True)
    for name, commit, scale in (("main", "0" * 40, 1), ("v2", "1" * 40, 2)):
        (folder / "refs" / name).write_text(commit)
        save_chat_model(folder / "snapshots" / commit)
        model = AutoModelForCausalLM.from_pretrained(folder / "snapshots" / commit)
        with torch.no_grad():
            model.get_parameter(KEY).mul_(scale)
        model.save_pretrained(folder / "snapshots" / commit)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["o_proj"])
    adapted = get_peft_model(model, config)
    perturb(adapted)
    adapted.peft_config["default"].base_model_name_or_path = "some/base"
    adapted.peft_config["default"].revision = "v2"
    adapted.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for module in (hub_models, locate):
        monkeypatch.setattr(module, "hub_reachable", lambda: False)
    return folder / "snapshots"


def _merged(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return model.merge_and_unload().get_parameter(KEY)


@pytest.mark.parametrize(("base", "commit"), [(None, "1"), ("some/base", "0")])
def test_an_export_is_of_the_revision_that_the_adapter_names(cached, tmp_path, base, commit):
    report = export_script.export(str(tmp_path / "adapter"), tmp_path / "out", base)
    assert report["changed"] == []
    expected = _merged(cached / (commit * 40), tmp_path / "adapter")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[KEY], expected)


@pytest.mark.parametrize(("more", "scale"), [([], 2), (["--model", "some/base"], 1)])
def test_an_analysis_is_of_the_revision_that_the_adapter_names(cached, tmp_path, more, scale):
    (tmp_path / "texts.txt").write_text("a text\n")
    command = ["--adapter", str(tmp_path / "adapter"), "--texts", str(tmp_path / "texts.txt"), "--no-pictures"]
    assert analyze_script.main([*command, *more, "--out", str(tmp_path / "out")]) == 0
    [modules] = json.loads((tmp_path / "out" / "analysis.json").read_text())["modules"].values()
    main = torch.linalg.svdvals(load_file(cached / ("0" * 40) / "model.safetensors")[KEY])[0]
    assert modules[0]["before"]["singular_values"][0] == pytest.approx(scale * float(main), rel=1e-4)


@pytest.mark.parametrize(("more", "expected"), [([], {"revision": "v2"}), (["--model", "some/base"], {})])
def test_an_evaluation_is_of_the_revision_that_the_adapter_names(cached, tmp_path, monkeypatch, more, expected):
    seen = []
    monkeypatch.setattr(evaluate_script, "load_trained", lambda *args, **kwargs: seen.append(kwargs) or 1 / 0)
    monkeypatch.setattr(evaluate_script.evaluation, "read_questions", lambda *args: [])
    command = ["--adapter", str(tmp_path / "adapter"), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(ZeroDivisionError):
        evaluate_script.main([*command, *more])
    assert seen == [expected]
