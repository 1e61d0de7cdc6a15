"""Fixtures of the training job."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.tiny_chat import rows, save_chat_model, write_jsonl

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """A folder with a tiny chat model, and a file of 60 rows."""
    folder = tmp_path_factory.mktemp("tiny")
    save_chat_model(folder / "model")
    (folder / "model" / "README.md").write_text("---\nlicense: mit\nbase_model: someone/tiny\n---\n")
    return SimpleNamespace(model=folder / "model", data=write_jsonl(folder / "train.jsonl", rows(60)), path=folder)


@pytest.fixture
def settings(tiny, tmp_path):
    """Makes the settings of a run of three steps on the tiny chat model."""
    from clover_peft.experiments.training.arguments import parse  # needs the train extra, as only some tests do

    def make(config: str = "clover_full", out: str = "run", **overrides):
        chosen = {
            "model": tiny.model,
            "data": tiny.data,
            "output_dir": tmp_path / out,
            "rows": 40,
            "held_out_rows": 8,
            "questions": 2,
            "answer_tokens": 6,
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "logging_steps": 1,
            "warmup_steps": 0,
            "disable_tqdm": True,
            **overrides,
        }
        pairs = [f"{key}={json.dumps(v) if isinstance(v, (dict, list, bool)) else v}" for key, v in chosen.items()]
        return parse(ROOT / "configs" / f"{config}.yaml", pairs)

    return make
