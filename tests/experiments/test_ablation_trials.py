"""One trial of an ablation: its data, its settings, its adapter, and what stops it."""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from clover_peft.experiments.ablation import results, trial_runner
from clover_peft.experiments.ablation.grid import read_grid, settings_of, trials_of
from clover_peft.experiments.commonsense import TASKS, prepare
from clover_peft.experiments.training import resuming
from clover_peft.experiments.training.arguments import parse
from clover_peft.experiments.training.loading import load_tokenizer
from clover_peft.experiments.training.run import load_rows
from clover_peft.io.hub_models import find_model
from tests.support.ablation_records import result, write


def test_an_adapter_that_is_gone_is_trained_again(tiny_grid, tmp_path, one_thread):
    grid = read_grid(tiny_grid.path)
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


def finished(settings) -> str:
    """The record of a training, as far as it is read again."""
    rows = load_rows(settings, load_tokenizer(find_model(settings.job.model), settings.sft))
    return json.dumps({"settings": settings.values, "data": {"fingerprint": rows.fingerprint}})


def test_a_run_that_diverged_loses_and_stops_nothing(tiny_grid, tmp_path, monkeypatch):
    def train(settings):
        folder = Path(settings.sft.output_dir)
        (folder / "adapter").mkdir(parents=True)
        save_file({"clover_S": torch.tensor([1.0, float("nan")])}, folder / "adapter" / "adapter_model.safetensors")
        (folder / "record.json").write_text(finished(settings))

    monkeypatch.setattr("clover_peft.experiments.training.run.run", train)
    grid = read_grid(tiny_grid.path)
    path = trial_runner.make(grid, "clover-lr0.3-seed3", tmp_path, tmp_path / "records")
    record = json.loads(path.read_text())
    assert record["validation"]["mean"] == 0
    assert {task["unparsed"] for task in record["validation"]["tasks"].values()} == {2}
    assert "loss" not in record["validation"]
    good = {"trial": {"learning_rate": 0.5}, "validation": {"mean": 0.1, "loss": 3.0}}
    assert results.choose([record, good]) is good


def test_all_questions_meet_the_model_in_the_dtype_of_training(tiny_grid, tmp_path, monkeypatch):
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
    grid = read_grid(tiny_grid.path, ["settings.model_init_kwargs={dtype: bfloat16}"])
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
        ("seeds=[4, 3]", "narrow has answered the test questions, expected no further choice of its learning rate"),
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
def test_a_grid_goes_on_with_its_own_data_and_settings_only(tiny_grid, tmp_path, change, message):
    grid, records, name = read_grid(tiny_grid.path), tmp_path / "records", "narrow-lr0.1-seed3"
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
    changed = read_grid(tiny_grid.path, [change])
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


def test_a_grid_killed_while_it_writes_data_starts_again(tiny_grid, tmp_path, monkeypatch):
    def killed(path, rows):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write_rows(path, rows)

    written: list[Path] = []
    grid, write_rows = read_grid(tiny_grid.path), prepare.write_rows
    monkeypatch.setattr(prepare, "write_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        trial_runner.make_data(grid, tmp_path / "data")
    trial_runner.make_data(grid, tmp_path / "data")
    assert len(list((tmp_path / "data").rglob("*.gz"))) == 2 + len(TASKS)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"other: expected no folder or one with data.json, found none in it; delete"):
        trial_runner.make_data(grid, tmp_path / "other")


def test_a_task_without_questions_shows_before_anything_is_trained(tiny_grid, tmp_path):
    source = tmp_path / "suite"
    shutil.copytree(tiny_grid.folder / "suite", source)
    (source / "test" / "piqa.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match="expected tasks with rows to train on and to test, found none of piqa"):
        trial_runner.make_data(read_grid(tiny_grid.path, [f"data.source=folder:{source}"]), tmp_path / "data")


def test_a_step_waits_for_its_turn_and_for_other_processes(tiny_grid, tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "ENDING_SECONDS", 0.1)
    grid, records = read_grid(tiny_grid.path), tmp_path / "records"
    with pytest.raises(
        ValueError, match=r"whose turn it is, found others to be made first, such as clover-lr0.001-seed3"
    ):
        trial_runner.make(grid, "clover-lr0.3-seed3.test", tmp_path, records)
    try_others(grid, records)
    there = records / "clover-lr0.3-seed3.json"
    assert trial_runner.make(grid, "clover-lr0.3-seed3", tmp_path, records) == there  # what is there is not made again
    with (
        resuming.alone(records / ".base.test.lock", "base.test"),
        pytest.raises(ValueError, match="expected no other process to make it, found one"),
    ):
        trial_runner.make(grid, "base.test", tmp_path, records)


def test_a_step_outwaits_a_killed_process_that_is_still_ending(tiny_grid, tmp_path):
    """The process of a killed grid can hold its lock for a moment, and the grid is started again at once."""
    grid, records = read_grid(tiny_grid.path), tmp_path / "records"
    try_others(grid, records)
    held = resuming.alone(records / ".clover-lr0.3-seed3.lock", "it")
    held.__enter__()
    ending = threading.Timer(0.5, held.__exit__, (None, None, None))
    ending.start()
    made = trial_runner.make(grid, "clover-lr0.3-seed3", tmp_path, records)
    ending.join()
    assert made == records / "clover-lr0.3-seed3.json"


def test_what_was_trained_otherwise_is_not_taken(tiny_grid, tmp_path, monkeypatch):
    """Settings, rows or weights changed between two steps of one folder."""
    grid, step = read_grid(tiny_grid.path), "clover-lr0.001-seed3"
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
