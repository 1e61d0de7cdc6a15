"""The benchmark of slicing on a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.support.benchmarks import run


def test_every_setting_is_measured(benchmark, tmp_path, capsys):
    pytest.importorskip("trl", reason="needs the train extra")
    record = run(benchmark("slicing"), tmp_path / "record.json", "--ratio", "0.125", "0.25", "--why")
    dense, *rows = record["rows"]
    assert dense["rotation"] is None
    assert [(row["ratio"], row["rotation"]) for row in rows] == [
        (ratio, rotation) for ratio in (0.125, 0.25) for rotation in ("shared", "per_block")
    ]
    for row in rows:
        assert row["report"]["width"] == [48, round(48 * (1 - row["ratio"]) / 4) * 4]
        assert row["report"]["parameters"][1] == row["parameters"]
        assert row["halved"]["parameters"] < row["parameters"]
        assert row["v_dense"] == pytest.approx(row["perplexity"] / record["dense"]["perplexity"])
        assert row["seconds"] > 0
    assert set(record["targets"]) == {"shared at 12.50%", "per_block at 12.50%"}
    assert record["data"] == {"calibration_tokens": 512, "measured_tokens": 128}
    places = record["why"]["v_dense_of_one_place"]
    assert len(places) == 6
    assert all(figure != 1 for figure in places.values())
    assert record["why"]["energy_of_leading"]["48"] == pytest.approx(1)
    assert "per_block 12.50%" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a process's peak cannot be set back here")
def test_the_peak_of_memory_is_that_of_slicing(benchmark, tmp_path):
    pytest.importorskip("trl", reason="needs the train extra")
    module = benchmark("slicing")
    # Numbers of a gigabyte, given back before anything is measured.
    torch.ones(2**28)
    held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20
    record = run(module, tmp_path / "record.json", "--ratio", "0.25", "--without-clover")
    for row in record["rows"][1:]:
        assert 0 < row["peak_megabytes"] < held + 512


def test_an_interrupted_run_goes_on_with_the_rows_that_are_missing(benchmark, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="needs the train extra")
    module, path = benchmark("slicing"), tmp_path / "record.json"
    sliced, slice_ = [], module.clover_peft.slice_hidden_size

    def interrupt(*args, **kwargs):
        sliced.append(kwargs["rotation"])
        if len(sliced) == 2:
            raise KeyboardInterrupt
        return slice_(*args, **kwargs)

    monkeypatch.setattr(module.clover_peft, "slice_hidden_size", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(module, path, "--ratio", "0.25")
    [rows] = tmp_path.glob("record.*.rows.json")
    kept = json.loads(rows.read_text())["rows"]
    assert len(kept) == 3
    record = run(module, path, "--ratio", "0.25")
    assert sliced == ["shared", "per_block", "per_block"]
    assert record["rows"][:2] == [each["row"] for each in kept[1:]]
    assert not rows.exists()
