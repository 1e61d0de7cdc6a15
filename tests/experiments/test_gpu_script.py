"""`benchmarks/gpu.sh`: every step runs on a CPU, a second call keeps what is done, and failures are named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
STEPS = [
    "train_step_4096",
    "train_step_512",
    "train_step_compiled",
    "train_step_checkpointing",
    "init_time",
    "decode",
    "pruned_decode",
    "commonsense",
    "adaptation",
]


def run(*arguments: str, python: str = sys.executable, **more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **more, "PYTHON": python, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=3000
    )


@pytest.mark.slow
def test_all_steps_run_and_are_kept(tiny_grid, tmp_path):
    out = tmp_path / "gpu"
    done = run(str(out), "--fast", "--grid", str(tiny_grid.path))
    logs = {log.name: log.read_text()[-2000:] for log in (out / "logs").glob("*.log")}
    assert done.returncode == 0, (done.stdout, done.stderr, logs)
    assert sorted(file.name for file in (out / "done").iterdir()) == sorted(STEPS)
    assert {f"{step}.json" for step in STEPS[:7]} == {file.name for file in (out / "records").iterdir()}
    assert "clover" in (out / "commonsense.md").read_text()
    assert "Adapted to asyncio" in (out / "adaptation.md").read_text()

    (out / "done" / "init_time").unlink()
    again = run(str(out), "--fast", "--grid", str(tiny_grid.path))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == len(STEPS) - 1
    assert "init_time: done at" in again.stdout
    assert (out / "records" / "init_time-2.json").is_file()


def test_a_step_that_fails_is_named_and_the_others_run(tmp_path):
    out = tmp_path / "gpu"
    python = fake(tmp_path, 'case "$*" in *init_time*) echo broken >&2 && exit 3 ;; esac')
    done = run(str(out), "--fast", "--grid", "some_grid", python=python)
    assert done.returncode == 1
    assert done.stderr.strip() == f"init_time: failed, see {out}/logs/init_time.log"
    assert "broken" in (out / "logs" / "init_time.log").read_text()
    assert {file.name for file in (out / "done").iterdir()} == set(STEPS) - {"init_time"}


def test_a_step_is_done_only_with_the_same_command(tmp_path):
    out, python = tmp_path / "gpu", fake(tmp_path, "")
    assert run(str(out), "--fast", "--grid", "one", python=python).returncode == 0
    again = run(str(out), "--fast", "--grid", "other", "--suite", "rows", python=python)
    assert again.returncode == 0
    assert [line.split(" done at ")[0] for line in again.stdout.splitlines() if "done at" in line] == ["commonsense:"]
    whole = run(str(out), python=python)
    assert whole.stdout.count("done at") == len(STEPS), "none of them was measured with --fast"


@pytest.mark.parametrize("order", [["--fast", "--minutes", "1"], ["--minutes", "1", "--fast"]])
def test_a_limit_counts_with_fast_too(tmp_path, order):
    done = run(str(tmp_path / "gpu"), *order, python=fake(tmp_path, ""), SECONDS="57")
    assert done.returncode == 75
    assert "done at" not in done.stdout


def test_what_there_was_no_time_for_is_said(tmp_path):
    python = fake(tmp_path, 'case "$*" in *decode.py*) sleep 100 ;; esac')
    # Bash counts its seconds from here, so 7 of them are left.
    done = run(str(tmp_path / "gpu"), "--minutes", "1", "--grid", "one", python=python, SECONDS="53")
    assert done.returncode == 75
    assert "decode: cut off at" in done.stdout
    assert done.stdout.count("no time left; run the command again") == 3


def test_a_step_that_was_cut_off_at_its_limit_gets_all_that_is_left(tmp_path):
    out, limits = tmp_path / "gpu", tmp_path / "limits"
    command = tmp_path / "bin" / "timeout"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$3 $5" >>{limits}\ncase "$5" in */decode.py) exit 124 ;; esac\nexit 0\n')
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    for _ in range(2):
        done = run(str(out), python=fake(tmp_path, ""), PATH=path)
        assert done.returncode == 75, done.stderr
    found = [line.split() for line in limits.read_text().splitlines()]
    decode = [int(seconds) for seconds, script in found if Path(script).name == "decode.py"]
    assert decode[0] == 60
    assert decode[1] > 500


def test_a_step_that_is_killed_before_its_limit_failed(tmp_path):
    out = tmp_path / "gpu"
    python = fake(tmp_path, 'case "$*" in *init_time*) kill -9 $$ ;; esac')
    done = run(str(out), "--fast", python=python)
    assert done.returncode == 1
    assert "init_time: killed at" in done.stderr


def test_an_experiment_without_a_record_is_unfinished_and_its_table_stays(tmp_path):
    out = tmp_path / "gpu"
    (out / "adaptation" / "records").mkdir(parents=True)
    (out / "adaptation.md").write_text("an earlier table")
    python = fake(tmp_path, 'case "$*" in *--table*) exit 1 ;; *adaptation_tiny*) sleep 100 ;; esac')
    done = run(str(out), "--fast", "--minutes", "1", python=python, SECONDS="53")
    assert done.returncode == 75, done.stderr
    assert (out / "adaptation.md").read_text() == "an earlier table"
    (out / "adaptation" / "records" / "one.json").write_text("{}")
    assert run(str(out), "--fast", "--minutes", "1", python=python, SECONDS="58").returncode == 1
    assert (out / "adaptation.md").read_text() == "an earlier table"


def test_nothing_is_measured_without_a_gpu(tmp_path):
    python = fake(tmp_path, 'case "$*" in *cuda*) echo "Torch not compiled with CUDA enabled" >&2 && exit 1 ;; esac')
    done = run(str(tmp_path / "gpu"), python=python)
    assert done.returncode == 2
    assert "expected torch with a usable GPU, found none (Torch not compiled with CUDA enabled)" in done.stderr
    assert not (tmp_path / "gpu").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "gpu").write_text("")
    done = run(str(tmp_path / "gpu"), "--fast", python=fake(tmp_path, ""))
    assert done.returncode == 2
    assert "gpu: expected a folder that can be written to" in done.stderr


def test_minutes_are_decimal(tmp_path):
    assert run(str(tmp_path / "gpu"), "--fast", "--minutes", "08", python=fake(tmp_path, "")).returncode == 0


def fake(folder: Path, script: str) -> str:
    """An interpreter that runs a shell script instead."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\nexit 0\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick"], "expected --fast, --grid CONFIG, --suite FOLDER or --minutes N"),
        (["--minutes", "soon"], "--minutes: expected a whole number from 1 on, found soon"),
        (["--grid"], "--grid: expected a configuration after it"),
    ],
)
def test_wrong_options_are_named(tmp_path, arguments, message):
    done = run(str(tmp_path / "gpu"), *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "gpu").exists()
