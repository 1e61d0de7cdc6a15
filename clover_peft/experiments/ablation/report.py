"""The report of a grid: the table in the paper's layout, as Markdown and CSV, and pictures."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...io.figures import canvas
from ...io.tables import markdown_table
from ..commonsense import TASKS
from .grid import BASE
from .results import Record, TableRow, difference, made_with, table_rows, trials

_REFERENCE = "clover"  # The other methods are compared with this one, if it is in the table.
_COSTS = ["method", "rate", "validation at each rate", "seeds", "unparsed"]
_COSTS += ["init s", "train s", "peak MiB", "adapter MiB"]
_SHORT = {
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "social_i_qa": "SIQA",
    "hellaswag": "HellaS.",
    "winogrande": "WinoG.",
    "ARC-Easy": "ARC-e",
    "ARC-Challenge": "ARC-c",
    "openbookqa": "OBQA",
}


def markdown(found: dict[str, Record]) -> str:
    """Write the report: the table, the costs of each method, differences to CLOVER, and the origin of the numbers."""
    rows = table_rows(found)
    if not rows:
        return _trials(found)
    tasks = [name for name in TASKS if name in rows[0].tasks]
    order = sorted(rows, key=lambda row: (row.method == BASE, -row.average))
    trained = [row for row in order if row.method != BASE]
    sections = [
        markdown_table(
            ["method", "params", *(_SHORT[name] for name in tasks), "avg ± sd", "95 %", "loss"],
            [
                [
                    row.method,
                    f"{row.parameters:,}" if row.parameters else "-",
                    *(f"{row.tasks[name]:.1%}".rstrip("%") for name in tasks),
                    f"{100 * row.average:.2f}" + (f" ± {100 * row.sd:.2f}" if row.sd is not None else ""),
                    "{:.1f} to {:.1f}".format(*(100 * bound for bound in row.interval)),
                    "-" if row.loss is None else f"{row.loss:.3f}",
                ]
                for row in order
            ],
        ),
        _scale(rows),
        markdown_table(
            _COSTS,
            [
                [
                    row.method,
                    f"{row.learning_rate:g}" + " (edge)" * row.at_edge,
                    ", ".join(f"{rate:g}: {_validation(*found)}" for rate, found in row.candidates.items()),
                    len(row.seeds),
                    row.unparsed,
                    "-" if row.init_seconds is None else f"{row.init_seconds:.1f}",
                    "-" if row.train_seconds is None else f"{row.train_seconds:.0f}",
                    "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:.0f}",
                    f"{row.adapter_bytes / 2**20:.1f}" if row.adapter_bytes else "-",
                ]
                for row in trained
            ],
        ),
        "Losses are in nats, of the right option among its question's. (edge): the best of the rates tried was the "
        "lowest or the highest of them. Seconds compare where one run at a time had the machine; peak: of the GPU "
        "where there is one, else of the process.",
    ]
    if len(trained) > 1:
        reference = next((row for row in trained if row.method == _REFERENCE), trained[0])
        sections.append("\n".join(_versus(reference, other) for other in trained if other is not reference))
    sections.append(_made([row.made for row in rows]))
    if missing := [name for row in trained for name in row.missing]:
        sections.append(f"Rates were also chosen from records that are not here: {', '.join(missing)}.")
    records = (f"- {row.method}: {', '.join(f'`{name}.json`' for name in row.records)}" for row in order)
    sections.append("\n".join(["Records:", "", *records]))
    return "\n\n".join(sections)


def as_csv(found: dict[str, Record]) -> str:
    """Write the same numbers, unrounded, one line for each method; for a search, one line for each trial."""
    rows: list[dict[str, Any]] = [
        {
            "method": row.method,
            "parameters": row.parameters,
            "learning_rate": row.learning_rate,
            **row.tasks,
            "average": row.average,
            "sd": row.sd,
            "low": row.interval[0],
            "high": row.interval[1],
            "loss": row.loss,
            "init_seconds": row.init_seconds,
            "train_seconds": row.train_seconds,
            "peak_memory_bytes": row.peak_memory_bytes,
            "adapter_bytes": row.adapter_bytes,
            "train_rows": row.train_rows,
            "steps": row.steps,
            "questions": row.questions,
            "unparsed": row.unparsed,
            "seeds": " ".join(map(str, row.seeds)),
            "records": " ".join(row.records),
        }
        for row in table_rows(found)
    ] or trials(found)
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def plots(found: dict[str, Record], folder: Path) -> list[Path]:
    """Draw validation losses by learning rate and, if there are test results, three more pictures.

    These are loss curves, accuracies with their intervals, and accuracy against trainable parameters.

    Returns:
        The files drawn.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    pyplot, save, made = canvas(folder)
    rows = table_rows(found)
    trained = [row for row in rows if row.method != BASE]

    figure, axes = pyplot.subplots()
    tried = [trial for trial in trials(found) if trial["loss"] is not None]
    for i, method in enumerate(sorted({trial["method"] for trial in tried})):
        points = sorted((t["learning_rate"], t["loss"]) for t in tried if t["method"] == method)
        axes.plot(*zip(*points, strict=True), "o-", color=f"C{i}", label=method)
    axes.set(xlabel="learning rate", ylabel="validation loss, nats", xscale="log")
    if tried:
        axes.legend()
    save("rates", figure)
    if not rows:
        return made

    figure, axes = pyplot.subplots()
    for i, row in enumerate(trained):
        for k, losses in enumerate(row.losses):
            axes.plot(*zip(*losses, strict=True), color=f"C{i}", alpha=0.7, label=row.method if k == 0 else None)
    axes.set(xlabel="step", ylabel="training loss, nats", yscale="log")
    if trained:
        axes.legend()
    save("losses", figure)

    figure, axes = pyplot.subplots()
    for i, row in enumerate(rows):
        low, high = (100 * bound for bound in row.interval)
        mean = 100 * row.average
        axes.bar(i, mean, color="grey" if row.method == BASE else f"C{i}", yerr=[[mean - low], [high - mean]])
        axes.plot([i] * len(row.averages), [100 * average for average in row.averages], "k.")
    axes.set_xticks(range(len(rows)), [row.method for row in rows], rotation=30)
    axes.set(ylabel="mean accuracy of the tasks, % (bars: 95 %, dots: seeds)")
    save("accuracies", figure)

    figure, axes = pyplot.subplots()
    for i, row in enumerate(trained):
        spread = 100 * row.sd if row.sd is not None else None
        axes.errorbar(row.parameters, 100 * row.average, yerr=spread, fmt="o", color=f"C{i}", label=row.method)
    axes.set(xlabel="trainable parameters", ylabel="mean accuracy, %", xscale="log")
    if trained:
        axes.legend()
    save("parameters", figure)
    return made


def _scale(rows: Sequence[TableRow]) -> str:
    """State the numbers of rows, steps, seeds and questions, so that nobody takes a small grid for a large one."""
    trained = sorted({row.train_rows for row in rows if row.train_rows})
    steps = sorted({row.steps for row in rows if row.steps})
    asked = sorted({row.questions for row in rows})
    seeds = sorted({len(row.seeds) for row in rows if row.seeds})
    guessing = [TASKS[name].guessing for name in rows[0].tasks]
    return (
        f"Trained on {_numbers(trained)} rows in {_numbers(steps)} steps, {_numbers(seeds)} seed(s); "
        f"{_numbers(asked)} test questions, of which guessing answers {statistics.mean(guessing):.1%} (loss "
        f"{-statistics.mean(map(math.log, guessing)):.3f}). sd: of the seeds' averages; 95 %: of the questions."
    )


def _made(parts: Sequence[dict[str, set[str]]]) -> str:
    """List the origins of the numbers; where there are two of a kind, the numbers may not compare.

    Of the settings only those are listed in which runs differ.
    """
    found: dict[str, set[str]] = {what: set().union(*(part[what] for part in parts)) for what in parts[0]}
    runs = [json.loads(text) for text in found["settings"]]
    values = {key: {json.dumps(run.get(key)) for run in runs} for key in set().union(*runs)}
    found["settings"] = {f"{key} {' or '.join(sorted(each))}" for key, each in values.items() if len(each) > 1}
    lines = [f"- {what}: {'; '.join(sorted(texts))}" for what, texts in found.items() if texts]
    return "\n".join(["Made with:", "", *lines])


def _versus(one: TableRow, other: TableRow) -> str:
    found = difference(one, other)
    words = f"- {one.method} against {other.method}: {100 * found.points:+.2f} points"
    errors = [
        f"{100 * error:.2f} {of}"
        for error, of in ((found.of_seeds, "of the seeds"), (found.of_questions, "of the questions, in pairs"))
        if error is not None
    ]
    if found.of_seeds is None:
        errors.append("one seed")
    return f"{words} (standard error: {', '.join(errors)})"


def _trials(found: dict[str, Record]) -> str:
    """Write the table of a search: the results of every trial on the validation questions."""
    rows = trials(found)
    table = markdown_table(
        ["method", "params", "rate", "validation loss", "validation accuracy", "training rows", "train s", "record"],
        [
            [
                row["method"],
                f"{row['parameters']:,}",
                f"{row['learning_rate']:g}",
                "-" if row["loss"] is None else f"{row['loss']:.4f}",
                f"{row['accuracy']:.1%}",
                f"{row['train_rows']:,}",
                f"{row['train_seconds']:.0f}",
                f"`{row['name']}.json`",
            ]
            for row in rows
        ],
    )
    note = "No method has answered the test questions yet."
    return f"{note}\n\n{table}\n\n{_made([made_with(list(found.values()))])}" if rows else note


def _validation(accuracy: float, loss: float | None) -> str:
    return f"{accuracy:.1%}" + ("" if loss is None else f" (loss {loss:.3f})")


def _numbers(values: Sequence[int]) -> str:
    return " or ".join(f"{value:,}" for value in values) or "no"
