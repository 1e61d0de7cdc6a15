"""scripts/ablate.py: the order of a grid, choice on validation, its table, and a tiny grid killed and resumed."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from clover_peft.experiments.ablation import report, results, trial_runner
from clover_peft.experiments.ablation.grid import read_grid, settings_of, trials_of
from clover_peft.experiments.commonsense import TASKS, Example, prepare, render
from clover_peft.experiments.training.arguments import parse
from clover_peft.experiments.training.loading import load_tokenizer
from clover_peft.experiments.training.run import load_rows
from clover_peft.io.hub_models import find_model
from tests.support.tiny import load_script
from tests.support.tiny_chat import save_chat_model

ROOT = Path(__file__).parents[2]
script = load_script("ablate")
# what a table says of the machine, not of the methods
MACHINE = {"init_seconds", "train_seconds", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """A model, a suite of 12 training rows a task, and a grid of two methods, two rates and two seeds over them."""
    folder = tmp_path_factory.mktemp("ablation")
    save_chat_model(folder / "model")

    def part(name: str, split: str, count: int) -> list[dict]:
        task = TASKS[name]
        choices = ("a", "b", "c", "d", "e")[: task.most] if task.word else ()
        return [render(task, Example(f"{name} {split} {i}", choices, i % 2)) for i in range(count)]

    train, test = (prepare.number({n: part(n, s, c) for n in TASKS}, s) for s, c in (("train", 12), ("test", 4)))
    prepare.write(prepare.Suite(train, test), folder / "suite", {})
    model = {
        "model": str(folder / "model"),
        "methods": {"clover": {"peft_type": "CLOVER"}, "lora": {"peft_type": "LORA", "r": 4}},
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(model))
    grid = {
        "base": [str(folder / "model.yaml")],
        "settings": {"prompt": "clover", "max_steps": 5, "per_device_train_batch_size": 4, "save_steps": 2},
        "data": {"source": f"folder:{folder / 'suite'}", "validation": 2, "seed": 1},
        "methods": {"clover": [0.001, 0.3], "narrow": {"method": "lora", "learning_rates": [0.001, 0.1], "peft.r": 2}},
        "seeds": [3, 4],
        "evaluation": {"mode": "score", "rows": 3, "batch_size": 8},
    }
    grid["settings"] |= {"disable_tqdm": True, "logging_steps": 1, "warmup_steps": 0, "use_cpu": True}
    (folder / "configs" / "ablations").mkdir(parents=True)
    path = folder / "configs" / "ablations" / "tiny.yaml"
    path.write_text(yaml.safe_dump(grid))
    return SimpleNamespace(path=path, grid=grid, folder=folder)


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


def test_a_grid_killed_half_way_resumes_to_the_same_table(tiny, tmp_path, capsys, one_thread):
    whole = fill(tiny.path, tmp_path / "whole")
    assert whole[:4] == ["clover-lr0.001-seed3", "clover-lr0.3-seed3", "narrow-lr0.001-seed3", "narrow-lr0.1-seed3"]
    assert whole[4:6] == ["base.test", whole[5]]
    assert len(whole) == 4 + 1 + 2 + 2 * 2

    out = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "scripts" / "ablate.py"), "--config", str(tiny.path), "--out", str(out)]
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
    assert fill(tiny.path, out) == whole[1:]
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


def test_an_adapter_that_is_gone_is_trained_again(tiny, tmp_path, one_thread):
    grid = read_grid(tiny.path)
    out, name = tmp_path / "out", "clover-lr0.001-seed3"
    first = json.loads(trial_runner.make(grid, name, out, out / "records").read_text())
    try_others(grid, out / "records")
    kept = (out / "records" / f"{name}.json").read_bytes()
    other = json.loads(trial_runner.make(grid, f"{name}.test", tmp_path / "elsewhere", out / "records").read_text())
    assert other["trial"] == first["trial"]
    assert sum(task["questions"] for task in other["test"]["tasks"].values()) == 24
    assert (out / "records" / f"{name}.json").read_bytes() == kept
    assert other["weights_sha256"] == first["weights_sha256"]
    assert "run" not in other  # the same adapter: its training is in the first record
    assert other["data"] == first["data"]
    assert other["data"]["source"] == grid.data.source
    assert other["test"]["questions"] != first["validation"]["questions"]
    del first["weights_sha256"]  # as in records of earlier versions, which do not say what was validated
    (out / "records" / f"{name}.json").write_text(json.dumps(first))
    (out / "records" / f"{name}.test.json").unlink()
    again = json.loads(trial_runner.make(grid, f"{name}.test", tmp_path / "elsewhere", out / "records").read_text())
    assert again["run"]["loss"]["log"] == first["run"]["loss"]["log"]
    assert again["test"] == other["test"]


def try_others(grid, records: Path) -> None:
    """Records for all trials of the first seed that have none, none of which is chosen."""
    for name, (_, trial) in trials_of(grid).items():
        if trial.seed == grid.seeds[0] and not (records / f"{name}.json").exists():
            write(
                records, name, trial.method, trial.learning_rate, trial.seed, validation={**result(0.1), "loss": 99.0}
            )


RUN = {
    "parameters": {"trainable": 10},
    "seconds": {"init": 1.0, "train": 2.0},
    "peak_memory_bytes": 2**20,
    "adapter_bytes": 2**20,
    "data": {"train_rows": 5},
    "steps": 2,
    "loss": {"log": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]},
}


def write(folder: Path, name: str, method: str, rate: float, seed: int, **parts) -> None:
    trial = {"method": method, "learning_rate": rate, "seed": seed}
    record = {"trial": trial, **({"run": RUN} if "validation" in parts else {}), **parts}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record))


def result(accuracy: float) -> dict:
    task = {"questions": 100, "correct": int(100 * accuracy), "unparsed": 1, "accuracy": accuracy}
    return {"tasks": {"boolq": task}, "mean": accuracy, "interval": [accuracy - 0.1, accuracy + 0.1]}


def test_no_test_question_is_asked_before_every_rate_is_chosen(tiny, tmp_path):
    grid = read_grid(tiny.path)
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


def test_rates_are_chosen_by_loss_and_else_by_accuracy():
    def candidate(rate: float, accuracy: float, **loss: float | str) -> dict:
        return {"trial": {"learning_rate": rate}, "validation": {"mean": accuracy, **loss}}

    by_loss = [candidate(0.1, 0.6, loss=0.7), candidate(0.2, 0.5, loss=0.6), candidate(0.3, 0.7, loss=0.6)]
    assert results.choose(by_loss)["trial"]["learning_rate"] == 0.2
    by_accuracy = [candidate(0.3, 0.7), candidate(0.1, 0.6), candidate(0.2, 0.7)]
    assert results.choose(by_accuracy)["trial"]["learning_rate"] == 0.2
    diverged = [candidate(0.1, 0.9), candidate(0.2, 0.9, loss="NaN"), candidate(0.3, 0.1, loss=9.0)]
    assert results.choose(diverged)["trial"]["learning_rate"] == 0.3
    assert results.choose(diverged[:2])["trial"]["learning_rate"] == 0.1


def finished(settings) -> str:
    """The record of a training, as far as it is read again."""
    rows = load_rows(settings, load_tokenizer(find_model(settings.job.model), settings.sft))
    return json.dumps({"settings": settings.values, "data": {"fingerprint": rows.fingerprint}})


def test_a_run_that_diverged_loses_and_stops_nothing(tiny, tmp_path, monkeypatch):
    def train(settings):
        folder = Path(settings.sft.output_dir)
        (folder / "adapter").mkdir(parents=True)
        save_file({"clover_S": torch.tensor([1.0, float("nan")])}, folder / "adapter" / "adapter_model.safetensors")
        (folder / "record.json").write_text(finished(settings))

    monkeypatch.setattr("clover_peft.experiments.training.run.run", train)
    grid = read_grid(tiny.path)
    path = trial_runner.make(grid, "clover-lr0.3-seed3", tmp_path, tmp_path / "records")
    record = json.loads(path.read_text())
    assert record["validation"]["mean"] == 0
    assert {task["unparsed"] for task in record["validation"]["tasks"].values()} == {2}
    assert "loss" not in record["validation"]
    good = {"trial": {"learning_rate": 0.5}, "validation": {"mean": 0.1, "loss": 3.0}}
    assert results.choose([record, good]) is good


def test_all_questions_meet_the_model_in_the_dtype_of_training(tiny, tmp_path, monkeypatch):
    def train(settings):
        folder = Path(settings.sft.output_dir)
        (folder / "adapter").mkdir(parents=True)
        save_file({"clover_S": torch.zeros(1)}, folder / "adapter" / "adapter_model.safetensors")
        (folder / "record.json").write_text(finished(settings))

    def load(source, adapter, dtype):
        loaded.append(dtype)
        raise KeyboardInterrupt

    loaded: list[str] = []
    monkeypatch.setattr("clover_peft.experiments.training.run.run", train)
    monkeypatch.setattr(trial_runner, "load_trained", load)
    grid = read_grid(tiny.path, ["settings.model_init_kwargs={dtype: bfloat16}"])
    records = tmp_path / "records"
    for step in ("clover-lr0.3-seed3", "clover-lr0.3-seed3.test", "base.test"):
        with pytest.raises(KeyboardInterrupt):
            trial_runner.make(grid, step, tmp_path, records)
        write(records, "clover-lr0.3-seed3", "clover", 0.3, 3, validation={**result(0.1), "loss": 1.0})
        try_others(grid, records)
    assert loaded == ["bfloat16"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "data.rows=3",
            "data.rows: expected None as in .*data.json, found 3; set it as before, or choose another --out",
        ),
        ("data.decontaminate=true", "data.decontaminate: expected False"),
        ("settings.max_steps=6", "max_steps: expected 5 as in .*narrow-lr0.1-seed3.json, found 6"),
        ("methods.narrow={method: lora, learning_rates: [0.001, 0.1], peft.r: 3}", "peft.r: expected 2"),
        ("evaluation.rows=2", "evaluation.rows: expected 3 as in .*test.json, found 2"),
        ("evaluation.mode=generate", "evaluation.mode: expected 'score'"),
        ("seeds=[4, 3]", "narrow has met the test questions, expected no further choice of its learning rate"),
        ("methods={narrow: {method: lora, learning_rates: [0.1, 0.2], peft.r: 2}}", "found narrow-lr0.2-seed3 to try"),
        (
            "methods={narrow: {method: lora, learning_rates: [0.001], peft.r: 2}}",
            "the learning rate that was chosen, 0.001",
        ),
        ("seeds=[3, 4, 5]", None),
        ("methods.third={method: lora, learning_rates: [1, 2]}", None),
        ("settings.save_total_limit=null", None),
        ("evaluation.test=false", None),
    ],
)
def test_a_grid_goes_on_with_its_own_data_and_settings_only(tiny, tmp_path, change, message):
    grid, records, name = read_grid(tiny.path), tmp_path / "records", "narrow-lr0.1-seed3"
    trial_runner.make_data(grid, tmp_path / "data")
    _, trial = trials_of(grid)[name]
    values = parse(grid.base, settings_of(grid, grid.methods[1], trial, Path("/elsewhere"))).values
    asked = {"mode": "score", "rows": 3, "batch_size": 8}
    records.mkdir()
    for step, parts in {
        name: {"trial": vars(trial), "run": {"settings": values}, "validation": {"evaluation": asked, "loss": 1.0}},
        "narrow-lr0.001-seed3": {"trial": {**vars(trial), "learning_rate": 0.001}, "validation": {"loss": 2.0}},
        "of-something-else": {"data": {}, "model": "a name"},
        f"{name}.test": {"trial": vars(trial), "test": {"evaluation": asked}},
        "base.test": {"trial": None, "test": {"evaluation": asked}},
        "gone-lr0.1-seed3": {
            "trial": {**vars(trial), "method": "gone"},
            "run": {"settings": {"max_steps": 1}},
            "validation": {},
        },
    }.items():
        (records / f"{step}.json").write_text(json.dumps(parts))
    changed = read_grid(tiny.path, [change])
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        trial_runner.make_data(changed, tmp_path / "data")
        trial_runner.check_records(changed, records)
    if message is None:  # a record that was lost is made again
        (records / "narrow-lr0.001-seed3.json").unlink()
        with pytest.raises(ValueError, match=r"found narrow-lr0\.001-seed3 to try"):
            trial_runner.check_records(changed, records)
        test = {"trial": vars(trial), "test": {"evaluation": asked}, "chosen_from": ["narrow-lr0.001-seed3"]}
        (records / f"{name}.test.json").write_text(json.dumps(test))
        trial_runner.check_records(changed, records)
    if change == "evaluation.rows=2":  # all validation rows are asked
        for path in records.glob("*.test.json"):
            path.unlink()
        trial_runner.check_records(changed, records)


def test_a_grid_killed_while_it_writes_data_starts_again(tiny, tmp_path, monkeypatch):
    def killed(path, rows):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write_rows(path, rows)

    written: list[Path] = []
    grid, write_rows = read_grid(tiny.path), prepare.write_rows
    monkeypatch.setattr(prepare, "write_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        trial_runner.make_data(grid, tmp_path / "data")
    trial_runner.make_data(grid, tmp_path / "data")
    assert len(list((tmp_path / "data").rglob("*.gz"))) == 2 + len(TASKS)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"other: expected no folder or one with data.json, found none in it; delete"):
        trial_runner.make_data(grid, tmp_path / "other")


def test_a_task_without_questions_shows_before_anything_is_trained(tiny, tmp_path):
    source = tmp_path / "suite"
    shutil.copytree(tiny.folder / "suite", source)
    (source / "test" / "piqa.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match="expected tasks with rows to train on and to test, found none of piqa"):
        trial_runner.make_data(read_grid(tiny.path, [f"data.source=folder:{source}"]), tmp_path / "data")


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "a.json").write_text("")
    with pytest.raises(ValueError, match=r"a.json: expected a block in JSON, found .*; delete it"):
        results.load(tmp_path)


def test_a_stop_before_the_first_record_is_no_error(tiny, tmp_path, capsys):
    assert script.main(["--config", str(tiny.path), "--out", str(tmp_path / "out"), "--minutes", "-1"]) == 0
    assert "next would be clover-lr0.001-seed3" in "".join(capsys.readouterr())


def test_a_search_asks_no_test_question(tiny, tmp_path):
    grid = read_grid(tiny.path, ["evaluation.test=false"])
    names = trial_runner.ready_steps(grid, tmp_path)
    assert len(names) == 4
    for name in names:
        trial = trials_of(grid)[name][1]
        write(tmp_path, name, trial.method, trial.learning_rate, trial.seed, validation=result(0.5))
    assert trial_runner.ready_steps(grid, tmp_path) == []


def test_the_table_is_arithmetic_on_records(tmp_path):
    folder = tmp_path / "records"
    for seed, accuracy in ((0, 0.5), (1, 0.6), (2, 0.7)):
        write(folder, f"a-lr0.1-seed{seed}", "a", 0.1, seed, validation=result(0.9))
        tried = ["a-lr0.1-seed0", "a-lr0.3-seed0"]
        write(folder, f"a-lr0.1-seed{seed}.test", "a", 0.1, seed, test=result(accuracy), chosen_from=tried)
        write(folder, f"b-lr0.2-seed{seed}", "b", 0.2, seed, validation=result(0.3))
        write(folder, f"b-lr0.2-seed{seed}.test", "b", 0.2, seed, test=result(0.5))
    write(folder, "a-lr0.3-seed0", "a", 0.3, 0, validation={**result(0.8), "loss": 0.25})  # tried
    rows = {row.method: row for row in results.table_rows(results.load(folder))}
    assert rows["a"].average == pytest.approx(0.6)
    assert rows["a"].sd == pytest.approx(0.1)
    assert rows["a"].interval == pytest.approx([0.5, 0.7])
    assert rows["a"].candidates == {0.1: (0.9, None), 0.3: (0.8, 0.25)}
    assert rows["a"].at_edge
    assert rows["a"].unparsed == 3
    found = results.difference(rows["a"], rows["b"])
    assert (found.points, found.of_seeds) == pytest.approx((0.1, 0.1 / 3**0.5))
    assert found.of_questions is None  # the records do not say which were right
    shown = report.markdown(results.load(folder))
    assert "| a | 10 | 60.0 | 60.00 ± 10.00 | 50.0 to 70.0 |" in shown
    assert "- a against b: +10.00 points (standard error: 5.77 of the seeds)" in shown
    assert "| a | 0.1 (edge) | 0.1: 90.0%, 0.3: 80.0% (loss 0.250) | 3 | 3 | 1.0 | 2 | 1 | 1.0 |" in shown
    for seed in (2, 5):  # falling: rates were tried at the first, 5
        write(tmp_path / "falling", f"a-lr0.1-seed{seed}", "a", 0.1, seed, validation=result(seed / 10))
        tried = ["a-lr0.1-seed5", "a-lr0.3-seed5"]
        write(tmp_path / "falling", f"a-lr0.1-seed{seed}.test", "a", 0.1, seed, test=result(0.5), chosen_from=tried)
    write(tmp_path / "falling", "a-lr0.3-seed5", "a", 0.3, 5, validation={**result(0.1), "loss": "NaN"})
    [row] = results.table_rows(results.load(tmp_path / "falling"))
    assert row.candidates == {0.1: (0.5, None), 0.3: (0.1, None)}
    assert report.markdown({}) == "No method has met the test questions."
    searched = {name: record for name, record in results.load(folder).items() if not name.endswith(".test")}
    lines = report.markdown(searched).splitlines()
    assert lines[4] == "| a | 10 | 0.3 | 0.2500 | 80.0% | 5 | 2 | `a-lr0.3-seed0.json` |"
    assert sum(line.startswith("| ") for line in lines) == 2 + 7


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
        ("settings.resume=true", "settings.resume: not a setting of a grid, runs of a grid always go on"),
        ("methods.clover={learning_rates: [1, 2], prompt: chat}", "methods.clover.prompt: not a setting of a method"),
        ("methods.clover={learning_rates: [1, 2], model: x}", "set it for all methods in settings"),
        ("methods.clover={learning_rates: [1, 2], method: [1]}", "method=[1]: expected one of clover"),
        ("methods.-x=[1e-3, 2e-3]", "methods: expected names that can be those of files, without - or . in front"),
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
        ("methods={a/b: [1]}", "names that can be those of files, without - or . in front, found 'a/b'"),
        ("seeds=3", "seeds: expected a list"),
        ("seeds=[3, 3]", "seeds: expected a list of different whole numbers from 0 on, found [3, 3]"),
        ("seeds=[1.5]", "seeds: expected a list"),
        ("zzz=3", "expected the keys base, settings, data"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(tiny, tmp_path, change, message, capsys):
    assert script.main(["--config", str(tiny.path), "--out", str(tmp_path / "out"), change]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_named_with_its_log(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    grid = read_grid(tiny.path)
    trial_runner.make_data(grid, out / "data")
    assert script.main(["--config", str(tiny.path), "--out", str(out), "settings.max_length=1"]) == 1
    shown = capsys.readouterr().err
    for step in ("clover-lr0.001-seed3", "narrow-lr0.1-seed3"):  # it does not stop the others
        assert f"{step}: ended with status 1, see " in shown
    assert "max_length=1: expected room for an answer" in shown
    (out / "data" / "train.jsonl.gz").write_bytes(b"no gzip")
    assert script.main(["--config", str(tiny.path), "--out", str(out)]) == 1
    assert "train.jsonl.gz: expected the rows that were written, found others; delete" in capsys.readouterr().err


def test_several_processes_at_a_time_keep_the_order_that_matters(tiny, tmp_path, monkeypatch):
    out, records = tmp_path / "out", tmp_path / "records"
    grid, at_once, order = read_grid(tiny.path), [], []
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
    command = ["--config", str(tiny.path), "--out", str(out), "--records", str(records), "--jobs", "3"]
    assert script.main(command) == 0
    assert max(at_once) == 3
    assert len(order) == len({step for step, _ in order}) == len(results.load(records)) == 11
    candidates = {step for step, _ in order[:4]}
    for step, found in order:
        assert step in candidates or candidates <= found  # no test question before every rate is chosen
        assert not step.endswith(".test") or step == "base.test" or step.removesuffix(".test") in found
    assert script.main([*command[:-1], "0"]) == 1


def test_the_grids_of_the_repository_are_whole():
    files = (ROOT / "configs" / "ablations").glob("*.yaml")
    grids = sorted(path for path in files if not path.stem.startswith("adaptation_"))
    assert grids
    for path in grids:
        grid = read_grid(path, ["settings.use_cpu=true"])
        assert grid.data.validation > 0
        assert grid.data.decontaminate
        assert {"clover", "lora", "dora", "pissa", "hira"} <= {method.name for method in grid.methods}


def test_a_step_waits_for_its_turn_and_for_other_processes(tiny, tmp_path):
    grid, records = read_grid(tiny.path), tmp_path / "records"
    with pytest.raises(
        ValueError, match=r"whose turn it is, found others to be made first, such as clover-lr0.001-seed3"
    ):
        trial_runner.make(grid, "clover-lr0.3-seed3.test", tmp_path, records)
    try_others(grid, records)
    there = records / "clover-lr0.3-seed3.json"
    assert trial_runner.make(grid, "clover-lr0.3-seed3", tmp_path, records) == there  # what is there is not made again
    with (
        trial_runner._alone(records / ".base.test.lock"),
        pytest.raises(ValueError, match="expected no other process to make it, found one"),
    ):
        trial_runner.make(grid, "base.test", tmp_path, records)


def test_what_was_trained_otherwise_is_not_taken(tiny, tmp_path, monkeypatch):
    """Settings, rows or weights changed between two steps of one folder."""
    grid, step = read_grid(tiny.path), "clover-lr0.001-seed3"
    method, trial = trials_of(grid)[step]
    folder, records = tmp_path / "runs" / step, tmp_path / "records"
    folder.mkdir(parents=True)
    values = parse(grid.base, settings_of(grid, method, trial, tmp_path)).values
    (folder / "record.json").write_text(json.dumps({"settings": {**values, "max_steps": 4}}))
    with pytest.raises(ValueError, match=r"expected an adapter or a model, found the record alone; delete the folder"):
        trial_runner.make(grid, step, tmp_path, records)
    (folder / "adapter").mkdir()
    with pytest.raises(ValueError, match=r"max_steps: expected 4 as in .*record.json, found 5"):
        trial_runner.make(grid, step, tmp_path, records)
    trial_runner.make_data(grid, tmp_path / "data")
    record = json.loads(finished(parse(grid.base, settings_of(grid, method, trial, tmp_path))))
    record["data"]["fingerprint"] = "of other rows"
    (folder / "record.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"data.fingerprint: expected 'of other rows' as in .*record.json"):
        trial_runner.make(grid, step, tmp_path, records)
    write(records, "gone-lr1-seed3", "gone", 1, 3, validation=result(0.1), model={"origin": "another place"})
    with pytest.raises(ValueError, match=r"model.origin: expected 'another place' as in .*gone-lr1-seed3.json"):
        trial_runner.make(grid, step, tmp_path, records)
    write(
        records,
        "gone-lr1-seed3",
        "gone",
        1,
        3,
        validation=result(0.1),
        data={"files": {"train.jsonl.gz": {"rows": 1}}},
    )
    with pytest.raises(ValueError, match=r"data.test/\S+: expected None as in .*gone-lr1-seed3.json"):
        trial_runner.make(grid, step, tmp_path, records)
    assert [path.name for path in records.glob("*.json")] == ["gone-lr1-seed3.json"]


def test_a_file_that_is_no_record_of_its_name_stops_the_grid(tiny, tmp_path):
    grid, step = read_grid(tiny.path), "clover-lr0.001-seed3"
    (tmp_path / f"{step}.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{step}.json: expected a record or no file, found another; take it out"):
        trial_runner.make(grid, step, tmp_path, tmp_path)
    write(tmp_path, step, "clover", 0.001, 3, test=result(0.1))  # validation is missing
    with pytest.raises(ValueError, match=f"{step}.json: expected the record of {step}, found one of"):
        results.load(tmp_path)
    (tmp_path / f"{step}.json").unlink()
    write(tmp_path, "clover-lr0.001-seed4.test", "clover", 0.001, 3, test=result(0.1))
    with pytest.raises(ValueError, match=r"the record of clover-lr0.001-seed4.test, found one of clover-lr0"):
        results.load(tmp_path)
    write(tmp_path, "clover-lr0.001-seed4.test", "clover", 0.001, 3, test=result(0.1), trial={"seed": 1})
    with pytest.raises(ValueError, match=r"the record of clover-lr0.001-seed4.test, found one of {'seed': 1}"):
        results.load(tmp_path)


def test_records_that_were_asked_otherwise_are_not_one_table(tmp_path):
    write(
        tmp_path,
        "a-lr1-seed0.test",
        "a",
        1,
        0,
        test={**result(0.1), "questions": "x", "evaluation": {"mode": "score"}},
    )
    write(tmp_path, "b-lr1-seed0.test", "b", 1, 0, test=result(0.1))  # an old one, which does not say
    results.table_rows(results.load(tmp_path))
    write(tmp_path, "b-lr1-seed0.test", "b", 1, 0, test={**result(0.1), "evaluation": {"mode": "generate"}})
    with pytest.raises(ValueError, match=r"b-lr1-seed0.test: expected the evaluation of a-lr1-seed0.test, .*score"):
        results.table_rows(results.load(tmp_path))
    write(tmp_path, "b-lr1-seed0.test", "b", 1, 0, test={**result(0.1), "questions": "y"})
    with pytest.raises(ValueError, match=r"expected the questions of a-lr1-seed0.test, x, found y; take out"):
        results.table_rows(results.load(tmp_path))


def test_what_runs_differ_in_and_what_is_missing_is_said(tmp_path):
    for method, steps in (("a", 5), ("b", 9)):
        own = {"calibration_rows": 64} if method == "b" else {}
        settings = {"max_steps": steps, "seed": steps, "save_steps": 3, "peft": {"r": steps}, **own}
        run = {**RUN, "settings": settings}
        write(tmp_path, f"{method}-lr1-seed0", method, 1, 0, validation=result(0.1), run=run)
        tried = {"chosen_from": [f"{method}-lr1-seed0", f"{method}-lr2-seed0"]}
        write(tmp_path, f"{method}-lr1-seed0.test", method, 1, 0, test=result(0.1), **tried)
    shown = report.markdown(results.load(tmp_path))
    assert "- settings: calibration_rows 64 or null; max_steps 5 or 9\n" in shown + "\n"
    assert "Rates were also chosen from records that are not here: a-lr2-seed0, b-lr2-seed0." in shown


def test_a_grid_that_is_asked_to_end_takes_its_runs_with_it(tiny, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts" / "ablate.py"), "--config", str(tiny.path), "--out", str(out)]
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
    with trial_runner._alone(lock):
        pass  # nobody is left


def answered(right: str) -> dict:
    count = right.count("1")
    return {"questions": len(right), "correct": count, "unparsed": 0, "accuracy": count / len(right), "right": right}


def test_questions_that_both_answer_are_compared_in_pairs(tmp_path):
    marks = {"a": ("1111000000", "1110000001"), "b": ("1100000000", "1100000000")}
    for method, seeds in marks.items():
        for seed, right in enumerate(seeds):
            tasks = {name: answered(part) for name, part in (("boolq", right), ("piqa", right[1:5]))}
            mean = statistics.mean(task["accuracy"] for task in tasks.values())
            found = {"tasks": tasks, "mean": mean, "interval": [0, 1], "questions": "a digest"}
            write(tmp_path, f"{method}-lr1-seed{seed}", method, 1, seed, validation=result(0.5))
            write(tmp_path, f"{method}-lr1-seed{seed}.test", method, 1, seed, test=found)
    one, other = results.table_rows(results.load(tmp_path))
    paired = results.difference(one, other)
    differences = [0, 0, 1, 0.5, 0, 0, 0, 0, 0, 0.5]
    both = [differences, differences[1:5]]
    assert paired.points == pytest.approx(statistics.mean(map(statistics.mean, both)))
    squares = [statistics.variance(part) / len(part) for part in both]
    assert paired.of_questions == pytest.approx(sum(squares) ** 0.5 / 2)
    del found["questions"]  # as in old records
    write(tmp_path, "b-lr1-seed0.test", "b", 1, 0, test=found)
    assert results.difference(*results.table_rows(results.load(tmp_path))).of_questions is None
    write(tmp_path, "a-lr2-seed0.test", "a", 2, 0, test=result(0.9))
    with pytest.raises(
        ValueError, match="a: expected test records at the one learning rate chosen for it, found 1, 2"
    ):
        results.table_rows(results.load(tmp_path))
