"""Runs benchmarks on tiny shapes."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run(module: ModuleType, path: Path, *arguments: str) -> dict:
    """The record of a benchmark that is run on tiny shapes."""
    assert module.main(["--fast", "--device", "cpu", "--out", str(path), *arguments]) == path
    return json.loads(path.read_text())
