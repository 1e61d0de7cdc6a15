"""Runs peft's method comparison on the CPU with a few rows: `peft_comparison.py script/run.py experiments/...`.

peft's script wants a GPU and the hub. `prepare` makes a folder with a copy of the script that accepts a CPU and with
rows where `load_dataset` looks first. Started as a program, this file gives `torch.cpu` the functions that the script
calls on `torch.cuda`, and then is `clover run`. The environment says which checkout of git the results name.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import clover_command

PLACE = Path("method_comparison") / "MetaMathQA"
# Its loss on these has to lie between 1 and 2, as the script checks; SmolLM2-135M's does.
PAGES = [
    "The sun is the star at the center of the Solar System. The planets of the Solar System are Mercury, Venus, "
    "Earth, Mars, Jupiter, Saturn, Uranus and Neptune. The Earth moves around the sun once in a year, and the Moon "
    "moves around the Earth once in a month.",
] * 2
GPU_ONLY = 'if device not in ["cuda", "xpu"]:'


def prepare(checkout: Path, folder: Path, model: str, experiments: Mapping[str, Path]) -> None:
    """Makes a folder in which peft's script runs.

    Args:
        checkout: of peft's repository.
        folder: to fill.
        model: the base model, in place of Llama-3.2-3B.
        experiments: name of an experiment as `lora/name` -> the folder to copy it from.
    """
    script = folder / "script"
    script.mkdir()
    for name in ("run.py", "utils.py", "data.py", "default_training_params.json"):
        text = (checkout / PLACE / name).read_text(encoding="utf-8")
        if name == "utils.py":
            assert text.count(GPU_ONLY) == 1, "peft's script has changed: it no longer refuses a CPU in this line"
            text = text.replace(GPU_ONLY, "if False:")
        if name == "default_training_params.json":
            small = dict(model_id=model, dtype="float32", max_steps=4, eval_steps=2, batch_size=2, batch_size_eval=2)
            small |= dict(generation_kwargs={"max_length": 96, "max_new_tokens": 8})
            text = json.dumps(json.loads(text) | small)
        (script / name).write_text(text, encoding="utf-8")
    for name in ("results", "temporary_results", "cancelled_results"):
        (script / name).mkdir()
    sums = [f"Tom has {n} apples and buys {n + 2} more. How many apples has he?" for n in range(2, 14)]
    answers = [f"{n} + {n + 2} = {2 * n + 2}. " for n in range(2, 14)]
    trained = [
        {"type": "GSM", "query": q, "original_question": q, "response": f"{a}The answer is: {a.split()[4][:-1]}"}
        for q, a in zip(sums, answers, strict=True)
    ]
    tested = [{"question": q, "answer": f"{a}\n#### {a.split()[4][:-1]}"} for q, a in zip(sums, answers, strict=True)]
    _write_rows(folder / "meta-math" / "MetaMathQA", "default", train=trained)
    _write_rows(folder / "openai" / "gsm8k", "main", train=tested[:4], test=tested[4:8])
    _write_rows(folder / "HuggingFaceFW" / "finewiki", "default", train=[{"text": page} for page in PAGES])
    for name, source in experiments.items():
        shutil.copytree(source, folder / "experiments" / name)


def _write_rows(folder: Path, config: str, **splits: list[dict[str, Any]]) -> None:
    """A data set in a folder: `load_dataset` prefers it to one of the same name on the hub."""
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
    card = json.dumps({"configs": [{"config_name": config, "data_files": files}]})  # JSON is YAML
    (folder / "README.md").write_text(f"---\n{card}\n---\n", encoding="utf-8")


def give_the_cpu_a_memory() -> None:
    """Functions of `torch.cuda` that `torch.cpu` lacks; they report no memory."""
    nothing = dict.fromkeys(("reset_peak_memory_stats", "manual_seed_all", "empty_cache"))
    numbers = dict.fromkeys(("max_memory_reserved", "memory_allocated", "memory_reserved"), 0)
    for name, result in {**nothing, **numbers, "get_device_name": platform.machine()}.items():
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, lambda *_, result=result: result)


class _Kept(tempfile.TemporaryDirectory):
    """Takes `delete`, as Python 3.12's does; peft's script needs it to save the adapter."""

    def __init__(self, *args: Any, delete: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


if __name__ == "__main__":
    give_the_cpu_a_memory()
    if sys.version_info < (3, 12):
        tempfile.TemporaryDirectory = _Kept  # type: ignore[misc]
    sys.exit(clover_command.main(["run", *sys.argv[1:]]))
