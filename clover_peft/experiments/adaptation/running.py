"""Runs an experiment's trials: in one process or several, each trial in one of them, on from where it was cut off."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ...io import run_record as records
from . import report
from .plan import BASE, Experiment, Trial
from .trial import Laboratory, OnStep


def pending(experiment: Experiment, results: Path) -> list[Trial]:
    """The trials without a record.

    Raises:
        ValueError: a record was made with other settings, or on test text with another first rate.
    """
    found, remedy = report.load(results), "set it as before, or choose another --out"
    for trial in experiment.trials():
        if trial.name in found:
            record, file = found[trial.name], str(results / f"{trial.name}.json")
            records.check_same(record["settings"], experiment.settings(trial), file, remedy)
            if trial.arm != BASE and record["split"] == "test":
                first = {"first_rate": experiment.arm(trial.arm).rates[0]}
                records.check_same({"first_rate": record["first_rate"]}, first, file, remedy)
    return [trial for trial in experiment.trials() if trial.name not in found]


def run(experiment: Experiment, out: Path, on_step: OnStep | None = None) -> None:
    """Makes the records that are missing, in this process; passes over trials that another process is at.

    Raises:
        ValueError: a record or checkpoint was made with other settings, model or text.
    """
    results = out / "records"
    pending(experiment, results)
    laboratory = Laboratory(experiment, out, on_step)
    for record in report.load(results).values():
        for key, now in laboratory.facts.items():
            records.check_same(record[key], now, str(results), "choose another --out", f"{key}.")
    for trial in experiment.trials():
        try:
            held = FileLock(_lock(out, trial)).acquire(timeout=0)
        except Timeout:
            print(f"{trial.name}: another process is at it", flush=True)
            continue
        with held:
            if trial not in pending(experiment, results):
                continue
            print(f"{trial.name}: begins", flush=True)
            record = laboratory.run(trial)
            print(f"{trial.name}: {_summary(record)}", flush=True)
            records.write(results / f"{trial.name}.json", record)
            (out / "checkpoints" / f"{trial.name}.pt").unlink(missing_ok=True)


def run_in_processes(experiment: Experiment, out: Path, count: int) -> None:
    """Does what `run` does in several processes of one thread each: together they are faster than one with more.

    Raises:
        ValueError: one of them failed.
    """
    if not pending(experiment, out / "records"):
        count = 1  # Which only checks that the records are of this model and text.
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use threads or a GPU of its parent's
    processes = [spawn.Process(target=_run_in_one_thread, args=(experiment, out)) for _ in range(count)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:  # those that still run go on from their checkpoints the next time
        for process in processes:
            if process.is_alive():
                process.terminate()
    if failed := [process for process in processes if process.exitcode]:
        raise ValueError(f"{len(failed)} of {count} processes failed; the same command goes on where they were")


def _run_in_one_thread(experiment: Experiment, out: Path) -> None:
    torch.set_num_threads(1)
    try:
        run(experiment, out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def show(results: Path, folder: Path | None, reference: str | None = None) -> str:
    """The tables of a folder of records, also written to a folder with the pictures.

    Args:
        results: the records.
        folder: for tables and pictures; None for neither.
        reference: the arm that the others are compared with; None for the first.

    Raises:
        ValueError: there are no records, or no such arm.
    """
    found = report.load(results)
    if not found:
        raise ValueError(f"{results}: expected a folder of records, found none")
    shown = report.markdown(found, reference)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(shown + "\n", encoding="utf-8")
        try:
            report.pictures(found, folder)
        except (ValueError, KeyError) as error:  # no matplotlib, or no record of the base yet
            print(f"no pictures: {error}", file=sys.stderr)
    return shown


def _lock(out: Path, trial: Trial) -> Path:
    folder = out / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{trial.name}.lock"


def _summary(record: report.Record) -> str:
    if report.is_diverged(record):
        return f"diverged at step {record['diverged_at_step']}"
    losses = ", ".join(f"{name} {report.mean_loss([record], name):.4f}" for name in record["losses"])
    return f"{losses}, {torch.get_num_threads()} threads, {record['measure_seconds']:.0f} s to measure"
