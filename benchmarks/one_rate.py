"""Which learning rate is best for several kinds of model: CLOVER as it is, with `balance_updates`, and LoRA.

    python benchmarks/one_rate.py                              in float32
    python benchmarks/one_rate.py --dtype bfloat16             bases in bfloat16
    python benchmarks/one_rate.py --models whisper minilm      some of the models

CLOVER adapts its default modules; LoRA these and the queries, with about as many parameters. Each trains at each rate
for as many steps of AdamW, with a warm-up and then a linear decline, from one seed. The figure is the loss on held-out
data, on which the best rate is chosen too. The models are

    smollm2   SmolLM2-135M on WikiText-2 (from CLOVER_DATA), windows of 256 tokens
    whisper   Whisper tiny.en, which is to write four sentences of one reader in capitals
    minilm    MiniLM with a new head, which tells 20 articles of WikiText-2 apart by 64 tokens
    vit       a small vision transformer, trained here on pictures of digits, on pictures of ten letters

One rate suits all models if a method's best rates agree.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import real_models
import torch
from harness import Rows, options, parser, rank_for, table, trainable
from peft import LoraConfig, PeftConfig, TaskType, get_peft_model
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

METHODS = ("clover", "clover balanced", "lora")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A model, and what it is adapted to.

    Attributes:
        model: the base model.
        train: batches that give the model a loss, one a step, again and again.
        held_out: such batches to measure on.
        lora_targets: modules that LoRA adapts.
        steps: of the optimizer.
        task_type: peft's, which says whether a head is trained too.
    """

    model: nn.Module
    train: list[Batch]
    held_out: list[Batch]
    lora_targets: list[str]
    steps: int
    task_type: TaskType | None = None


def main(argv: Sequence[str] | None = None) -> Path:
    command = parser(__doc__.splitlines()[0], "one_rate")
    command.add_argument("--models", nargs="+", choices=list(TASKS), default=list(TASKS))
    command.add_argument("--rates", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2])
    command.add_argument("--dtype", default="float32", help="of the base weights")
    arguments = command.parse_args(argv)
    if arguments.fast:
        arguments.rates = arguments.rates[:2]
    environment = records.environment()
    rows = Rows(arguments.out, {"seed": arguments.seed, "dtype": arguments.dtype, "fast": arguments.fast})
    figures: dict[str, Any] = {}
    for name in arguments.models:
        task = _moved(TASKS[name](arguments.fast), arguments)
        trials = [(method, rate) for method in METHODS for rate in arguments.rates]
        found = [
            rows.get(lambda: _run(task, method, rate, arguments), model=name, method=method, rate=rate)  # noqa: B023
            for method, rate in tqdm(trials, desc=name, unit="trial")
        ]
        figures[name] = {"base": _loss(task.model, task.held_out), "trials": found}
        _show(name, figures[name], arguments.rates)
    best = {method: {name: _best(figure, method)["rate"] for name, figure in figures.items()} for method in METHODS}
    print(table(["best rate", *figures], [[method, *map(str, best[method].values())] for method in METHODS]))
    record = {"benchmark": "one_rate", "options": options(arguments), "environment": environment}
    return rows.finish({**record, "figures": figures, "best_rates": best}, arguments.out)


def _run(task: Task, method: str, rate: float, arguments: Any) -> dict[str, Any]:
    """Trains an adapter, and measures it."""
    torch.manual_seed(arguments.seed)
    model = get_peft_model(copy.deepcopy(task.model), _config(task, method))
    if method == "clover balanced":
        balance_updates(model, task.train[:24])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, max(1, task.steps // 10), task.steps)
    model.train()
    losses = []
    for step in range(task.steps):
        loss = model(**task.train[step % len(task.train)]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"parameters": trainable(model), "held_out_loss": _loss(model, task.held_out), "training_loss": losses}


def _config(task: Task, method: str) -> PeftConfig:
    if method != "lora":
        return CloverConfig(task_type=task.task_type)
    budget = trainable(get_peft_model(copy.deepcopy(task.model), CloverConfig()))
    rank = rank_for(budget, task.model, task.lora_targets)
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=task.lora_targets, task_type=task.task_type)


@torch.no_grad()
def _loss(model: nn.Module, batches: list[Batch]) -> float:
    """The mean loss over held-out batches."""
    model.eval()
    return sum(float(model(**batch).loss) for batch in batches) / len(batches)


def _moved(task: Task, arguments: Any) -> Task:
    """A task on the device, in the dtype."""
    dtype = getattr(torch, arguments.dtype)

    def moved(batches: list[Batch]) -> list[Batch]:
        return [
            {name: t.to(arguments.device, dtype if t.is_floating_point() else t.dtype) for name, t in batch.items()}
            for batch in batches
        ]

    model = task.model.to(arguments.device, dtype)
    return replace(task, model=model, train=moved(task.train), held_out=moved(task.held_out))


def _best(figure: dict[str, Any], method: str) -> dict[str, Any]:
    trials = [trial for trial in figure["trials"] if trial["method"] == method]
    finite = [trial for trial in trials if trial["held_out_loss"] == trial["held_out_loss"]]
    return min(finite or trials, key=lambda trial: trial["held_out_loss"])


def _show(name: str, figure: dict[str, Any], rates: list[float]) -> None:
    losses = {(trial["method"], trial["rate"]): trial["held_out_loss"] for trial in figure["trials"]}
    print(f"\n{name}: held-out loss before training {figure['base']:.3f}")
    print(
        table(["rate", *map(str, rates)], [[method, *(losses[method, rate] for rate in rates)] for method in METHODS])
    )


# ---------------------------------------------------------------------- tasks


def _smollm2(fast: bool) -> Task:
    targets = ["q_proj", "k_proj", "v_proj", "up_proj"]
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
    count = len(batches) // 5
    return Task(model, batches[count:], batches[:count], targets, 2 if fast else 64)


def _whisper(fast: bool) -> Task:
    model, train, held_out = load_whisper(fast)
    return Task(model, train, held_out, ["q_proj", "k_proj", "v_proj", "fc1"], 2 if fast else 32)


def _minilm(fast: bool) -> Task:
    """Articles of WikiText-2: the longest ones, cut into windows."""
    targets, classes = ["query", "key", "value", "intermediate.dense"], 20
    torch.manual_seed(0)
    if fast:
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=classes, **sizes))
        ids, labels = torch.randint(50, (24, 8)), torch.arange(24) % classes
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
    count = len(batches) // 4 or 1
    return Task(model.eval(), batches[count:], batches[:count], targets, 2 if fast else 90, TaskType.SEQ_CLS)


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
    letters = _pictures("ABCDEFGHJK", 4 if fast else 100, seed=1)
    targets = ["q_proj", "k_proj", "v_proj", "fc1"]
    return Task(model.eval(), letters[10:] or letters[:2], letters[:10], targets, 2 if fast else 90)


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
