"""Fine-tuning after pruning (the paper's dagger): CLOVER's S, LoRA and all attention weights, on one pruned model.

    python benchmarks/recovery.py

SmolLM2-135M-Instruct loses `--ratio` of its V-O directions and is trained with TRL's SFTTrainer on windows of
WikiText-2's training set. Every method sees the same windows in the same order, at a learning rate fixed beforehand;
adapters are merged, and what is measured is the merged model: perplexity on windows of 1024 tokens of the test set.
LoRA gets the rank with as many trainable parameters as CLOVER. WikiText-2 is read from CLOVER_DATA.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from harness import clock, finish, options, parser, rank_for, table, trainable
from pruning import SmolLM2, windows_of
from real_models import smollm2
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import clover_peft
from clover_peft import CloverConfig, records

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA_TARGETS = (*ATTENTION, "up_proj", "down_proj")
RATES = {"clover": 5e-3, "lora": 1e-3, "attention": 3e-4}
LESS = 0.25  # recovered, the model is to be better than one with this share removed and not trained


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = _arguments(argv)
    environment = records.environment()
    subject = SmolLM2(arguments)
    rows: list[dict[str, Any]] = []

    def measured(name: str, model: PreTrainedModel, **more: Any) -> None:
        with torch.no_grad():
            perplexity = subject.measure(model.eval())["perplexity"]
        rows.append({"model": name, "perplexity": perplexity, **more})
        print(f"{name}: {perplexity:.3f}", flush=True)

    measured("unpruned", subject.load())
    measured(f"{LESS:.1%} removed", _pruned(subject, LESS, arguments.ranks))
    pruned = _pruned(subject, arguments.ratio, arguments.ranks)
    measured(f"{arguments.ratio:.1%} removed", pruned)
    windows = _windows(arguments)
    budget = trainable(peft.get_peft_model(copy.deepcopy(pruned), CloverConfig()))
    configs: dict[str, peft.PeftConfig | None] = {
        "clover": CloverConfig(),
        "lora": _lora(rank_for(budget, pruned, LORA_TARGETS)),
        "attention": None,
    }
    for method in arguments.methods:
        model, losses, count, seconds = _trained(
            copy.deepcopy(pruned), configs[method], RATES[method], windows, arguments
        )
        measured(f"{method}, recovered", model, losses=losses, trainable=count, seconds=seconds, rate=RATES[method])
    header = ("model", "perplexity", "trainable", "s")
    cells = [(r["model"], r["perplexity"], r.get("trainable", "-"), r.get("seconds", "-")) for r in rows]
    print(table(header, cells))
    found = {row["model"]: row["perplexity"] for row in rows}
    wanted, reached = found[f"{LESS:.1%} removed"], found.get("clover, recovered")
    return finish(
        arguments.out,
        {
            "benchmark": "recovery",
            "options": options(arguments),
            "environment": environment,
            "data": subject.about,
            "results": rows,
            "targets": {
                f"clover, recovered, below {LESS:.1%} removed": {
                    "wanted": wanted,
                    "reached": reached,
                    "met": None if reached is None or arguments.fast else reached < wanted,
                }
            },
        },
    )


def _pruned(subject: SmolLM2, ratio: float, ranks: Any) -> PreTrainedModel:
    model = subject.load()
    clover_peft.prune(model, {"vo": ratio}, calibration=subject.calibration, ranks=ranks)
    return model


def _windows(arguments: argparse.Namespace) -> Dataset:
    """As many windows of the training set as there are steps, in an order that the seed gives."""
    generator = torch.Generator().manual_seed(arguments.seed)
    if arguments.fast:
        rows = torch.randint(3, 64, (16, arguments.length), generator=generator)
    else:
        rows = windows_of("train", arguments.length)
    chosen = rows[torch.randperm(len(rows), generator=generator)[: arguments.steps * arguments.batch_size]]
    return Dataset.from_list([{"input_ids": row.tolist()} for row in chosen])


def _tokenizer(arguments: argparse.Namespace) -> PreTrainedTokenizerFast:
    """What the trainer asks for, to pad; the windows are tokens already."""
    if not arguments.fast:
        return smollm2()[1]
    vocabulary = WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), pad_token="<pad>", eos_token="<eos>")


def _lora(rank: int) -> peft.LoraConfig:
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM")


def _trained(
    model: Any, config: peft.PeftConfig | None, rate: float, windows: Dataset, arguments: argparse.Namespace
) -> tuple[PreTrainedModel, list[float], int, float]:
    """The trained model, merged; the losses that were logged; the number of trained parameters; and seconds."""
    if config is None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[-2] in ATTENTION)
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, arguments.steps // 20),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            max_length=arguments.length,
            seed=arguments.seed,
            logging_steps=max(1, arguments.steps // 20),
            save_strategy="no",
            report_to="none",
            bf16=arguments.device != "cpu",
            gradient_checkpointing=False,
            use_cpu=arguments.device == "cpu",
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(
            model=model if config is None else peft.get_peft_model(model, config),
            args=settings,
            train_dataset=windows,
            processing_class=_tokenizer(arguments),
        )
        count = trainable(trainer.model)
        seconds = clock(trainer.train, arguments.device)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = trainer.model if config is None else trainer.model.merge_and_unload(safe_merge=True)
    return trained, losses, count, seconds


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    command = parser("Fine-tuning after pruning", "recovery")
    command.add_argument("--ratio", type=float, default=0.375)
    command.add_argument("--ranks", default="gradient", choices=["global", "gradient", "layer", "uniform"])
    command.add_argument("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    command.add_argument("--steps", type=int, default=200)
    command.add_argument("--batch-size", type=int, default=1)
    command.add_argument("--length", type=int, default=512, help="tokens of a training window")
    command.add_argument("--split", default="test", choices=["validation", "test"], help="to measure on")
    command.add_argument("--windows", type=int, default=0, help="measured; 0: the whole split")
    command.add_argument("--calibration-windows", type=int, default=32)
    arguments = command.parse_args(argv)
    if arguments.fast:
        arguments.steps, arguments.length = 3, 16
    return arguments


if __name__ == "__main__":
    main()
