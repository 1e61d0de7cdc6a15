"""Measures what methods learn of a text domain, and what they forget of others, over their learning rates.

    python -m clover_peft.experiments.adaptation --config configs/ablations/adaptation_probe.yaml --out runs/adaptation
    python -m clover_peft.experiments.adaptation --table runs/adaptation/records       # from the records alone

Stop it at any time: the same command goes on where it was, in the middle of a trial too. Several may run at once, also
on several machines that share the folder. Records, one a trial, go to <out>/records, tables and pictures to
<out>/pictures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import running
from .plan import fast, read_experiment


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its status."""
    given = _parser().parse_intermixed_args(arguments)
    try:
        if given.table is not None:
            print(running.show(given.table, given.pictures))
            return 0
        if given.config is None or given.out is None:
            raise ValueError("expected --config and --out, or --table")
        changes = [f"domains.{Path(path).stem}=text:{path}" for path in given.text] + given.overrides
        experiment = read_experiment(given.config, changes)
        if given.fast:
            experiment = fast(experiment)
        if given.workers > 1:
            running.pending(experiment, given.out / "records")
            same = ["--config", str(given.config), "--out", str(given.out), *["--fast"] * given.fast, *changes]
            running.run_in_processes(same, given.workers)
        else:
            running.run(experiment, given.out)
        print(running.show(given.out / "records", given.pictures or given.out / "pictures"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clover_peft.experiments.adaptation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="a YAML file, as configs/ablations/adaptation_*.yaml")
    parser.add_argument("--out", type=Path, help="folder for records, checkpoints, adapters and pictures")
    parser.add_argument("--fast", action="store_true", help="a tiny model and two trials, in seconds, as a test")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each; by default this one")
    parser.add_argument(
        "--text", action="append", default=[], metavar="FILE", help="one more domain, from a text file"
    )
    parser.add_argument("--table", type=Path, metavar="RECORDS", help="only print the tables of a folder of records")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="for table.md and pictures")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="on top of the file: training.steps=60")
    return parser


if __name__ == "__main__":
    sys.exit(main())
