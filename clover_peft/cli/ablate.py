"""`clover ablate`: trains a grid of (method x learning rate x seed), and prints its results.

A configuration with the key `domains` is an adaptation experiment; any other is a grid of the commonsense suite.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from ..experiments.ablation import report, results, trial_runner
from ..experiments.ablation.grid import Grid, count_steps, read_grid
from ..experiments.adaptation import mechanism, plan, running
from ..experiments.adaptation import report as adaptation
from ..experiments.adaptation.trial import Laboratory
from . import checks, parsers
from .errors import reports_errors


@reports_errors()
def run(given: argparse.Namespace) -> int:
    checks.ablate(given)
    if given.table is not None:
        if adaptation.load(given.table):
            print(running.show(given.table, given.pictures, given.reference))
            return 0
        if given.reference is not None:
            raise ValueError(f"--reference: expected records of an adaptation experiment, found none in {given.table}")
        return _show(given.table, given.pictures)
    given.jobs = 1 if given.jobs is None else given.jobs
    if plan.is_experiment(given.config):
        return _adapt(given)
    records = given.records or given.out / "records"
    grid = read_grid(given.config, given.overrides)
    trial_runner.check_records(grid, records)
    with _exits_on_signals():
        if given.step is not None:
            print(trial_runner.make(grid, given.step, given.out, records))
            return 0
        trial_runner.make_data(grid, given.out / "data")
        status = _make_all(given, grid, records)
    if status or not results.load(records):
        return status
    return _show(records, given.pictures or given.out / "pictures")


def _adapt(given: argparse.Namespace) -> int:
    """Runs an adaptation experiment, and prints its tables."""
    experiment = plan.read_experiment(given.config, given.overrides)
    with _exits_on_signals():
        if given.jobs > 1:
            running.run_in_processes(experiment, given.out, given.jobs)
        else:
            running.run(experiment, given.out)
        if given.mechanism:
            mechanism.measure_all(Laboratory(experiment, given.out))
    pictures = given.pictures or given.out / "pictures"
    found = adaptation.load(given.out / "records")
    made = {record["trial"]["arm"] for record in found.values()}
    reference = given.reference or next((arm.name for arm in experiment.arms if arm.name in made), None)
    print(running.show(given.out / "records", pictures, reference))
    if given.mechanism:
        print(mechanism.markdown(given.out / "records", given.out / "mechanism"))
        try:
            mechanism.picture(given.out / "records", given.out / "mechanism", pictures)
        except ValueError as error:  # no matplotlib
            print(f"no pictures: {error}", file=sys.stderr)
    return 0


@contextmanager
def _exits_on_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise SystemExit: without that, the processes of the runs would outlive this one."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), leave) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def _make_all(given: argparse.Namespace, grid: Grid, records: Path) -> int:
    """Makes record after record, each in a process of its own: memory and random numbers start anew.

    One that fails does not stop those that can be made without it; it is named at the end.
    """
    started = time.monotonic()
    running: dict[str, subprocess.Popen] = {}
    failed: dict[str, str] = {}
    with tqdm(total=count_steps(grid), initial=len(results.load(records)), unit="record") as bar:
        try:
            while True:
                ready = [s for s in trial_runner.ready_steps(grid, records) if s not in running and s not in failed]
                if ready and given.minutes is not None and time.monotonic() - started > 60 * given.minutes:
                    if not running:
                        bar.write(f"stopping after {given.minutes} minutes; next would be {ready[0]}")
                        break
                    ready = []
                for step in ready[: given.jobs - len(running)]:
                    running[step] = _start(given, step, records)
                if not running:
                    break
                bar.set_description(", ".join(running))
                while not (ended := [step for step, process in running.items() if process.poll() is not None]):
                    time.sleep(0.2)
                for step in ended:
                    if status := running.pop(step).returncode:
                        log = _log(given, step)
                        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
                        failed[step] = f"{step}: ended with status {status}, see {log}:\n{tail}"
                        bar.write(failed[step])
                    else:
                        bar.update()
        finally:  # those that still run go on from their checkpoints the next time
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
    if failed:
        lines = [*failed.values(), "the same command tries the failed ones again"]
        print("error: " + "\n".join(lines), file=sys.stderr)
    return int(bool(failed))


def _start(given: argparse.Namespace, step: str, records: Path) -> subprocess.Popen:
    log = _log(given, step)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "clover_peft", "ablate", "--config", str(given.config), "--out", str(given.out)]
    command += ["--records", str(records), "--step", step, *given.overrides]
    environment = dict(os.environ)
    if given.jobs > 1:  # processes that share the cores must not each take all of them
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // given.jobs)))
    with log.open("a", encoding="utf-8") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def _log(given: argparse.Namespace, step: str) -> Path:
    return Path(given.out / "runs" / f"{step}.log")


def _show(records: Path, folder: Path | None) -> int:
    """Prints the table, and writes it with its pictures."""
    found = results.load(records)
    if not found:
        raise ValueError(f"{records}: expected a folder of records, found none")
    shown = report.markdown(found)
    print(shown)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(shown + "\n", encoding="utf-8")
        (folder / "table.csv").write_text(report.as_csv(found), encoding="utf-8")
        try:
            for path in report.plots(found, folder):
                print(path, file=sys.stderr)
        except ValueError as error:  # no matplotlib
            print(f"no pictures: {error}", file=sys.stderr)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parsers.ablate(arguments))
