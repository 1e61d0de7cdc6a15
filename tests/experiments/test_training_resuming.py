"""A training job that was killed goes on as if it had not been."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from clover_peft.experiments.training import resuming
from clover_peft.experiments.training.run import run
from tests.support.tiny_chat import rows, write_jsonl

ROOT = Path(__file__).parents[2]


class Kill(TrainerCallback):
    """Ends the run at a step as a kill would: nothing is saved after it."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["clover_full", "pissa", "full"])
def test_a_killed_run_resumes_with_the_same_losses(settings, tmp_path, capsys, method):
    options = {"config": method, "max_steps": 8, "save_steps": 2, "peft.learning_rate": 1e-2}
    whole = run(settings(out="whole", **options))
    with pytest.raises(KeyboardInterrupt):
        run(settings(out="killed", **options), callbacks=[Kill(5)])
    # checkpoints that the kill cut short are passed over
    out = tmp_path / "killed"
    weights = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    cut = [weights, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    for step, name in enumerate(cut, start=6):
        shutil.copytree(out / "checkpoint-4", out / f"checkpoint-{step}")
        file = out / f"checkpoint-{step}" / name
        file.write_bytes(file.read_bytes()[:-40])
    (out / "checkpoint-11").mkdir()
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-old")
    with pytest.raises(ValueError, match="resume=true"):
        run(settings(out="killed", **options))
    with pytest.raises(ValueError, match="max_steps: expected 8 as in the run to resume, found 9"):
        run(settings(out="killed", **{**options, "max_steps": 9, "resume": True}))
    given = (out / "settings.json").read_text()
    (out / "settings.json").write_text(given[:40])
    with pytest.raises(ValueError, match=r"settings\.json: .* cut short .*; delete it"):
        run(settings(out="killed", resume=True, **options))
    (out / "settings.json").write_text(given)
    resumed = run(settings(out="killed", resume=True, **options))
    said = capsys.readouterr().out
    for step, name in enumerate([*cut, "trainer_state.json"], start=6):
        assert f"checkpoint-{step} is passed over: {name} is missing or was cut short" in said
    assert (out / "settings.json").read_text() == given
    assert resumed["resumed_from_step"] == 4
    assert whole["resumed_from_step"] is None
    tokens = [record["tokens_per_second"] * record["seconds"]["train"] for record in (whole, resumed)]
    assert tokens[0] == pytest.approx(tokens[1], rel=1e-3)
    assert [entry["loss"] for entry in resumed["loss"]["log"]] == [entry["loss"] for entry in whole["loss"]["log"]]
    assert resumed["answers"] == whole["answers"]
    with pytest.raises(ValueError, match="found a finished one"):
        run(settings(out="killed", resume=True, **options))


@pytest.mark.parametrize("form", ["learning_rate", "peft.learning_rate"])
def test_a_run_resumes_with_its_rate_in_the_other_form(settings, tmp_path, form, capsys):
    other = {"learning_rate": "peft.learning_rate", "peft.learning_rate": "learning_rate"}[form]
    options = {"questions": 0, "held_out_rows": 0, "save_strategy": "no"}
    with pytest.raises(KeyboardInterrupt):
        run(settings(**options, **{form: 1e-3}), callbacks=[Kill(1)])
    assert "learning rate: 0.001\n" in capsys.readouterr().out
    file = tmp_path / "run" / "settings.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "peft": {**saved["peft"], "learning_rate": 2e-3}}))  # an earlier version's
    with pytest.raises(ValueError, match=r"^learning_rate: expected 0\.001 as in the run to resume, found 0\.003"):
        run(settings(resume=True, **options, **{other: 3e-3}))
    record = run(settings(resume=True, **options, **{other: 1e-3}))
    assert record["settings"]["learning_rate"] == record["training"]["learning_rate"] == 1e-3
    assert "learning_rate" not in record["settings"]["peft"]


class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.3)


@pytest.mark.parametrize("earlier", ["counted", "logged only"])
def test_training_time_is_that_of_all_legs(settings, tmp_path, earlier):
    options = {"max_steps": 6, "save_steps": 2, "questions": 0, "held_out_rows": 0}
    began = time.perf_counter()
    for kill, resume in ((3, False), (5, True)):
        with pytest.raises(KeyboardInterrupt):
            run(settings(resume=resume, **options), callbacks=[Slow(), Kill(kill)])
        if earlier == "logged only" and not resume:  # a checkpoint of a version that did not count
            file = tmp_path / "run" / "checkpoint-2" / "trainer_state.json"
            state = json.loads(file.read_text())
            state["log_history"] = [entry for entry in state["log_history"] if "loss" in entry]
            file.write_text(json.dumps(state))
    record = run(settings(resume=True, **options), callbacks=[Slow()])
    assert record["resumed_from_step"] == 4
    assert 6 * 0.3 <= record["seconds"]["train"] < time.perf_counter() - began


KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from clover_peft.experiments.training.arguments import parse
from clover_peft.experiments.training import resuming
from clover_peft.experiments.training.run import run

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 10:
            os.kill(os.getpid(), signal.SIGKILL)

run(parse(sys.argv[1], sys.argv[2:]), callbacks=[Kill()])
"""
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4}


@pytest.mark.parametrize(
    "options",
    [
        {"peft.optimizer": "muon"},
        {"calibration_rows": 20},
        {"own_text_rows": 4},
        {"contrast_rows": 4, "peft.low_rank": 2},
        {"own_text_rows": 4, "contrast_rows": 6, "peft.low_rank": 2},
        {"balance_updates": 3},
        {"peft.save_bases": "folded", **BEST},
    ],
    ids=[
        "muon",
        "bases from activations",
        "bases from own text",
        "contrast",
        "both",
        "balanced updates",
        "saved folded",
    ],
)
def test_other_ways_to_train_resume(options, settings, tmp_path):
    options |= {"max_steps": 8, "save_steps": 4, "peft.learning_rate": 0.02, "questions": 1}
    whole = run(settings(out="whole", **options))
    assert whole["loss"]["last"] < whole["loss"]["first"]
    assert whole["adapter"]["config"]["from_activations"] == bool({"calibration_rows", "own_text_rows"} & set(options))
    assert whole["adapter"]["config"]["balanced_updates"] == ("balance_updates" in options)
    folded = [
        json.loads((tmp_path / "whole" / folder / "adapter_config.json").read_text())["folded"]
        for folder in ("adapter", "checkpoint-4", "checkpoint-8")
    ]
    assert folded == ["peft.save_bases" in options, False, False]

    def stop(control):
        control.should_training_stop = True

    half = TrainerCallback()
    half.on_step_end = lambda args, state, control, **_: stop(control) if state.global_step == 4 else None
    run(settings(out="halved", **options), callbacks=[half])
    (tmp_path / "halved" / "record.json").unlink()
    resumed = run(settings(out="halved", resume=True, **options))
    assert resumed["resumed_from_step"] == 4
    assert [e["loss"] for e in resumed["loss"]["log"]] == [e["loss"] for e in whole["loss"]["log"]]
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "halved"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_a_run_killed_for_real_resumes_bit_for_bit(settings, tiny, tmp_path):
    """SIGKILL: nothing is flushed, no handler runs, and another process goes on."""
    options = {"max_steps": 14, "save_steps": 3, "questions": 1}
    whole = run(settings(out="whole", **options))
    given = {"model": tiny.model, "data": tiny.data, "output_dir": tmp_path / "killed", "rows": 40, "held_out_rows": 8}
    given |= {"answer_tokens": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "warmup_steps": 0, **options}
    pairs = [f"{key}={value}" for key, value in given.items()]
    command = [sys.executable, "-c", KILLED, str(ROOT / "configs" / "clover_full.yaml"), *pairs, "disable_tqdm=true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert not (tmp_path / "killed" / "record.json").exists()
    resumed = run(settings(out="killed", resume=True, **options))
    assert resumed["resumed_from_step"] == 9
    assert [entry["loss"] for entry in resumed["loss"]["log"]] == [entry["loss"] for entry in whole["loss"]["log"]]
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_a_run_goes_on_with_its_own_rows_only(settings, tiny, tmp_path):
    """Wherever they lie: the rows are compared, not their path."""
    options = {"max_steps": 4, "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        run(settings(**options), callbacks=[Kill(3)])
    other = write_jsonl(tmp_path / "other.jsonl", rows(60, seed=1))
    with pytest.raises(ValueError, match=r"fingerprint of the rows: expected '\w+' as in the run to resume"):
        run(settings(resume=True, data=other, **options))
    moved = tmp_path / "moved.jsonl"
    shutil.copy(tiny.data, moved)
    kept = tmp_path / "run" / "settings.json"
    saved = json.loads(kept.read_text())
    del saved["fingerprint of the rows"]  # as earlier versions wrote it
    kept.write_text(json.dumps({**saved, "data": str(tiny.data)}))
    assert run(settings(resume=True, data=moved, **options))["resumed_from_step"] == 2


@pytest.mark.parametrize("replaced", ["model", "teacher"])
def test_a_run_goes_on_with_its_own_weights_only(settings, tiny, tmp_path, replaced):
    """Others at the same path are refused; a copy of the same, or a run of an earlier version, goes on."""
    folder = tmp_path / "base"
    shutil.copytree(tiny.model, folder)
    options = {"config": "lora", "max_steps": 4, "save_steps": 2, "questions": 0, replaced: folder}
    with pytest.raises(KeyboardInterrupt):
        run(settings(**options), callbacks=[Kill(3)])
    weights, before = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    save_file({name: tensor + 0.5 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    what = "sha256 of the weights" if replaced == "model" else "sha256 of the teacher's weights"
    with pytest.raises(ValueError, match=rf"{what}: expected '\w+' as in the run to resume, found '\w+'; give it the"):
        run(settings(resume=True, **options))
    shutil.copytree(tmp_path / "run", tmp_path / "earlier")
    saved = json.loads((tmp_path / "run" / "settings.json").read_text())
    del saved[what]
    (tmp_path / "earlier" / "settings.json").write_text(json.dumps(saved))
    assert run(settings(resume=True, out="earlier", **options))["resumed_from_step"] == 2
    weights.unlink()
    weights.write_bytes(before)
    assert run(settings(resume=True, **options))["resumed_from_step"] == 2


def test_a_checkpoint_of_the_last_step_is_not_trained_further(settings, tmp_path):
    """Killed after it and before the record: transformers would train one step more."""
    options = {"max_steps": 3, "save_steps": 3, "lr_scheduler_type": "constant"}
    whole = run(settings(out="whole", **options))
    run(settings(**options))
    (tmp_path / "run" / "record.json").unlink()
    shutil.rmtree(tmp_path / "run" / "adapter")
    resumed = run(settings(resume=True, **options))
    assert (resumed["steps"], resumed["resumed_from_step"]) == (3, 3)
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    for key in ("loss", "answers"):
        assert resumed[key] == whole[key]


def test_resume_without_a_checkpoint_starts_over(settings, capsys):
    assert run(settings(resume=True, max_steps=1))["resumed_from_step"] is None
    assert "starting from the beginning" in capsys.readouterr().out


def test_one_run_at_a_time_writes_into_a_folder(settings, tmp_path, monkeypatch):
    """The check of the folder and the first file in it are minutes apart."""
    monkeypatch.setattr(resuming, "ENDING_SECONDS", 0.1)
    first, second, found = settings(max_steps=1), settings(), []

    class Second(TrainerCallback):
        def on_init_end(self, args, state, control, **kwargs):  # before the first file is written
            assert not any((tmp_path / "run").iterdir())
            with pytest.raises(ValueError, match="expected no other process to make it, found one") as caught:
                run(second)
            found.append(str(caught.value))

    run(first, callbacks=[Second()])
    assert found == [
        f"output_dir={tmp_path / 'run'}: expected no other process to make it, found one; wait for it, or kill it"
    ]
