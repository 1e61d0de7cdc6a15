"""docs/results/pruning_tables.md, from records alone.

python scripts/pruning_tables.py
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results" / "pruning_tables.md"
KINDS = {("qk",): "Q-K", ("vo",): "V-O", ("qk", "vo"): "Q-K and V-O, as much of each"}
OTHER_TEXT = "calibration_text-2"  # the record of text that was not calibrated with
NAMES = {"clover": "CLOVER", "vanilla": "vanilla"}
HEAD = """# Tables of pruning

`python scripts/pruning_tables.py` makes this page from the records in `benchmarks/results/`. [Pruning](pruning.md) \
says what the tables show. A row names the method, whether it had calibration data or the weights alone, and how \
ranks are spread; a column is a share of directions removed, over all heads of a kind. Bold is the best of a column.
"""

Row = Mapping[str, Any]


def page() -> str:
    """The text of the page."""
    parts = [HEAD]
    for heading, (about, cell, best, names) in PARTS.items():
        parts.append(f"## {heading}\n\n{about} Records: {', '.join(map(_link, names))}.\n")
        parts += [f"### {heading}: {KINDS[kinds]}\n\n{table}\n" for kinds, table in _tables(names, cell, best)]
    return "\n".join([*parts, _other_text()])


def _other_text() -> str:
    record = _read(OTHER_TEXT)
    options, texts = record["options"], [*record["unpruned"]["losses"]]
    lines = [
        f"| calibrated with | V-O removed | {' | '.join(f'on {text}' for text in texts)} |",
        "| --- | ---: |" + " ---: |" * len(texts),
    ]
    for row in record["pruned"]:
        cells = [f"{rise:+.3f} ({error:.3f})" for rise, error in (row["rises"][text] for text in texts)]
        lines.append(f"| {row['calibrated_with']} | {100 * row['ratio']:g} % | {' | '.join(cells)} |")
    table = "\n".join(lines)
    return (
        f"## Text that was not calibrated with\n\nSmolLM2-135M-Instruct, `{options['ranks']}`: rise of the loss in "
        f"nats a token on {options['windows']} held-out windows of each text, calibrated with "
        f"{options['calibration_windows']} windows of one text, a third of them of each (all), as many tokens that "
        "the model writes (own), or half of these and half of WikiText-2. Brackets hold standard errors, paired over "
        f"windows. Record: {_link(OTHER_TEXT)}.\n\n{table}\n"
    )


def _tables(names: Mapping[str, bool | None], cell: Cell, best: Best) -> Iterable[tuple[tuple[str, ...], str]]:
    """The kinds of pairs, and the table of all settings that remove the same share of them.

    Args:
        names: record -> whether its rows with data are taken, or those without; None for both.
        cell: the figure of a row that decides what is best, and its text; from the record's unpruned figures.
        best: of such figures.
    """
    found: dict[tuple[str, ...], dict[str, dict[float, tuple[float, str]]]] = {}
    for name, calibrated in names.items():
        record = _read(name)
        for row in record["pruned"]:
            setting = row["setting"]
            kinds = tuple(kind for kind in ("qk", "vo") if setting[kind] is not None)
            shares = {setting[kind] for kind in kinds}
            plain = len(shares) == 1 and setting["target_modules"] is None and setting["multiple"] == 1
            if plain and calibrated in (None, setting["calibrated"]):
                data = "data" if setting["calibrated"] else "weights"
                label = f"{NAMES[setting['method']]}, {data}, {setting['ranks']}"
                found.setdefault(kinds, {}).setdefault(label, {})[shares.pop()] = cell(row, record["unpruned"])
    for kinds in KINDS:
        if rows := found.get(kinds):
            columns = sorted({share for cells in rows.values() for share in cells})
            tops = {share: best(cells[share][0] for cells in rows.values() if share in cells) for share in columns}
            lines = [
                f"| | {' | '.join(f'{100 * share:g} %' for share in columns)} |",
                "| --- |" + " ---: |" * len(columns),
            ]
            for label, cells in rows.items():
                texts = [
                    ""
                    if share not in cells
                    else f"**{cells[share][1]}**"
                    if cells[share][0] == tops[share]
                    else cells[share][1]
                    for share in columns
                ]
                lines.append(f"| {label} | {' | '.join(texts)} |")
            yield kinds, "\n".join(lines)


def _perplexity(row: Row, unpruned: Row) -> tuple[float, str]:
    """Perplexity against the unpruned model's, with a standard error where the record has the losses of windows."""
    figures = row["figures"]
    ratio = figures["perplexity"] / unpruned["perplexity"]
    if ratio >= 100:
        return ratio, f"{ratio:,.0f}"
    if "losses" not in figures:
        return ratio, f"{ratio:.3f}"
    rises = [after - before for after, before in zip(figures["losses"], unpruned["losses"], strict=True)]
    return ratio, f"{ratio:.3f} ({ratio * statistics.stdev(rises) / math.sqrt(len(rises)):.3f})"


def _cosine(row: Row, _: Row) -> tuple[float, str]:
    figures = row["figures"]
    error = f" ({figures['cosine_error']:.4f})" if "cosine_error" in figures else ""
    return figures["cosine"], f"{figures['cosine']:.4f}{error}"


def _divergence(row: Row, _: Row) -> tuple[float, str]:
    figures = row["figures"]
    return figures["jfk_kl"], f"{figures['jfk_kl']:.4f}, {100 * figures['jfk_wer']:.0f} %"


def _read(name: str) -> Any:
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


def _link(name: str) -> str:
    return f"[`{name}.json`](../../benchmarks/results/{name}.json)"


Cell = Callable[[Row, Row], tuple[float, str]]
Best = Callable[[Iterable[float]], float]
# Heading -> what it shows, its figure, which one is best, and its records: with data, without, or both.
PARTS: dict[str, tuple[str, Cell, Best, dict[str, bool | None]]] = {
    "SmolLM2-135M-Instruct": (
        "Perplexity against the unpruned model's, on the first 12 windows of 1,024 tokens of WikiText-2's test set; "
        "calibrated with 32 windows of its training set. Brackets hold standard errors, paired over the windows.",
        _perplexity,
        min,
        {"pruning_smollm2-7": True, "pruning_smollm2-2": False},
    ),
    "MiniLM-L6": (
        "Cosine to the unpruned embedding, on 512 sentences of WikiText-2's test set; calibrated with 512 sentences "
        "of its training set. Brackets hold standard errors over sentences.",
        _cosine,
        max,
        {"pruning_minilm-7": True, "pruning_minilm-4": False},
    ),
    "Whisper tiny.en": (
        "KL divergence from the unpruned model on unseen speech, in nats a token, and the rate of wrong words of its "
        "transcript, which has 22; calibrated with five clips (25 s of speech, repeated to fill the window).",
        _divergence,
        min,
        {"pruning_whisper-8": True, "pruning_whisper-4": False},
    ),
}


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
