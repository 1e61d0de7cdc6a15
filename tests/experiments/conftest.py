"""Fixtures of the training job and of grids of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

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


@pytest.fixture(scope="module")
def tiny_grid(tmp_path_factory) -> SimpleNamespace:
    """A model, a suite of 12 training rows a task, and a grid of two methods, two rates and two seeds over them."""
    from clover_peft.experiments.commonsense import TASKS, Example, prepare, render  # needs the train extra

    folder = tmp_path_factory.mktemp("ablation")
    save_chat_model(folder / "model")

    def part(name: str, split: str, count: int) -> list[dict]:
        task = TASKS[name]
        choices = ("a", "b", "c", "d", "e")[: task.most] if task.word else ()
        return [render(task, Example(f"{name} {split} {i}", choices, i % 2)) for i in range(count)]

    train, test = (prepare.number({n: part(n, s, c) for n in TASKS}, s) for s, c in (("train", 12), ("test", 4)))
    prepare.write(prepare.Suite(train, test), folder / "suite", {})
    model = {
        "model": str(folder / "model"),
        "methods": {"clover": {"peft_type": "CLOVER"}, "lora": {"peft_type": "LORA", "r": 4}},
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(model))
    grid = {
        "base": [str(folder / "model.yaml")],
        "settings": {"prompt": "clover", "max_steps": 5, "per_device_train_batch_size": 4, "save_steps": 2},
        "data": {"source": f"folder:{folder / 'suite'}", "validation": 2, "seed": 1},
        "methods": {"clover": [0.001, 0.3], "narrow": {"method": "lora", "learning_rates": [0.001, 0.1], "peft.r": 2}},
        "seeds": [3, 4],
        "evaluation": {"mode": "score", "rows": 3, "batch_size": 8},
    }
    grid["settings"] |= {"disable_tqdm": True, "logging_steps": 1, "warmup_steps": 0, "use_cpu": True}
    (folder / "configs" / "ablations").mkdir(parents=True)
    path = folder / "configs" / "ablations" / "tiny.yaml"
    path.write_text(yaml.safe_dump(grid))
    return SimpleNamespace(path=path, grid=grid, folder=folder)
