"""Records of an ablation, as its table reads them."""

from __future__ import annotations

import json
from pathlib import Path

RUN = {
    "parameters": {"trainable": 10},
    "seconds": {"init": 1.0, "train": 2.0},
    "peak_memory_bytes": 2**20,
    "adapter_bytes": 2**20,
    "data": {"train_rows": 5},
    "steps": 2,
    "loss": {"log": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]},
}


def write(folder: Path, name: str, method: str, rate: float, seed: int, **parts) -> None:
    """Writes the record of a step of a grid; with what it was validated on, also that of its training."""
    trial = {"method": method, "learning_rate": rate, "seed": seed}
    record = {"trial": trial, **({"run": RUN} if "validation" in parts else {}), **parts}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record))


def result(accuracy: float) -> dict:
    """What an evaluation finds."""
    task = {"questions": 100, "correct": int(100 * accuracy), "unparsed": 1, "accuracy": accuracy}
    return {"tasks": {"boolq": task}, "mean": accuracy, "interval": [accuracy - 0.1, accuracy + 0.1]}
