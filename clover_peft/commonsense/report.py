"""What a grid's records say: the table in the paper's layout, as Markdown and CSV, and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clover_peft.analysis.pictures import canvas

from .ablation import BASE, Record, difference, rows_of_table, trials
from .tasks import TASKS

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
    """The table in the paper's layout, what each method took, differences to the first, and where numbers are from."""
    rows = list(rows_of_table(found))
    if not rows:
        return _trials(found)
    tasks = [name for name in TASKS if name in rows[0]["tasks"]]
    order = sorted(rows, key=lambda row: (row["method"] == BASE, -row["average"]))
    sections = [
        _table(
            ["method", "params", *(_SHORT[name] for name in tasks), "avg ± sd", "95 %"],
            [
                [
                    row["method"],
                    f"{row['parameters']:,}" if row["parameters"] else "-",
                    *(f"{row['tasks'][name]:.1%}".rstrip("%") for name in tasks),
                    f"{100 * row['average']:.2f}" + (f" ± {100 * row['sd']:.2f}" if row["sd"] is not None else ""),
                    "{:.1f} to {:.1f}".format(*(100 * bound for bound in row["interval"])),
                ]
                for row in order
            ],
        ),
        _scale(rows),
        _table(
            ["method", "rate", "validation at each rate", "seeds", "init s", "train s", "peak MiB", "adapter MiB"],
            [
                [
                    row["method"],
                    f"{row['learning_rate']:g}",
                    ", ".join(f"{rate:g}: {_validation(*found)}" for rate, found in row["candidates"].items()),
                    len(row["seeds"]),
                    f"{row['init_seconds']:.1f}",
                    f"{row['train_seconds']:.0f}",
                    f"{row['peak_memory_bytes'] / 2**20:.0f}",
                    f"{row['adapter_bytes'] / 2**20:.1f}" if row["adapter_bytes"] else "-",
                ]
                for row in order
                if row["learning_rate"] is not None and row["train_seconds"] is not None
            ],
        ),
    ]
    trained = [row for row in rows if row["method"] != BASE]
    if len(trained) > 1:
        sections.append("\n".join(_versus(trained[0], other) for other in trained[1:]))
    records = (f"- {row['method']}: {', '.join(f'`{name}.json`' for name in row['records'])}" for row in order)
    sections.append("\n".join(["Records:", "", *records]))
    return "\n\n".join(sections)


def as_csv(found: dict[str, Record]) -> str:
    """The same numbers, one line a method and unrounded."""
    rows = [
        {
            "method": row["method"],
            "parameters": row["parameters"],
            "learning_rate": row["learning_rate"],
            **{name: row["tasks"][name] for name in row["tasks"]},
            **{key: row[key] for key in ("average", "sd")},
            "low": row["interval"][0],
            "high": row["interval"][1],
            **{key: row[key] for key in ("init_seconds", "train_seconds", "peak_memory_bytes", "adapter_bytes")},
            **{key: row[key] for key in ("train_rows", "questions", "unparsed")},
            "seeds": " ".join(map(str, row["seeds"])),
            "records": " ".join(row["records"]),
        }
        for row in rows_of_table(found)
    ]
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def plots(found: dict[str, Record], folder: Path) -> list[Path]:
    """Draws loss curves, accuracies with their intervals, and accuracy against parameters.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    pyplot, save, made = canvas(folder)
    rows = list(rows_of_table(found))
    trained = [row for row in rows if row["method"] != BASE]

    figure, axes = pyplot.subplots()
    for i, row in enumerate(trained):
        for k, losses in enumerate(row["losses"]):
            axes.plot(*zip(*losses, strict=True), color=f"C{i}", alpha=0.7, label=row["method"] if k == 0 else None)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    if trained:
        axes.legend()
    save("losses", figure)

    figure, axes = pyplot.subplots()
    for i, row in enumerate(rows):
        low, high = (100 * bound for bound in row["interval"])
        mean = 100 * row["average"]
        axes.bar(i, mean, color="grey" if row["method"] == BASE else f"C{i}", yerr=[[mean - low], [high - mean]])
        axes.plot([i] * len(row["averages"]), [100 * average for average in row["averages"]], "k.")
    axes.set_xticks(range(len(rows)), [row["method"] for row in rows], rotation=30)
    axes.set(ylabel="mean accuracy of the tasks, % (bars: 95 %, dots: seeds)")
    save("accuracies", figure)

    figure, axes = pyplot.subplots()
    for i, row in enumerate(trained):
        spread = 100 * row["sd"] if row["sd"] is not None else None
        axes.errorbar(
            row["parameters"], 100 * row["average"], yerr=spread, fmt="o", color=f"C{i}", label=row["method"]
        )
    axes.set(xlabel="trainable parameters", ylabel="mean accuracy, %", xscale="log")
    if trained:
        axes.legend()
    save("parameters", figure)
    return made


def _scale(rows: Sequence[Record]) -> str:
    """How much was trained on and asked, in words, so that nobody takes a small grid for a large one."""
    trained = sorted({row["train_rows"] for row in rows if row["train_rows"]})
    asked = sorted({row["questions"] for row in rows})
    unparsed = sum(row["unparsed"] for row in rows)
    seeds = sorted({len(row["seeds"]) for row in rows if row["seeds"]})
    return (
        f"Trained on {_numbers(trained)} rows, {_numbers(seeds)} seed(s); {_numbers(asked)} test questions; answers "
        f"that could not be parsed: {unparsed:,}. sd: of the seeds' averages; 95 %: of the questions."
    )


def _versus(one: Record, other: Record) -> str:
    gap, error = difference(one, other)
    words = f"{one['method']} against {other['method']}: {100 * gap:+.2f} points"
    return f"- {words}" + (f", standard error {100 * error:.2f}" if error is not None else " (one seed)")


def _trials(found: dict[str, Record]) -> str:
    """What a search found on the validation questions, every trial of it."""
    rows = trials(found)
    table = _table(
        ["method", "params", "rate", "validation loss", "accuracy", "rows", "train s", "record"],
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
    note = "No method has met the test questions."
    return f"{note}\n\n{table}" if rows else note


def _validation(accuracy: float, loss: float | None) -> str:
    return f"{accuracy:.1%}" + ("" if loss is None else f" (loss {loss:.3f})")


def _numbers(values: Sequence[int]) -> str:
    return " or ".join(f"{value:,}" for value in values) or "no"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
