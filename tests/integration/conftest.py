"""Fixtures of the benchmarks."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from tests.support.benchmarks import FOLDER


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark by its name."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)

    return load
