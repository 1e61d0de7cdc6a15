"""Fixtures of the tuner."""

from __future__ import annotations

import pytest

from clover_peft.tuner.block_spec import BlockSpec


@pytest.fixture
def folds(monkeypatch):
    """The parts of the slices that were folded, in order."""
    calls: list[str] = []
    plain = BlockSpec.map
    monkeypatch.setattr(BlockSpec, "map", lambda self, tensors: calls.append(self.part) or plain(self, tensors))
    return calls
