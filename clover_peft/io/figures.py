"""Where pictures are drawn (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def find_pyplot() -> Any:
    """matplotlib's `pyplot`, without a screen.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        remedy = 'pass --no-pictures, or pip install "clover-peft[plots]"'
        raise ValueError(f"pictures: expected matplotlib, found none; {remedy}") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def canvas(folder: Path) -> tuple[Any, Callable[[str, Any], None], list[Path]]:
    """What pictures are drawn with, without a screen.

    Returns:
        matplotlib's `pyplot`, a function that saves a figure under a name in the folder, and the list of those saved.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    pyplot = find_pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []

    def save(name: str, figure: Any) -> None:
        figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
        pyplot.close(figure)
        made.append(folder / f"{name}.png")

    return pyplot, save, made
