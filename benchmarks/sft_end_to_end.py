#!/usr/bin/env python
"""What a whole fine-tuning costs: `clover sft` against TRL's own script with a LoRA of as many parameters.

    python benchmarks/sft_end_to_end.py --rounds 6

Three programs train SmolLM2 on the same rows in turns, each in a process of its own: `clover sft` with CLOVER, the
same with LoRA, and `python -m trl.scripts.sft` with that LoRA, on q, k, v, up and down. Tokens a second are those of
the trainer: without imports, loading and saving. Seconds and peak memory are of the whole process.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from harness import PAPER_LORA_TARGETS, finish, measured, options, parser, rank_for, ratios, table, told, trainable
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from clover_peft import CloverConfig
from clover_peft.experiments.training.data import load_data
from clover_peft.io import run_record as records
from clover_peft.io.hub_models import find_model
from clover_peft.io.rows import Row, write_rows

REFERENCE = "trl lora"
LENGTH = 256  # tokens of a row
_REPEATED = 16  # times that a row has the text of an instruction
FIGURES = ("tokens_per_second", "seconds", "peak_bytes")


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = _arguments(argv)
    environment = records.environment()
    source = find_model(arguments.model)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(source.path), CloverConfig())
    budget = trainable(model)
    rank = rank_for(budget, model.unload(), PAPER_LORA_TARGETS)
    del model
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "data"
        data.mkdir()
        write_rows(data / "train.jsonl", _rows(arguments))
        programs = _programs(arguments, source.path, data, rank, Path(place))
        order = random.Random(arguments.seed)
        for number in tqdm(range(arguments.rounds), desc="rounds", unit="round"):
            for name in order.sample(list(programs), len(programs)):
                out = Path(place) / f"{name.replace(' ', '-')}-{number}"
                for figure, value in _run([*programs[name], *_out(name, out)]).items():
                    found.setdefault(name, {}).setdefault(figure, []).append(value)
    if len(seen := {tokens for values in found.values() for tokens in values["tokens"]}) > 1:
        raise RuntimeError(f"expected every program to see as many tokens, found {sorted(seen)}")
    compared = {name: _against(values, found[REFERENCE]) for name, values in found.items()}
    rows_shown = [
        (name, *(told(figures, f"{figure}_v_{REFERENCE}") for figure in FIGURES)) for name, figures in compared.items()
    ]
    print(table(("", *(f"{figure.replace('_', ' ')} v {REFERENCE}" for figure in FIGURES)), rows_shown))
    return finish(
        arguments.out,
        {
            "benchmark": "sft_end_to_end",
            "options": options(arguments),
            "environment": environment,
            "model": {"name": source.name, "origin": source.origin},
            "lora_rank": rank,
            "parameters": budget,
            "figures": compared,
        },
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    command = parser("What a whole fine-tuning costs, beside TRL's own script with LoRA", "sft_end_to_end")
    command.add_argument("--model", help="folder or hub name; by default SmolLM2-135M-Instruct")
    command.add_argument("--data", help="as of clover sft; by default commonsense-170k")
    command.add_argument("--rounds", type=int, default=6)
    command.add_argument("--steps", type=int, default=8)
    command.add_argument("--batch-size", type=int, default=4)
    arguments = command.parse_args(argv)
    if arguments.fast:
        arguments.rounds, arguments.steps, arguments.batch_size = 1, 2, 2
    return arguments


def _rows(arguments: argparse.Namespace) -> list[Row]:
    """Conversations longer than LENGTH: every row has as many tokens, and none is padding."""
    count = arguments.steps * arguments.batch_size
    drawn = load_data(arguments.data, rows=count, held_out=0, seed=arguments.seed, protocol=None).train
    texts = [f"{row['prompt'][-1]['content']} {row['completion'][0]['content']}\n" for row in drawn]
    return [
        {
            "prompt": [{"role": "user", "content": "Go on."}],
            "completion": [{"role": "assistant", "content": text * _REPEATED}],
        }
        for text in texts
    ]


def _programs(arguments: argparse.Namespace, model: str, data: Path, rank: int, place: Path) -> dict[str, list[str]]:
    """The command of each program, without its output folder."""
    shared: dict[str, Any] = {
        "max_steps": arguments.steps,
        "per_device_train_batch_size": arguments.batch_size,
        "max_length": LENGTH,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
        "logging_steps": max(1, arguments.steps // 4),
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "include_num_input_tokens_seen": True,
        "use_cpu": not arguments.device.startswith("cuda"),
        "bf16": False,
        "seed": arguments.seed,
        "report_to": "none",
    }
    lora = {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(PAPER_LORA_TARGETS)}
    blocks: dict[str, dict[str, Any]] = {
        "clover": {"peft_type": "CLOVER"},
        "clover lora": {"peft_type": "LORA", "task_type": "CAUSAL_LM", **lora},
    }
    programs = {}
    for name, block in blocks.items():
        file = place / f"{block['peft_type']}.yaml"
        file.write_text(yaml.safe_dump({"peft": block, "held_out_rows": 0, **shared}))
        programs[name] = [
            *(sys.executable, "-m", "clover_peft", "sft", "--config", str(file)),
            *(f"model={model}", f"data={data}"),
        ]
    own = {"model_name_or_path": model, "dataset_name": str(data), "dtype": "float32", **shared}
    given = [word for key, value in own.items() for word in (f"--{key}", str(value))]
    adapter = ["--use_peft", "--lora_r", str(rank), "--lora_alpha", str(2 * rank), "--lora_dropout", "0"]
    programs[REFERENCE] = [
        *(sys.executable, "-m", "trl.scripts.sft", *given, *adapter),
        *("--lora_target_modules", *PAPER_LORA_TARGETS),
    ]
    return programs


def _out(name: str, folder: Path) -> list[str]:
    return ["--output_dir", str(folder)] if name == REFERENCE else [f"output_dir={folder}"]


def _run(command: list[str]) -> dict[str, float]:
    """Figures of one program.

    Raises:
        RuntimeError: it failed, or printed no figures of its training.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as shown:
        process = subprocess.Popen(
            command, stdout=shown, stderr=subprocess.STDOUT, env={**os.environ, "TQDM_DISABLE": "1"}
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        shown.seek(0)
        text = shown.read()
    runtime = re.findall(r"'train_runtime': '?([\d.e+]+)", text)
    tokens = re.findall(r"'num_input_tokens_seen': '?([\d.e+]+)", text)
    if process.returncode or not runtime or not tokens:
        raise RuntimeError(f"{' '.join(command)}: ended with {process.returncode}: {text[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return {
        "tokens_per_second": float(tokens[-1]) / float(runtime[-1]),
        "tokens": float(tokens[-1]),
        "seconds": seconds,
        "peak_bytes": float(used.ru_maxrss * unit),
    }


def _against(values: dict[str, list[float]], reference: dict[str, list[float]]) -> dict[str, Any]:
    """The figures of a program, and their ratios to the reference's of the same round."""
    found: dict[str, Any] = {**values}
    for figure in FIGURES:
        found |= measured(f"{figure}_v_{REFERENCE}", ratios(values[figure], reference[figure]))
    return found


if __name__ == "__main__":
    main()
