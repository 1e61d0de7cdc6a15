"""The examples run, on a tiny model."""

from __future__ import annotations

import importlib.util
import json

import pytest
from transformers import AutoModelForCausalLM

from tests.support.pages import ROOT

EXAMPLES = ROOT / "examples"


def _main(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_finetune_with_trl(stand_in, capsys, monkeypatch):
    pytest.importorskip("trl", reason="needs the extra train")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    _main("finetune_with_trl")(["--model", stand_in, "--steps", "2", "--out", "adapter"])
    assert "saved and loaded: adapter" in capsys.readouterr().out


def test_prune_and_heal(stand_in, capsys):
    _main("prune_and_heal")(["--model", stand_in, "--steps", "20", "--out", "pruned"])
    shown = capsys.readouterr().out
    pruned, trained = (
        float(shown.partition(f"loss after {what}: ")[2].split()[0]) for what in ("pruning", "training")
    )
    assert trained < pruned
    whole = AutoModelForCausalLM.from_pretrained(stand_in)
    assert AutoModelForCausalLM.from_pretrained("pruned").num_parameters() < whole.num_parameters()


def test_switch_and_merge(stand_in, capsys):
    _main("switch_and_merge")(["--model", stand_in, "--out", "merged"])
    shown = capsys.readouterr().out
    assert "one adapter a row: (3, 4," in shown
    assert AutoModelForCausalLM.from_pretrained("merged").num_parameters() > 0


def test_the_notebook(stand_in, capsys):
    cells = json.loads((EXAMPLES / "inside_an_adapter.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert 'MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"' in code[0]
    namespace = {"__name__": "notebook"}
    for i, cell in enumerate(code):
        source = cell.replace("HuggingFaceTB/SmolLM2-135M-Instruct", stand_in)
        exec(compile(source, f"inside_an_adapter.ipynb, cell {i}", "exec"), namespace)
    shown = capsys.readouterr().out
    assert "equal to the base: True" in shown
    assert "U unchanged: True" in shown
    assert all(not cell.get("outputs") for cell in cells)
