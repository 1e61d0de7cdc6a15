"""The settings of the training job: files, overrides, errors, command line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from trl import SFTConfig

from clover_peft.cli import parsers
from clover_peft.experiments.settings import read
from clover_peft.experiments.training.arguments import JobArguments, parse
from tests.support.tiny import load_script

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
METHODS = {"clover_contrast", "clover_diagonal", "clover_full", "dora", "full", "hira", "lora", "pissa"}


# --- settings -------------------------------------------------------------------------------------


def test_configs_differ_in_the_peft_block_alone():
    """And in the text that `clover_contrast` starts from."""
    assert {path.stem for path in CONFIGS} == METHODS
    found = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS}
    assert {key: found["clover_contrast"].pop(key) for key in ("own_text_rows", "contrast_rows")}
    assert all(values.pop("peft") for values in found.values())
    assert all(values == found["lora"] for values in found.values())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_step=3", "max_step: unknown; the nearest known is max_steps"),
        ("peft.rr=3", r"peft\.rr: unknown; the nearest known is peft\.r"),
        ("peft.peft_type=LORRA", r"peft_type=LORRA: unknown; the nearest known is peft\.peft_type=LORA"),
        ("max_steps=many", "max_steps: expected int, found 'many'"),
        ("learning_rate=null", "learning_rate: expected float, found None"),
        ("rows=2.5", "rows: expected int or null, found 2.5"),
        ("resume_from_checkpoint=here", "resume_from_checkpoint: not a setting of this job"),
        ("max_steps", "expected key=value"),
        ("rows=[1", "expected YAML"),
        ("peft=7", "peft: expected a block"),
        ("peft={r: 3}", r"expected peft_type beside \['r'\]"),
        ("lr=1e-3", "lr: unknown; the nearest known is learning_rate"),
        ("peft.lr=1e-3", r"peft\.lr: unknown; the nearest known is peft\.learning_rate"),
        ("batch_size=8", "batch_size: unknown; the nearest known is per_device_train_batch_size"),
        ("zzz=8", r"zzz: unknown; expected one of model, data, .*merge, or a field of trl\.SFTConfig"),
        ("peft.zzz=8", r"peft\.zzz: unknown; expected one of .*target_modules"),
        ("peft.peft_type=zzz", "peft_type=ZZZ: unknown; expected one of .*LORA"),
        ("rows=-5", "rows: expected at least 1, found -5; leave it out to train on all"),
        ("rows=0", "rows: expected at least 1, found 0"),
        ("held_out_rows=-1", "held_out_rows: expected at least 0, found -1"),
        ("calibration_rows=-1", "calibration_rows: expected at least 0, found -1"),
        ("own_text_rows=-1", "own_text_rows: expected at least 0, found -1"),
        ("balance_updates=-1", "balance_updates: expected at least 0, found -1"),
        ("questions=-1", "questions: expected at least 0, found -1"),
        ("answer_tokens=0", "answer_tokens: expected at least 1, found 0"),
        ("peft.learning_rate_factors=3", "learning_rate_factors: expected a factor by part of a name, found 3"),
        ("peft.learning_rate_factors={'[': 3}", r"learning_rate_factors: '\[': expected a regular expression, found"),
        ("peft.learning_rate_factors={3: 3}", "learning_rate_factors: 3: expected a regular expression, found"),
        ("peft.learning_rate_factors={v: .nan}", "factors: v: expected a finite factor of at least 0, found nan"),
        ("peft.learning_rate_factors={v: .inf}", "factors: v: expected a finite factor of at least 0, found inf"),
        ("peft.learning_rate_factors={v: -1}", "factors: v: expected a finite factor of at least 0, found -1"),
        ("peft.inference_mode=true", r"peft\.inference_mode: expected false, found true, with which nothing trains"),
        ("peft.learning_rate=null", r"learning_rate: expected one .*s_matrix: diagonal.*configs/"),
    ],
)
def test_settings_errors_name_the_key(override, message):
    with pytest.raises(ValueError, match=message):
        parse(ROOT / "configs" / "lora.yaml", [override])


def test_config_file_errors(tmp_path):
    with pytest.raises(ValueError, match="expected a YAML file, found none"):
        parse(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="expected keys and values, found list"):
        parse(tmp_path / "list.yaml")
    with pytest.raises(ValueError, match="nothing to merge"):
        parse(ROOT / "configs" / "full.yaml", ["merge=true"])


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
def test_methods_that_cannot_merge_are_refused_before_they_train(tmp_path, kind):
    block = {"peft_type": kind, "num_virtual_tokens": 4}
    (tmp_path / "prompt.yaml").write_text(yaml.safe_dump({"learning_rate": 1e-3, "peft": block}))
    assert parse(tmp_path / "prompt.yaml").peft.peft_type == kind
    with pytest.raises(ValueError, match=f"merge=true: expected a method that can be merged, found {kind}; leave it"):
        parse(tmp_path / "prompt.yaml", ["merge=true"])


def test_learning_rate_belongs_to_the_method_unless_given():
    config = ROOT / "configs" / "lora.yaml"
    in_file = float(yaml.safe_load(config.read_text())["peft"]["learning_rate"])
    assert parse(config).sft.learning_rate == in_file
    assert parse(config, ["peft.learning_rate=2e-3"]).sft.learning_rate == 2e-3
    assert parse(config, ["learning_rate=5e-3"]).sft.learning_rate == 5e-3


@pytest.mark.parametrize(
    ("in_files", "overrides", "expected"),
    [
        ({"learning_rate": 3e-3}, [], 3e-3),
        ({}, ["learning_rate=5e-3"], 5e-3),
        ({"learning_rate": 3e-3}, ["peft.learning_rate=5e-3"], 5e-3),
        ({"learning_rate": 3e-3}, ["peft.learning_rate=4e-3", "learning_rate=5e-3"], 5e-3),
        ({}, ["--learning_rate=4e-3", "--peft.learning_rate=5e-3"], 5e-3),
        ({"learning_rate": 3e-3}, ["peft.learning_rate=null"], 3e-3),
    ],
)
def test_settings_hold_one_learning_rate(in_files, overrides, expected, tmp_path):
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(in_files))
    settings = parse([ROOT / "configs" / "lora.yaml", tmp_path / "more.yaml"], overrides)
    assert settings.sft.learning_rate == settings.values["learning_rate"] == expected
    assert "learning_rate" not in settings.values["peft"]


def test_the_rate_of_a_chosen_method_counts_on_the_command_line(tmp_path):
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"learning_rate": 1e-3, "methods": {"a": {"peft_type": "LORA"}}}))
    settings = parse(tmp_path / "m.yaml", ["method=a", "methods.a.learning_rate=5e-3"])
    assert settings.sft.learning_rate == settings.values["learning_rate"] == 5e-3


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], False),
        (["gradient_checkpointing=true"], True),
        (["gradient_checkpointing_kwargs={use_reentrant: false}"], False),
    ],
)
def test_checkpointing_is_passed_on_without_a_deprecated_name(overrides, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sft = parse(ROOT / "configs" / "lora.yaml", overrides).sft
    assert sft.gradient_checkpointing is expected
    assert getattr(sft, "activation_checkpointing", expected) is expected
    assert bool(sft.gradient_checkpointing_kwargs) is ("kwargs" in "".join(overrides))


def test_checkpointing_stays_trl_s_default_and_has_a_new_name(tmp_path):
    (tmp_path / "plain.yaml").write_text("learning_rate: 1e-3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse(tmp_path / "plain.yaml").sft.gradient_checkpointing is True
    new = "activation_checkpointing"
    if new in {field.name for field in dataclasses.fields(SFTConfig)}:
        assert parse(ROOT / "configs" / "lora.yaml", [f"{new}=true"]).sft.gradient_checkpointing is True


def test_overrides_reach_blocks_and_null_replaces_a_default():
    settings = parse(ROOT / "configs" / "lora.yaml", ["peft.r=8", "max_length=null", "peft.target_modules=[q_proj]"])
    assert settings.peft.r == 8
    assert settings.peft.target_modules == {"q_proj"}
    assert settings.sft.max_length is None
    assert settings.sft.output_dir == "runs/lora"
    assert parse(ROOT / "configs" / "lora.yaml", ["peft=null", "learning_rate=1e-5"]).peft is None
    assert parse(ROOT / "configs" / "lora.yaml", ["peft.peft_type=lora"]).peft.peft_type == "LORA"
    assert parse(ROOT / "configs" / "lora.yaml", ["save_strategy=no"]).sft.save_strategy == "no"


@pytest.mark.parametrize(
    ("there", "overrides", "bf16"),
    [
        (False, ["fp16=false"], False),
        (False, ["bf16=null"], False),
        (True, ["use_cpu=true"], False),
        (False, ["use_cpu=true"], False),
    ],
)
def test_a_cpu_trains_without_bf16_unless_told(there, overrides, bf16, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    sft = parse(ROOT / "configs" / "clover_full.yaml", overrides).sft
    assert (sft.bf16, sft.fp16, sft.dataloader_pin_memory) == (bf16, False, False)


# --- the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("clover_full", {"peft.optimizer": "sgd"}, "peft.optimizer: expected muon, found 'sgd'"),
        ("clover_full", {"peft.optimizer": "muon", "optim": "adafactor"}, "expected no optim beside it"),
        ("lora", {"calibration_rows": 3}, "calibration_rows: expected peft_type: CLOVER"),
        ("full", {"calibration_rows": 3}, "calibration_rows: expected peft_type: CLOVER"),
        ("lora", {"balance_updates": 3}, "balance_updates: expected peft_type: CLOVER, found LORA; leave"),
        (
            "clover_full",
            {"contrast_rows": 3},
            "contrast_rows: expected a low-rank part, found none; set peft.",
        ),
        ("lora", {"contrast_rows": 3}, "contrast_rows: expected peft_type: CLOVER, found LORA"),
        ("full", {"own_text_rows": 3}, "own_text_rows: expected peft_type: CLOVER, found full fine-tuning"),
        ("clover_full", {"own_text_rows": 3, "calibration_rows": 4}, "expected no calibration_rows beside it"),
    ],
)
def test_ways_to_train_that_do_not_fit_are_refused(settings, config, options, message):
    with pytest.raises(ValueError, match=message):
        settings(config, **options)


def test_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    main = load_script("sft").main
    command = ["sft.py", "--config", str(ROOT / "configs" / "clover_full.yaml"), f"model={tiny.model}", "--rows=20"]
    command += ["--data", str(tiny.data), "held_out_rows=4", "--max_steps=1", f"output_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    assert json.loads((tmp_path / "run" / "record.json").read_text())["settings"]["rows"] == 20
    assert main() == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: output_dir=")
    monkeypatch.setattr(sys, "argv", [*command[:3], "--max_steps", "1"])
    assert main() == 2
    assert "--max_steps: expected key=value, as in max_steps=100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("max_steps=5 --max_steps=1", {"max_steps": 1}),
        ("--max_steps=1 max_steps=5 --max_steps=3", {"max_steps": 3}),
        ("--data A data=B", {"data": "B"}),
        ("data=B --data A", {"data": "A"}),
        ("data=B --data=A", {"data": "A"}),
        ("--data=A --rows=3 data=B rows=4", {"data": "B", "rows": 4}),
    ],
)
def test_of_two_overrides_the_last_one_on_the_command_line_counts(line, expected):
    given = parsers.sft(["--config", "clover_full", *line.split()])
    values = read(given.config, given.overrides).values
    assert {key: values[key] for key in expected} == expected


def test_help_lists_the_keys_without_importing_torch():
    command = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / "sft.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for key in dataclasses.fields(JobArguments):
        assert f"  {key.name}" in done.stdout
        assert key.metadata["help"].split(";")[0].removesuffix(".") in done.stdout
    assert "model_init_kwargs.dtype=bfloat16" in done.stdout
    assert " torch" not in done.stderr
