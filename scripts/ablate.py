#!/usr/bin/env python
"""Compares methods on the commonsense suite: trains a grid of (method x learning rate x seed), and prints the table.

    python scripts/ablate.py --config configs/ablations/smollm2.yaml --out runs/smollm2
    python scripts/ablate.py --config configs/ablations/smollm2.yaml --out runs/smollm2 data.source=folder:my_suite
    python scripts/ablate.py --table runs/smollm2/records      # the table again, from the records alone

Every method tries as many learning rates, at the first seed, and keeps the one with the lowest loss on the validation
questions (with evaluation.mode=generate: that answers most of them). Then come the other seeds, and each seed meets
the test questions once. Each run is a process of its own; its output is in <out>/runs/<run>.log. Stop it at any time:
the same command goes on where it was, in the middle of a run too. With other rows, settings or weights (of a folder;
of the hub: another revision) it refuses to; methods and seeds may be added, and rates as long as the method has not
met the test questions.

Records, one a run, go to <out>/records (or --records); what is recorded there is not done again.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm.auto import tqdm

from clover_peft.experiments.ablation import report, results, trial_runner
from clover_peft.experiments.ablation.grid import Grid, count_steps, read_grid


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_intermixed_args(arguments)
    try:
        if given.table is not None:
            _refuse_unused(given, "--table", ("config", "out", "records", "minutes", "jobs", "step", "overrides"))
            return _show(given.table, given.pictures)
        if given.config is None or given.out is None:
            raise ValueError("expected --config and --out, or --table")
        if given.step is not None:
            _refuse_unused(given, "--step", ("minutes", "jobs", "pictures"))
        given.jobs = 1 if given.jobs is None else given.jobs
        if given.jobs < 1:
            raise ValueError(f"--jobs {given.jobs}: expected at least 1")
        records = given.records or given.out / "records"
        grid = read_grid(given.config, given.overrides)
        trial_runner.check_records(grid, records)
        if given.step is not None:
            print(trial_runner.make(grid, given.step, given.out, records))
            return 0
        trial_runner.make_data(grid, given.out / "data")
        if (status := _run(given, grid, records)) or not results.load(records):
            return status
        return _show(records, given.pictures or given.out / "pictures")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _refuse_unused(given: argparse.Namespace, what: str, keys: tuple[str, ...]) -> None:
    if unused := [key for key in keys if getattr(given, key) not in (None, [])]:
        raise ValueError(f"{unused[0]}: expected none beside {what}, which does not use it")


def _run(given: argparse.Namespace, grid: Grid, records: Path) -> int:
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
        raise ValueError("\n".join([*failed.values(), "the same command tries again what failed"]))
    return 0


def _start(given: argparse.Namespace, step: str, records: Path) -> subprocess.Popen:
    log = _log(given, step)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--config", str(given.config), "--out", str(given.out)]
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a YAML file, as in configs/ablations/")
    parser.add_argument("--out", type=Path, help="folder for data, adapters, predictions, logs and pictures")
    parser.add_argument("--records", type=Path, help="folder for records; by default <out>/records")
    parser.add_argument("--minutes", type=float, help="start no further run after so many")
    parser.add_argument("--jobs", type=int, help="processes at a time, on one GPU or sharing the cores; by default 1")
    parser.add_argument("--table", type=Path, metavar="RECORDS", help="only print the table of a folder of records")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="for pictures, table.md and table.csv")
    parser.add_argument("--step", help="make only this record: <method>-lr<rate>-seed<seed>, or the same with .test")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="on top of the file: seeds=[0,1]")
    return parser


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):  # or its processes would outlive it
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    sys.exit(main())
