"""Drawing with matplotlib, without a screen."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .extras import how_to_install


def check_pyplot() -> None:
    """Raises ValueError if matplotlib is not installed; imports nothing."""
    if find_spec("matplotlib") is None:
        remedy = f"pass --no-pictures, or {how_to_install('plots')}"
        raise ValueError(f"pictures: expected matplotlib, found none; {remedy}")


def find_pyplot() -> Any:
    """Import matplotlib's `pyplot` for drawing into files.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    check_pyplot()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def canvas(folder: Path) -> tuple[Any, Callable[[str, Any], None], list[Path]]:
    """Prepare to draw pictures into a folder.

    Args:
        folder: made if it does not exist.

    Returns:
        matplotlib's `pyplot`; a function `save(name, figure)` that writes `folder/name.png` and closes the figure; and
        the list of the files saved so far.

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
