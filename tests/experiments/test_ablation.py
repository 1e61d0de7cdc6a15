"""An ablation grid as its command runs it: what is refused, in which order, several processes, killed and resumed."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from clover_peft.experiments.ablation import report, results, trial_runner
from clover_peft.experiments.ablation.grid import read_grid, trials_of
from clover_peft.experiments.training.resuming import alone
from tests.support.ablation_records import result, write
from tests.support.tiny import load_script

ROOT = Path(__file__).parents[2]
script = load_script("ablate")
# what a table says of the machine, not of the methods
MACHINE = {"init_seconds", "train_seconds", "peak_memory_bytes"}


def fill(path: Path, out: Path) -> list[str]:
    """Makes all records that are missing, in this process."""
    grid, made = read_grid(path), []
    while ready := trial_runner.ready_steps(grid, out / "records"):
        trial_runner.make(grid, ready[0], out, out / "records")
        made.append(ready[0])
    return made


def same_numbers(records: Path) -> list[dict]:
    """The table, less what the machine has to do with."""
    lines = csv.DictReader(io.StringIO(report.as_csv(results.load(records))))
    return [{key: value for key, value in line.items() if key not in MACHINE} for line in lines]


def test_a_grid_killed_half_way_resumes_to_the_same_table(tiny_grid, tmp_path, capsys, one_thread):
    whole = fill(tiny_grid.path, tmp_path / "whole")
    assert whole[:4] == ["clover-lr0.001-seed3", "clover-lr0.3-seed3", "narrow-lr0.001-seed3", "narrow-lr0.1-seed3"]
    assert whole[4:6] == ["base.test", whole[5]]
    assert len(whole) == 4 + 1 + 2 + 2 * 2

    out = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "scripts" / "ablate.py"), "--config", str(tiny_grid.path), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    second = out / "runs" / whole[1]
    while not list(second.glob("checkpoint-*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.stem for path in (out / "records").glob("*.json")] == whole[:1]
    assert fill(tiny_grid.path, out) == whole[1:]
    assert same_numbers(out / "records") == same_numbers(tmp_path / "whole" / "records")
    found = results.load(out / "records")
    logs = [[r["run"]["loss"]["log"] for r in results.load(d / "records").values() if "run" in r] for d in (
        out, tmp_path / "whole")]  # fmt: skip
    assert logs[0] == logs[1]

    # the records alone make the table and the pictures, and hold no row of the data
    assert script.main(["--table", str(out / "records"), "--pictures", str(tmp_path / "pictures")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("| clover |") == 2
    assert "clover against narrow: " in shown
    assert "Trained on 80 rows in 5 steps, 2 seed(s); 24 test questions" in shown
    for name in found:
        assert name == "base.test" or f"`{name}.json`" in shown or name.endswith(f"seed{3}")
    made = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert made == ["accuracies.png", "losses.png", "parameters.png", "rates.png", "table.csv", "table.md"]
    assert "Please choose" not in json.dumps(found)
    narrow = next(row for row in results.table_rows(found) if row.method == "narrow")
    assert narrow.parameters == 2 * sum((64 + 64, 64 + 32)) * 2  # of rank 2 in peft's targets, q and v, two layers
    assert (len(narrow.seeds), len(narrow.candidates)) == (2, 2)
    losses = {rate: loss for rate, (_, loss) in narrow.candidates.items()}
    assert losses[narrow.learning_rate] == min(losses.values())


def test_no_test_question_is_asked_before_every_rate_is_chosen(tiny_grid, tmp_path):
    grid = read_grid(tiny_grid.path)
    folder, order = tmp_path / "records", []
    better = {0.001: 0.4, 0.3: 0.5, 0.1: 0.4}
    while ready := trial_runner.ready_steps(grid, folder):
        order.append(step := ready[0])
        name = step.removesuffix(".test")
        if name == "base":
            write(folder, step, "", 0, 0, test=result(0.1), trial=None)
            continue
        _, trial = trials_of(grid)[name]
        part = "test" if step.endswith(".test") else "validation"
        write(
            folder, step, trial.method, trial.learning_rate, trial.seed, **{part: result(better[trial.learning_rate])}
        )
    # of equal rates the lower one
    assert order == [
        "clover-lr0.001-seed3", "clover-lr0.3-seed3", "narrow-lr0.001-seed3", "narrow-lr0.1-seed3", "base.test",
        "clover-lr0.3-seed3.test", "narrow-lr0.001-seed3.test",
        "clover-lr0.3-seed4", "clover-lr0.3-seed4.test", "narrow-lr0.001-seed4", "narrow-lr0.001-seed4.test",
    ]  # fmt: skip


def test_a_stop_before_the_first_record_is_no_error(tiny_grid, tmp_path, capsys):
    assert script.main(["--config", str(tiny_grid.path), "--out", str(tmp_path / "out"), "--minutes", "0"]) == 0
    assert "next would be clover-lr0.001-seed3" in "".join(capsys.readouterr())


def test_a_search_asks_no_test_question(tiny_grid, tmp_path):
    grid = read_grid(tiny_grid.path, ["evaluation.test=false"])
    names = trial_runner.ready_steps(grid, tmp_path)
    assert len(names) == 4
    for name in names:
        trial = trials_of(grid)[name][1]
        write(tmp_path, name, trial.method, trial.learning_rate, trial.seed, validation=result(0.5))
    assert trial_runner.ready_steps(grid, tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("methods.clover=[1e-3]", "expected as many learning rates for every method"),
        ("methods.base=[1e-3, 2e-3]", "none called base"),
        ("methods.zzz=[1e-3, 2e-3]", "method=zzz: expected one of clover, lora"),
        ("methods.clover=fast", "methods.clover: expected learning rates"),
        ("settings.zzz=1", "zzz: unknown"),
        ("data.zzz=1", "data: expected some of source, tasks"),
        ("data={rows: 3}", "data.validation: expected a number of rows"),
        ("evaluation.zzz=1", "evaluation: expected some of mode, rows"),
        ("evaluation.mode=scored", "evaluation.mode: expected score or generate, found 'scored'"),
        ("evaluation.rows=0", "evaluation.rows: expected a whole number from 1 on, or null for all, found 0"),
        ("evaluation.batch_size=0", "evaluation.batch_size: expected a whole number from 1 on, found 0"),
        ("evaluation.test=no", "evaluation.test: expected true or false, found 'no'"),
        ("evaluation=null", "evaluation: expected some of mode, rows, batch_size, test, found None"),
        ("data.validation=0", "data.validation: expected a number of rows"),
        ("data.validation=null", "data.validation: expected a whole number from 0 on, found None"),
        ("data.validation=-1", "data.validation: expected a whole number from 0 on, found -1"),
        ("data.rows=0", "data.rows: expected a whole number from 1 on, or none for all, found 0"),
        ("data.tasks=boolq", "data.tasks: expected some of boolq, piqa"),
        ("data.deduplicate=no", "data.deduplicate: expected true or false, found 'no'"),
        ("data=null", "data: expected some of source, tasks"),
        ("settings=3", "settings: expected a block of settings, found 3"),
        ("base=x", "base: expected a list of files, found 'x'"),
        ("base=[]", "base: expected a list of files, found []"),
        ("settings={max_steps: 3, max_steps: 4}", "found the key max_steps twice"),
        ("settings.peft={learning_rate: 3}", "settings.peft.learning_rate: not a setting of a grid, set the learning"),
        ("settings.resume=true", "settings.resume: not a setting of a grid, the runs of a grid always resume"),
        ("methods.clover={learning_rates: [1, 2], prompt: chat}", "methods.clover.prompt: not a setting of a method"),
        ("methods.clover={learning_rates: [1, 2], model: x}", "set it for all methods in settings"),
        (
            "methods.clover={learning_rates: [1, 2], model_init_kwargs: {dtype: bfloat16}}",
            "methods.clover.model_init_kwargs: not a setting of a method, set it for all",
        ),
        (
            "methods.clover={learning_rates: [1, 2], model_init_kwargs.dtype: bfloat16}",
            "methods.clover.model_init_kwargs.dtype: not a setting of a method, set it for all",
        ),
        (
            "methods.clover={learning_rates: [1, 2], trust_remote_code: true}",
            "clover.trust_remote_code: not a setting of a",
        ),
        ("methods.clover={learning_rates: [1, 2], method: [1]}", "method=[1]: expected one of clover"),
        ("methods.-x=[1e-3, 2e-3]", "methods: expected names that a file can have, without - or . in front"),
        ("methods=3", "methods: expected a block of learning rates by name, found 3"),
        ("settings.rows=3", "settings.rows: not a setting of a grid, set data.rows"),
        (
            "methods.clover={learning_rates: [1, 2], seed: 3}",
            "clover.seed: not a setting of a method, set seeds",
        ),
        ("data.tasks=[]", "data.tasks: expected some of boolq, piqa"),
        ("data.seed=abc", "data.seed: expected a whole number from 0 on, found 'abc'"),
        ("methods.clover=[x, 1]", "methods.clover.learning_rates: expected a list of positive numbers"),
        ("methods.clover=[0.00123456, 0.001234561]", "that differ in six digits, found [0.00123456, 0.001234561]"),
        ("methods.clover={learning_rates: 0.1}", "methods.clover.learning_rates: expected a list of positive numbers"),
        ("methods={a/b: [1]}", "names that a file can have, without - or . in front, found 'a/b'"),
        ("seeds=3", "seeds: expected a list"),
        ("seeds=[3, 3]", "seeds: expected a list of different whole numbers from 0 on, found [3, 3]"),
        ("seeds=[1.5]", "seeds: expected a list"),
        ("zzz=3", "expected the keys base, settings, data"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(tiny_grid, tmp_path, change, message, capsys):
    assert script.main(["--config", str(tiny_grid.path), "--out", str(tmp_path / "out"), change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_named_with_its_log(tiny_grid, tmp_path, capsys):
    out = tmp_path / "out"
    grid = read_grid(tiny_grid.path)
    trial_runner.make_data(grid, out / "data")
    # every step is a process: one rate a method will do
    one = ["methods.clover=[0.001]", "methods.narrow.learning_rates=[0.1]"]
    assert script.main(["--config", str(tiny_grid.path), "--out", str(out), "settings.max_length=1", *one]) == 1
    shown = capsys.readouterr().err
    for step in ("clover-lr0.001-seed3", "narrow-lr0.1-seed3"):  # it does not stop the others
        assert f"{step}: ended with status 2, see " in shown
    assert "max_length=1: expected room for an answer" in shown
    (out / "data" / "train.jsonl.gz").write_bytes(b"no gzip")
    assert script.main(["--config", str(tiny_grid.path), "--out", str(out), *one]) == 2
    assert "train.jsonl.gz: expected the rows that were written, found others; delete" in capsys.readouterr().err


def test_several_processes_at_a_time_keep_the_order_that_matters(tiny_grid, tmp_path, monkeypatch):
    out, records = tmp_path / "out", tmp_path / "records"
    grid, at_once, order = read_grid(tiny_grid.path), [], []
    running = []

    def start(given, step, records):
        found = results.load(records)
        order.append((step, set(found)))
        running[:] = [process for process in running if process.poll() is None]
        name = step.removesuffix(".test")
        if name == "base":
            record = {"trial": None, "test": result(0.1)}
        else:
            trial = vars(trials_of(grid)[name][1])
            record = {"trial": trial, "test" if step.endswith(".test") else "validation": result(0.5)}
        code = "import pathlib, sys, time; time.sleep(0.3); pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
        records.mkdir(exist_ok=True)
        process = subprocess.Popen([sys.executable, "-c", code, str(records / f"{step}.json"), json.dumps(record)])
        running.append(process)
        at_once.append(len(running))
        return process

    monkeypatch.setattr(script, "_start", start)
    monkeypatch.setattr(script, "_show", lambda *_: 0)
    command = ["--config", str(tiny_grid.path), "--out", str(out), "--records", str(records), "--jobs", "3"]
    assert script.main(command) == 0
    assert max(at_once) == 3
    assert len(order) == len({step for step, _ in order}) == len(results.load(records)) == 11
    candidates = {step for step, _ in order[:4]}
    for step, found in order:
        assert step in candidates or candidates <= found  # no test question before every rate is chosen
        assert not step.endswith(".test") or step == "base.test" or step.removesuffix(".test") in found
    assert script.main([*command[:-1], "0"]) == 2


def test_the_grids_of_the_repository_are_whole():
    files = (ROOT / "configs" / "ablations").glob("*.yaml")
    grids = sorted(path for path in files if not path.stem.startswith("adaptation_"))
    assert grids
    for path in grids:
        grid = read_grid(path, ["settings.use_cpu=true"])
        assert grid.data.validation > 0
        assert grid.data.decontaminate
        assert {"clover", "lora", "dora", "pissa", "hira"} <= {method.name for method in grid.methods}


def test_a_grid_that_is_asked_to_end_takes_its_runs_with_it(tiny_grid, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts" / "ablate.py"), "--config", str(tiny_grid.path), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "settings.max_steps=100000"], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    lock, deadline = out / "records" / ".clover-lr0.001-seed3.lock", time.monotonic() + 120
    while not lock.exists() and time.monotonic() < deadline:  # until the child works
        time.sleep(0.05)
    assert lock.exists()
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    with alone(lock, "it"):
        pass  # nobody is left
