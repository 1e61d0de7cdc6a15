"""Errors in options and configurations are answered without torch, with exit code 2 and a sentence on stderr."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import clover_command
from clover_peft import CloverConfig
from clover_peft.cli import checks, parsers
from clover_peft.cli.errors import reports_errors
from clover_peft.io.extras import EXTRAS, how_to_install
from clover_peft.io.hub_models import DEFAULT_MODEL, ModelSource
from clover_peft.io.static_fields import static_fields
from clover_peft.tuner import config_checks
from tests.support.tiny import build, load_script

ROOT = Path(__file__).parents[2]
ANSWER = (
    "import clover_command, json, sys\n"
    "codes = [clover_command.main(line) for line in json.loads(sys.argv[1])]\n"
    "print(json.dumps([codes, sorted({'torch', 'peft', 'transformers', 'trl'} & set(sys.modules))]))\n"
)
SFT = ["sft", "--config", "clover_full"]
WRONG = [
    (["sft", "--config", "clover_ful"], "did you mean clover_full?"),
    (["sft", "--config", "smollm2_cpu"], "did you mean models/smollm2_135m?"),
    ([*SFT, "max_step=3"], "max_step: unknown; the nearest known is max_steps"),
    ([*SFT, "lr=3"], "lr: unknown; the nearest known is learning_rate"),
    ([*SFT, "max_steps=many"], "max_steps: expected int, found 'many'"),
    ([*SFT, "rows=0"], "rows: expected at least 1, found 0"),
    ([*SFT, "do_eval=true"], "do_eval: not a setting of this job"),
    ([*SFT, "peft.rr=3"], "peft.rr: unknown; the nearest known is peft.r"),
    (
        [*SFT, "peft.lora_alpha=16"],
        "peft.lora_alpha: expected a field of CloverConfig, found one of LoraConfig; CLOVER",
    ),
    ([*SFT, "peft.xyzzy=1"], "max_condition, learning_rate"),
    (
        ["plan", "--model", "m", "lora_alpha=16"],
        "lora_alpha: expected a field of CloverConfig, found one of LoraConfig",
    ),
    ([*SFT, "peft.r=0"], "CloverConfig.r: expected a positive integer or None, found 0"),
    ([*SFT, "peft.s_matrix=triangular"], "CloverConfig.s_matrix: expected one of"),
    ([*SFT, "rows=[1"], "rows=[1: expected YAML"),
    (["sft", "--config", "models/llama2_7b"], "method: expected one of"),
    (["ablate", "--config", "smollm", "--out", "out"], "did you mean ablations/smollm2?"),
    (["ablate", "--config", "clover_full", "--out", "out"], "shipped are ablations/"),
    (["ablate", "--config", "smollm2", "--out", "out", "zzz=3"], "expected the keys base, settings"),
    (["ablate", "--config", "adaptation_probe", "--out", "out", "zzz=3"], "expected the keys model, dtype"),
    (["ablate", "--config", "smollm2"], "expected --config and --out, or --table"),
    (
        ["ablate", "--config", "adaptation_tiny", "--out", "x", "--reference", "lora_r64"],
        "--reference lora_r64: expected one of the arms ",
    ),
    (
        ["ablate", "--config", "smollm2", "--out", "x", "--reference", "lora"],
        "--reference: expected an adaptation experiment, found a grid",
    ),
    (["ablate", "--table", ".", "--mechanism"], "mechanism: expected none beside --table, which does not use it"),
    (["plan", "--model", "m", "r=0"], "CloverConfig.r: expected a positive integer or None, found 0"),
    (["plan", "--model", "m", "s_matrx=full"], "did you mean s_matrix?"),
    (["plan", "--model", "m", "r"], "r: expected key=value with a field of CloverConfig"),
    (["ablate", "--config", "smollm2", "--out", "x", "--minutes", "-3"], "--minutes -3: expected at least 0"),
    (["analyze", "--adapter", "a", "--out", "x", "--threshold", "5"], "--threshold 5: expected a cosine from 0 to 1"),
    (
        ["analyze", "--before", "a", "--after", "b", "--out", "x", "--texts", "missing.txt"],
        "--texts missing.txt: expected a file, found none",
    ),
    (["prepare-data", "docs"], "docs: expected a new or empty folder"),
    (
        ["convert", "m", "--slice", "0.5", "--multiple", "0", "--calibration", "README.md", "--out", "x"],
        "--multiple 0: expected at least 1",
    ),
    (["evaluate", "--out", "out"], "--data is needed without --harness: expected a folder"),
    (["evaluate", "--out", "out", "--rows", "0"], "--rows: expected at least 1, found 0"),
    (["analyze", "--out", "out"], "expected --adapter, or --before and --after"),
    (["prune", "m", "--ratio", "half", "--out", "out"], "--ratio half: expected a figure such as 0.5"),
    (["prune", "m", "--ratio", "0.5", "--rows", "3", "--out", "out"], "--rows: expected --calibration with it"),
    (["prune", "m", "--ratio", "0.5", "--out", "docs"], "--out docs: expected a new or empty folder"),
    (["spectra", "m", "--threshold", "xy=1"], "--threshold xy=1: expected a figure such as 0.5"),
    (["prune", "m", "--ratio", "0.5", "--calibration", "no.txt", "--out", "out"], "no.txt: expected a .txt or .jsonl"),
    (["spectra", "m", "--calibration", "docs"], "docs: expected a .txt or .jsonl file, with .gz or without"),
    (["export", "docs", "out"], "docs: expected a folder with an adapter_config.json, found none in it"),
    (["export", "no-such", "out"], "no-such: expected the folder of an adapter, found none, and the hub cannot be"),
    (
        ["export", "./no-such", "out"],
        "./no-such: expected the folder of an adapter, found none, and the hub has no such",
    ),
    (["prune", "nomodel", "--ratio", "25", "--out", "x"], "--ratio 25: expected a share of at least 0 and below 1"),
    (["prune", "m", "--ratio", "qk=0.5,vo=1", "--out", "x"], "--ratio qk=0.5,vo=1: expected a share"),
    (["prune", "m", "--energy", "90", "--out", "x"], "--energy 90: expected a share"),
    (["prune", "m", "--multiple", "0", "--ratio", "0.5", "--out", "x"], "--multiple 0: expected at least 1"),
    (
        ["prune", "nomodel", "--ratio", "0.25", "--no-pictures", "--out", "x"],
        "model=nomodel: expected a folder or a mo",
    ),
    (
        ["prune", "docs", "--ratio", "0.25", "--no-pictures", "--out", "x"],
        "docs: expected a folder with a config.json",
    ),
    (["spectra", "nomodel"], "model=nomodel: expected a folder or a model on the hub, found no such folder"),
    (["evaluate", "--out", "x", "--data", "d", "--adapter", "docs"], "--adapter docs: expected a folder with an ad"),
    (["analyze", "--out", "x", "--no-pictures", "--adapter", "docs"], "--adapter docs: expected a folder with an ad"),
    ([*SFT, "model=nomodel"], "model=nomodel: expected a folder or a model on the hub, found no such folder"),
    ([*SFT, "teacher=docs"], "teacher=docs: expected a folder with a config.json, found none in it"),
    ([*SFT, "data=/nonexist.jsonl"], "data=/nonexist.jsonl: expected a folder, a .jsonl[.gz] or .txt[.gz] file or"),
    ([*SFT, "data=../nonexist"], "found no such path; check the path, or leave data out for commonsense-170k"),
    ([*SFT, "data=README.md"], "data=README.md: expected a .jsonl or .txt file, with .gz or without, found README.md"),
    ([*SFT, "data=docs"], "data=docs: expected one train*.jsonl or train*.jsonl.gz in the folder, found none"),
    (["export", "adapter", "docs"], "docs: expected a new or empty folder"),
]


def test_errors_are_answered_without_torch():
    lines = json.dumps([line for line, _ in WRONG])
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ANSWER, lines]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=offline)
    assert done.returncode == 0, done.stderr
    codes, imported = json.loads(done.stdout.splitlines()[-1])
    assert imported == []
    assert codes == [2] * len(WRONG)
    said = [line for line in done.stderr.splitlines() if not line.startswith("hub: ")]
    assert len(said) == len(WRONG)
    for sentence, (_, expected) in zip(said, WRONG, strict=True):
        assert sentence.startswith("error: ")
        assert expected in sentence
        assert "folded" not in sentence


@pytest.mark.parametrize(
    "line",
    [
        ["prune", "m", "--ratio", "0.25", "--out", "x"],
        ["spectra", "m", "--out", "x"],
        ["analyze", "--before", "m", "--after", "n", "--out", "x"],
        ["convert", "m", "--slice", "0.25", "--calibration", "hub/text", "--out", "x"],
    ],
    ids=lambda line: line[0],
)
def test_missing_matplotlib_is_found_before_the_model_is_looked_for(line, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    assert clover_command.main(line) == 2
    assert f"pictures: expected matplotlib, found none; pass --no-pictures, or {how_to_install('plots')}" in (
        capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="pictures"):  # by the checks, which come before torch
        checks.CHECKS[line[0]](parsers.PARSERS[line[0]](line[1:]))


def test_names_of_the_other_kind_are_not_offered():
    with pytest.raises(ValueError, match="shipped are clover_contrast, clover_diagonal, ") as error:
        checks.sft(argparse.Namespace(config=["zzz"], overrides=[]))
    assert "ablations/" not in str(error.value)
    assert "accelerate/" not in str(error.value)
    with pytest.raises(ValueError, match="shipped are ablations/") as error:
        checks.ablate(parsers.ablate(["--config", "zzz", "--out", "out"]))
    assert "clover_full" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("trl.trainer.sft_config", "SFTConfig"),
        ("peft.tuners.lora.config", "LoraConfig"),
        ("clover_peft.tuner.config", "CloverConfig"),
        ("clover_peft.experiments.training.job_arguments", "JobArguments"),
        ("clover_peft.experiments.ablation.grid", "Grid"),
        ("clover_peft.experiments.adaptation.plan", "Experiment"),
    ],
)
def test_fields_read_from_the_source_are_those_of_the_class(module, name):
    kind = getattr(importlib.import_module(module), name)
    assert list(static_fields(module, name)) == [field.name for field in dataclasses.fields(kind) if field.init]


def test_every_switch_of_the_config_is_checked():
    switches = {field.name for field in dataclasses.fields(CloverConfig) if field.type in ("bool", bool)}
    assert set(config_checks._SWITCHES) == switches


def test_a_source_that_cannot_be_read_leaves_the_names_to_the_job(monkeypatch):
    def unreadable(module, name):
        raise LookupError(module)

    monkeypatch.setattr(checks, "static_fields", unreadable)
    checks.sft(parsers.sft(["--config", "clover_full", "max_step=3"]))
    assert checks.adapter_settings(["rr=3"]) == {"rr": 3}


@pytest.mark.parametrize(
    "line",
    [
        ["--model", "m", "--match", "q_proj", "k_proj", "r=4", "s_matrix=diagonal"],
        ["--model", "m", "r=4", "--match", "q_proj", "k_proj", "s_matrix=diagonal"],
        ["r=4", "s_matrix=diagonal", "--match", "q_proj", "k_proj", "--model", "m"],
        ["--config-name", "m", "--match", "q_proj", "k_proj", "--json", "r=4", "s_matrix=diagonal"],
    ],
)
def test_match_leaves_the_overrides_alone(line):
    given = parsers.plan(line)
    assert (given.model, given.match) == ("m", ["q_proj", "k_proj"])
    assert given.overrides == ["r=4", "s_matrix=diagonal"]


def test_match_needs_a_module(capsys):
    with pytest.raises(SystemExit) as stopped:
        parsers.plan(["--model", "m", "--match", "r=4"])
    assert stopped.value.code == 2
    assert "argument --match: expected at least one module" in capsys.readouterr().err


def test_plan_finds_the_model_as_sft_does(tmp_path, monkeypatch, capsys):
    script = load_script("plan")
    build("llama").config.save_pretrained(tmp_path)
    found = ModelSource(str(tmp_path), DEFAULT_MODEL, "apache-2.0", "PyPI wheel")
    monkeypatch.setattr("clover_peft.cli.plan.find_model", lambda name: {DEFAULT_MODEL: found}[name])
    assert script.main(["--model", DEFAULT_MODEL]) == 0
    assert capsys.readouterr().out.startswith("LlamaForCausalLM: ")


def test_plan_says_what_to_pass_without_the_hub(monkeypatch, capsys):
    monkeypatch.setattr("clover_peft.io.hub_models.hub_reachable", lambda: False)
    assert clover_command.main(["plan", "--model", "someone/some-model"]) == 2
    said = capsys.readouterr().err
    assert "error: model=someone/some-model: expected a folder or a model on the hub" in said
    assert f"pass the path of a model folder, or {DEFAULT_MODEL}" in said


@pytest.mark.parametrize("package", ["gguf", "bitsandbytes"])
def test_an_extra_that_a_library_asks_for_is_named(package, capsys):
    @reports_errors()
    def run(given):
        raise ImportError(f"Please install torch and {package}>=0.10.0 to load this checkpoint.")

    assert run(argparse.Namespace()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: Please install torch and ")
    assert how_to_install(EXTRAS[package]) in said


@pytest.mark.parametrize(
    "line",
    [
        "sft --config ~/a.yaml",
        "prune ~/m --ratio 0.5 --calibration ~/t.txt --out=~/p",
        "spectra ~/m --calibration=~/t.txt --out ~/s",
        "convert ~/m --mla 0.5 --calibration ~/t.txt --out=~/c",
        "export ~/a ~/o --base ~/m",
        "plan --model=~/m/config.json",
        "plan --config-name ~/m",
        "evaluate --model ~/m --adapter=~/a --data ~/d --harness-tasks ~/h --out=~/e",
        "ablate --config ~/g.yaml --out=~/o --records ~/r --pictures ~/p",
        "ablate --table=~/r",
        "analyze --adapter ~/a --adapter=~/b --model ~/m --texts ~/t.txt --out ~/o",
        "analyze --before ~/a --after=~/b --out ~/o",
        "prepare-data ~/d --compare=~/c",
        "run ~/train.py",
    ],
)
def test_a_tilde_is_the_home_folder_where_the_shell_left_it(line, tmp_path, monkeypatch):
    """As in quotes, behind `=`, and in programs that start no shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    name, *arguments = line.split()
    given = vars(parsers.PARSERS[name](arguments))
    assert "~" not in str(given)
    assert str(given).count(str(tmp_path)) == line.count("~")


def test_adapters_are_labelled_by_their_own_folder_or_by_the_run_they_belong_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [Path("runs/first/adapter"), Path("runs/second/checkpoint-40"), Path("adapters/clover"), Path("lora")]
    given = argparse.Namespace(label=None, adapter=folders)
    assert checks.labels(given) == ["first", "second", "clover", "lora"]
    (tmp_path / "adapter").mkdir()
    monkeypatch.chdir(tmp_path / "adapter")
    assert checks.labels(argparse.Namespace(label=None, adapter=[Path()])) == [tmp_path.name]
