"""Fine-tuning after pruning (the paper's dagger): CLOVER's S, LoRA and all attention weights, on one pruned model.

    python benchmarks/recovery.py

SmolLM2-135M-Instruct loses each `--ratio` of its V-O directions and is trained with TRL's SFTTrainer on windows of
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
from clover_peft import CloverConfig
from clover_peft.io import run_record as records
from clover_peft.pruning.rule import SPREADS

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA_TARGETS = (*ATTENTION, "up_proj", "down_proj")
RATES = {"clover": 5e-3, "lora": 1e-3, "attention": 3e-4}
JUDGED, LESS = 0.375, 0.25  # with the one removed and recovered a model is to be better than with the other removed


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = _arguments(argv)
    environment = records.environment()
    subject = SmolLM2(arguments)
    whole = subject.load()
    windows = _windows(arguments)
    rows: list[dict[str, Any]] = []

    def measured(removed: float, method: str | None, model: PreTrainedModel, **more: Any) -> None:
        with torch.no_grad():
            perplexity = subject.measure(model.eval())["perplexity"]
        rows.append({"removed": removed, "method": method, "perplexity": perplexity, **more})
        print(f"{removed:.1%} removed, {method or 'not trained'}: {perplexity:.3f}", flush=True)

    measured(0.0, None, whole)
    data = clover_peft.calibrate(whole, subject.calibration, gradients=arguments.ranks == "gradient")
    for share in dict.fromkeys([*arguments.ratio, *([LESS] if JUDGED in arguments.ratio else [])]):
        pruned = copy.deepcopy(whole)
        clover_peft.prune(pruned, {"vo": share}, calibration=data, ranks=arguments.ranks)
        measured(share, None, pruned)
        for method in arguments.methods if share in arguments.ratio else ():
            measured(share, method, **_trained(copy.deepcopy(pruned), method, windows, arguments))
    header = ("removed", "trained", "perplexity", "parameters", "s")
    cells = [
        (f"{r['removed']:.1%}", r["method"] or "-", r["perplexity"], r.get("trainable", "-"), r.get("seconds", "-"))
        for r in rows
    ]
    print(table(header, cells))
    found = {(row["removed"], row["method"]): row["perplexity"] for row in rows}
    wanted, reached = found.get((LESS, None)), found.get((JUDGED, "clover"))
    met = None if wanted is None or reached is None or arguments.fast else reached < wanted
    return finish(
        arguments.out,
        {
            "benchmark": "recovery",
            "options": options(arguments),
            "environment": environment,
            "data": subject.about,
            "results": rows,
            "targets": {
                f"clover, {JUDGED:.1%} removed, below {LESS:.1%} removed and not trained": {
                    "wanted": wanted,
                    "reached": reached,
                    "met": met,
                }
            },
        },
    )


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


def _config(method: str, pruned: PreTrainedModel) -> peft.PeftConfig | None:
    """Of the adapter; None trains the attention weights themselves. LoRA's rank spends what CLOVER trains."""
    if method != "lora":
        return CloverConfig() if method == "clover" else None
    budget = trainable(peft.get_peft_model(copy.deepcopy(pruned), CloverConfig()))
    rank = rank_for(budget, pruned, LORA_TARGETS)
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM")


def _trained(model: PreTrainedModel, method: str, windows: Dataset, arguments: argparse.Namespace) -> dict[str, Any]:
    """The trained `model`, merged; `losses` that were logged; how many parameters were `trainable`; `seconds`."""
    torch.manual_seed(arguments.seed)  # of LoRA's start
    config = _config(method, model)
    if config is None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[-2] in ATTENTION)
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            learning_rate=RATES[method],
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
    return {"model": trained, "losses": losses, "trainable": count, "seconds": seconds, "rate": RATES[method]}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    command = parser("Fine-tuning after pruning", "recovery")
    command.add_argument("--ratio", type=float, nargs="+", default=[JUDGED], help="shares of V-O to remove")
    command.add_argument("--ranks", default="gradient", choices=SPREADS)
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
