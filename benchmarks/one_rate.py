"""Which learning rate is best for several kinds of model, and what it reaches: CLOVER, LoRA, DoRA, PiSSA and HiRA.

    python benchmarks/one_rate.py                              in float32
    python benchmarks/one_rate.py --dtype bfloat16             bases in bfloat16
    python benchmarks/one_rate.py --models vit --seeds 5       one of the models, five seeds at the best rates

CLOVER adapts its default modules. The others train about as many parameters, on these modules and the queries; LoRA
and HiRA also on all linear modules of the blocks. Each trains at each rate for as many steps of AdamW, with a warm-up
and then a linear decline. Its best rate has the lowest loss on validation data with the first seed; there all seeds
are measured on test data, and paired with those of LoRA. A seed is that of the adapter's start and of the order of
batches. A new head trains at one rate with all methods (`HEAD_RATE`), so that the methods differ in the adapter alone.

    smollm2   SmolLM2-135M on WikiText-2 (from CLOVER_DATA), windows of 256 tokens
    whisper   Whisper tiny.en, which is to write three sentences of one reader in capitals
    minilm    MiniLM with a new head, which tells 20 articles of WikiText-2 apart by 64 tokens
    vit       a small vision transformer, trained here on pictures of digits, on pictures of ten letters

One rate suits all models if a method's best rates agree.
"""

from __future__ import annotations

import copy
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import real_models
import torch
from harness import Rows, options, parser, rank_for, table, trainable
from peft import HiraConfig, LoraConfig, PeftConfig, TaskType, get_peft_model
from PIL import Image, ImageDraw, ImageFont
from rounding import load_whisper
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    get_scheduler,
)

from clover_peft import CloverConfig, balance_updates
from clover_peft.io import run_record as records

METHODS = ("clover", "clover balanced", "lora", "lora all", "dora", "pissa", "hira", "hira all")
REFERENCE = "lora"
HEAD_RATE = 5e-3
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A model, and what it is adapted to.

    Attributes:
        model: the base model.
        train: batches that give the model a loss, one a step, again and again.
        validation: such batches to choose the rate on.
        test: such batches to measure on.
        targets: modules that the other methods adapt.
        all_targets: all linear modules of the blocks.
        steps: of the optimizer.
        task_type: peft's, which says whether a head is trained too.
        budget: parameters of CLOVER's adapter, which the other methods match.
    """

    model: nn.Module
    train: list[Batch]
    validation: list[Batch]
    test: list[Batch]
    targets: list[str]
    all_targets: list[str]
    steps: int
    task_type: TaskType | None = None
    budget: int = 0


def main(argv: Sequence[str] | None = None) -> Path:
    command = parser(__doc__.splitlines()[0], "one_rate")
    command.add_argument("--models", nargs="+", choices=list(TASKS), default=list(TASKS))
    command.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    command.add_argument("--rates", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2])
    command.add_argument("--seeds", type=int, default=1, help="at the best rates, from --seed on")
    command.add_argument("--dtype", default="float32", help="of the base weights")
    arguments = command.parse_args(argv)
    if arguments.fast:
        arguments.rates = arguments.rates[:2]
    environment = records.environment()
    rows = Rows(arguments.out, {name: getattr(arguments, name) for name in ("dtype", "fast", "device")})
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    figures: dict[str, Any] = {}
    for name in arguments.models:
        task = _moved(TASKS[name](arguments.fast), arguments)

        def trial(method: str, rate: float, seed: int, name: str = name, task: Task = task) -> dict[str, Any]:
            settings = {"model": name, "method": method, "rate": rate, "seed": seed}
            return rows.get(lambda: _run(task, method, rate, seed), **settings)

        figures[name] = {
            "base": {"validation": _loss(task.model, task.validation), "test": _loss(task.model, task.test)}
        }
        grid = [(method, rate) for method in arguments.methods for rate in arguments.rates]
        found = [trial(method, rate, arguments.seed) for method, rate in tqdm(grid, desc=name, unit="trial")]
        best = {method: _best(found, method)["rate"] for method in arguments.methods}
        more = [(method, best[method], seed) for method in arguments.methods for seed in seeds]
        at_best = [trial(*one) for one in tqdm(more, desc=f"{name}, best rates", unit="trial")]
        figures[name] |= {"trials": found, "best_rates": best, "at_best_rates": at_best}
        figures[name]["test"] = _compared(at_best, arguments.methods)
        _show(name, figures[name], arguments)
    record = {"benchmark": "one_rate", "options": options(arguments), "environment": environment}
    return rows.finish({**record, "figures": figures}, arguments.out)


def _run(task: Task, method: str, rate: float, seed: int) -> dict[str, Any]:
    """Trains an adapter, and measures it."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(task.model), _config(task, method))
    if method == "clover balanced":
        balance_updates(model, task.train[:24])
    heads = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name]
    adapter = [p for p in model.parameters() if p.requires_grad and not any(p is head for head in heads)]
    groups = [{"params": adapter, "lr": rate}, *([{"params": heads, "lr": HEAD_RATE}] if heads else [])]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, max(1, task.steps // 10), task.steps)
    order = torch.Generator().manual_seed(seed)
    model.train()
    losses, left = list[float](), list[int]()
    while len(losses) < task.steps:
        left = left or torch.randperm(len(task.train), generator=order).tolist()
        loss = model(**task.train[left.pop()]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*adapter, *heads], 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    held_out = {"validation_loss": _loss(model, task.validation), "test_loss": _loss(model, task.test)}
    return {"parameters": trainable(model), **held_out, "training_loss": losses}


def _config(task: Task, method: str) -> PeftConfig:
    if method.startswith("clover"):
        return CloverConfig(task_type=task.task_type)
    targets = task.all_targets if method.endswith(" all") else task.targets
    rank = rank_for(task.budget, task.model, targets)
    common: dict[str, Any] = {"r": rank, "target_modules": targets, "task_type": task.task_type}
    if method.startswith("hira"):
        return HiraConfig(**common)
    if method == "pissa":
        return LoraConfig(**common, lora_alpha=rank, init_lora_weights="pissa")
    return LoraConfig(**common, lora_alpha=2 * rank, use_dora=method == "dora")


@torch.no_grad()
def _loss(model: nn.Module, batches: list[Batch]) -> float:
    """The mean loss over held-out batches."""
    model.eval()
    return sum(float(model(**batch).loss) for batch in batches) / len(batches)


def _moved(task: Task, arguments: Any) -> Task:
    """A task on the device, in the dtype, with its budget."""
    dtype = getattr(torch, arguments.dtype)

    def moved(batches: list[Batch]) -> list[Batch]:
        return [
            {name: t.to(arguments.device, dtype if t.is_floating_point() else t.dtype) for name, t in batch.items()}
            for batch in batches
        ]

    model = task.model.to(arguments.device, dtype)
    batches = {name: moved(getattr(task, name)) for name in ("train", "validation", "test")}
    budget = trainable(get_peft_model(copy.deepcopy(model), CloverConfig()))  # without a task type: no head
    return replace(task, model=model, budget=budget, **batches)  # type: ignore[arg-type]


def _best(trials: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """A method's trial with the lowest loss on validation data; NaN counts as the highest."""
    own = [trial for trial in trials if trial["method"] == method]
    finite = [trial for trial in own if trial["validation_loss"] == trial["validation_loss"]]
    return min(finite or own, key=lambda trial: trial["validation_loss"])


def _compared(trials: list[dict[str, Any]], methods: Sequence[str]) -> dict[str, Any]:
    """Each method's mean loss on test data, and its difference from the reference, with its error over seeds.

    Without the reference among the methods there is no difference (None).
    """
    losses = {method: [t["test_loss"] for t in trials if t["method"] == method] for method in methods}
    result = {}
    for method, own in losses.items():
        differences = [a - b for a, b in zip(own, losses[REFERENCE], strict=True)] if REFERENCE in losses else []
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
        result[method] = {
            "loss": statistics.fmean(own),
            "less_reference": statistics.fmean(differences) if differences else None,
            "standard_error": error,
            "parameters": next(t["parameters"] for t in trials if t["method"] == method),
        }
    return result


def _show(name: str, figure: dict[str, Any], arguments: Any) -> None:
    losses = {(trial["method"], trial["rate"]): trial["validation_loss"] for trial in figure["trials"]}
    before = figure["base"]
    print(f"\n{name}: loss before training {before['validation']:.3f} (validation), {before['test']:.3f} (test)")
    rates = arguments.rates
    rows = [[method, *(losses[method, rate] for rate in rates)] for method in arguments.methods]
    print(table(["validation loss at rate", *map(str, rates)], rows))
    rows = []
    for method, found in figure["test"].items():
        error = "" if found["standard_error"] is None else f" ({found['standard_error']:.3f})"
        less = found["less_reference"]
        difference = "-" if less is None else f"{less:+.3f}{error}"
        rows.append([method, str(figure["best_rates"][method]), found["parameters"], found["loss"], difference])
    print(table(["test", "best rate", "parameters", "loss", f"less {REFERENCE}'s"], rows))


# ---------------------------------------------------------------------- tasks


def _smollm2(fast: bool) -> Task:
    targets = ["q_proj", "k_proj", "v_proj", "up_proj"]
    every = [*targets, "o_proj", "gate_proj", "down_proj"]
    if fast:
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        rows = torch.randint(50, (6, 1, 16))
    else:
        model, tokenizer = real_models.smollm2()
        text = "".join(real_models.wikitext2("train")[:6000])
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        rows = ids[: 80 * 256].view(-1, 1, 256)
    batches = [{"input_ids": row, "labels": row} for row in rows]
    return _task(model, batches, targets, every, 2 if fast else 64)


def _whisper(fast: bool) -> Task:
    """Three clips to train on, the fourth to choose the rate, the others to measure."""
    model, train, held_out = load_whisper(fast)
    targets = ["q_proj", "k_proj", "v_proj", "fc1"]
    every = [*targets, "out_proj", "fc2"]
    return Task(model, train[:3], train[3:] or held_out, held_out, targets, every, 2 if fast else 32)


def _minilm(fast: bool) -> Task:
    """Articles of WikiText-2: the longest ones, cut into windows."""
    targets, classes = ["query", "key", "value", "intermediate.dense"], 20
    every = [*targets, "attention.output.dense", "output.dense"]
    torch.manual_seed(0)
    if fast:
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=classes, **sizes))
        ids, labels = torch.randint(50, (48, 8)), torch.arange(48) % classes
    else:
        body, tokenizer = real_models.minilm()
        body.config.num_labels = classes
        model = BertForSequenceClassification(body.config)
        model.bert.load_state_dict(body.state_dict(), strict=False)
        articles = re.split(r"\n = [^=][^\n]* = \n", "".join(real_models.wikitext2("train")))
        longest = sorted(articles, key=len)[-classes:]
        windows = [torch.tensor(tokenizer(a, verbose=False)["input_ids"][: 50 * 64]).view(50, 64) for a in longest]
        ids, labels = torch.cat(windows), torch.arange(classes).repeat_interleave(50)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).split(8)
    batches = [{"input_ids": ids[rows], "labels": labels[rows]} for rows in order]
    return _task(model.eval(), batches, targets, every, 2 if fast else 90, TaskType.SEQ_CLS)


def _vit(fast: bool) -> Task:
    """Pictures of 24 x 24 pixels with a character each, moved, turned and a little noisy."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4)
    config = ViTConfig(image_size=24, patch_size=4, num_channels=1, num_labels=10, **sizes)
    model = ViTForImageClassification(config)
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=1e-3), 2 if fast else 600
    scheduler = get_scheduler("linear", optimizer, steps // 20, steps)
    digits = _pictures("0123456789", 2 if fast else 200, seed=0)
    for step in range(steps):
        model(**digits[step % len(digits)]).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    letters = _pictures("ABCDEFGHJK", 6 if fast else 100, seed=1)
    targets = ["q_proj", "k_proj", "v_proj", "fc1"]
    return _task(model.eval(), letters, targets, [*targets, "o_proj", "fc2"], 2 if fast else 90)


def _task(
    model: nn.Module,
    batches: list[Batch],
    targets: list[str],
    all_targets: list[str],
    steps: int,
    task_type: TaskType | None = None,
) -> Task:
    """A task whose first tenth of batches is for validation, and the next two for the test."""
    tenth = len(batches) // 10 or 1
    validation, test, train = batches[:tenth], batches[tenth : 3 * tenth], batches[3 * tenth :]
    return Task(model, train, validation, test, targets, all_targets, steps, task_type)


def _pictures(characters: str, count: int, seed: int) -> list[Batch]:
    """Batches of 64 pictures; a label is a character's place."""
    generator, font = torch.Generator().manual_seed(seed), ImageFont.load_default(14)
    batches = []
    for _ in range(count):
        labels = torch.randint(len(characters), (64,), generator=generator)
        values = torch.rand(64, 3, generator=generator)
        pictures = torch.randn(64, 1, 24, 24, generator=generator) * 0.1
        for i, (label, (x, y, turn)) in enumerate(zip(labels.tolist(), values.tolist(), strict=True)):
            picture = Image.new("L", (24, 24))
            ImageDraw.Draw(picture).text((6 + 3 * x, 3 + 3 * y), characters[label], fill=255, font=font)
            pixels = torch.frombuffer(bytearray(picture.rotate(20 * turn - 10).tobytes()), dtype=torch.uint8)
            pictures[i, 0] += pixels.view(24, 24) / 255
        batches.append({"pixel_values": pictures, "labels": labels})
    return batches


TASKS: dict[str, Callable[[bool], Task]] = {"smollm2": _smollm2, "whisper": _whisper, "minilm": _minilm, "vit": _vit}


if __name__ == "__main__":
    main()
