"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """Format a table; a `|` in a cell is escaped.

    Args:
        header: the columns' titles.
        rows: as many cells each, shown with `str`.
        left: how many columns, from the first on, are aligned to the left; figures follow, aligned to the right.

    Returns:
        The table's lines, without a newline at the end.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    lines = [header, ["---" if i < left else "---:" for i in range(len(header))], *rows]
    if wrong := next((line for line in lines if len(line) != len(header)), None):
        raise ValueError(f"table: expected {len(header)} cells a row, found {len(wrong)}: {wrong}")
    return "\n".join("|" + "|".join(map(_cell, line)) + "|" for line in lines)


def _cell(value: object) -> str:
    text = str(value).replace("|", r"\|")
    return f" {text} " if text else " "
