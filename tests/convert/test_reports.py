"""Reports of conversions are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clover_peft.convert import ConversionReport, SlicingReport

SIZES = {"parameters": (10, 8), "tokens": 9}
REPORTS = [
    ConversionReport(
        "clover", 4, 8, [0, 5], [1.0, 0.1], "default", [], cache_bytes=(4, 2), seconds={"latent": 1.0}, **SIZES
    ),
    SlicingReport("shared", True, (48, 36), {"model.norm": 0.9}, seconds=1.0, **SIZES),
]


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: type(report).__name__)
def test_a_failed_write_keeps_the_earlier_report(report, tmp_path, monkeypatch):
    path, write = tmp_path / "report.json", Path.write_text
    report.save(path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(report.to_dict()))
    before = path.read_bytes()

    def full_disk(self, text, **options):
        write(self, text[:5], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        report.save(path)
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["report.json"]
