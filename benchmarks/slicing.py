"""Perplexity of SmolLM2-135M-Instruct with a narrower residual stream, alone and with halved value heads.

    python benchmarks/slicing.py                        # WikiText-2 test, the whole set: hours on a CPU
    python benchmarks/slicing.py --windows 8            # its first eight windows, for a look

For every ratio and both rotations ("shared": one basis, a stock model; "per_block": one for each block) the model is
loaded afresh, sliced (`slice_hidden_size`) and measured; then half of V-O is removed from it (`prune`, uniform ranks,
calibrated with the same windows) and it is measured again. The dense model, and the dense model with half of V-O
removed, stand beside them. Perplexity is on windows that do not overlap, rows joined as they are, the last incomplete
window left out; calibration windows are drawn from the training set by the seed. Widths are multiples of 4, because
Llama's config wants multiples of the nine heads too: 540, 504 and 432 of 576.

Every row is written as soon as it is measured (`slicing.*.rows.json` beside the record), and the same command goes on
where an interrupted one stopped. The record holds the share of the second moment that every block's basis keeps. With
--why it also tells where the loss comes from, at the smallest ratio: the spectrum of the shared moment, and the
perplexity of the dense model when its stream is projected onto d dimensions at one place alone, by the shared basis
and by the place's own.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Rows, at_most, clock, options, parser, table
from real_models import smollm2, wikitext2
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import clover_peft
from clover_peft.base_model.activations import evaluating
from clover_peft.convert import slicing
from clover_peft.convert.slicing_checks import check_sliceable, choose_width
from clover_peft.experiments.adaptation.trial import reset_peak_memory
from clover_peft.io import run_record as records

RATIOS = (0.0625, 0.125, 0.25)
ROTATIONS = ("shared", "per_block")
MULTIPLE = 4
_OF_ALL_ROWS = {"ratio", "rotation", "pull", "why"}  # what no row depends on
TARGET = 1.15  # perplexity against the dense model's, at the smallest ratio


class Data:
    """Windows of WikiText-2, or of random tokens for a tiny model with `--fast`."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.length = arguments, 16 if arguments.fast else arguments.length
        if arguments.fast:
            generator = torch.Generator().manual_seed(arguments.seed)
            rows = torch.randint(3, 96, (40, self.length), generator=generator)
            self.calibration, self.measured = rows[:32], rows[32:]
            return
        _, tokenizer = smollm2()

        def windows(split: str) -> Tensor:
            ids = tokenizer("".join(wikitext2(split)), return_tensors="pt", verbose=False).input_ids[0]
            return ids[: len(ids) // self.length * self.length].view(-1, self.length)

        train, measured = windows("train"), windows(arguments.split)
        chosen = random.Random(arguments.seed).sample(range(len(train)), arguments.calibration_windows)
        self.calibration = train[chosen]
        self.measured = measured[: arguments.windows or None]

    def load(self) -> Any:
        if not self.arguments.fast:
            return smollm2()[0].to(self.arguments.device)
        torch.manual_seed(self.arguments.seed)
        sizes = dict(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2)
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
        return model.to(self.arguments.device)

    def batches(self) -> list[dict[str, Any]]:
        """One window at a time: a pass of several is no faster on a CPU."""
        more = {"use_cache": False, "logits_to_keep": 1}
        return [{"input_ids": row.unsqueeze(0).to(self.arguments.device), **more} for row in self.calibration]

    @torch.no_grad()
    def perplexity(self, model: Any) -> float:
        losses = []
        for row in tqdm(self.measured, desc="windows", leave=False, delay=3):
            ids = row.unsqueeze(0).to(self.arguments.device)
            losses.append(float(model(input_ids=ids, labels=ids, use_cache=False).loss))
        return math.exp(sum(losses) / len(losses))


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = _arguments(argv)
    environment = records.environment()
    given, data = options(arguments), Data(arguments)
    kept = Rows(arguments.out, {name: value for name, value in given.items() if name not in _OF_ALL_ROWS})
    base = kept.get(lambda: _dense(data), part="dense")
    print(f"dense: perplexity {base['perplexity']:.2f}, {base['parameters']:,} parameters", flush=True)
    settings: dict[str, Any] = {"rotation": None, "pull": None, "ratio": 0.0}
    rows = [kept.get(lambda: _with_clover(data.load(), data, base), **settings)]
    for ratio in arguments.ratio:
        for rotation in arguments.rotation:
            for pull in arguments.pull if rotation == "per_block" else [None]:
                row = {"rotation": rotation, "ratio": ratio, "pull": pull}
                rows.append(kept.get(partial(_sliced, data, base, **row), **row))
                print(_line(rows[-1]), flush=True)
    print(table(("", "width", "v dense", "parameters", "s", "with V-O halved"), [_cells(row) for row in rows]))
    smallest = min(arguments.ratio)
    why = kept.get(partial(_why, data, base, smallest), part="why", ratio=smallest) if arguments.why else None
    reached = {
        f"{row['rotation']} at {row['ratio']:.2%}": row["v_dense"]
        for row in rows
        if row["rotation"] and row["ratio"] == min(arguments.ratio) and row["pull"] in (None, arguments.pull[0])
    }
    return kept.finish(
        {
            "benchmark": "slicing",
            "options": given,
            "environment": environment,
            "data": {"calibration_tokens": data.calibration.numel(), "measured_tokens": data.measured.numel()},
            "dense": base,
            "rows": rows,
            "why": why,
            "targets": at_most(dict.fromkeys(reached, TARGET), reached),
        },
        arguments.out,
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    command = parser(__doc__.splitlines()[0] if __doc__ else "", "slicing")
    command.add_argument("--ratio", type=float, nargs="+", default=list(RATIOS))
    command.add_argument("--split", default="test", choices=["validation", "test"], help="to measure on")
    command.add_argument("--windows", type=int, default=0, help="measured windows; 0: the whole split")
    command.add_argument("--length", type=int, default=1024, help="tokens of a window")
    command.add_argument("--calibration-windows", type=int, default=64)
    command.add_argument("--rotation", nargs="+", default=list(ROTATIONS), choices=ROTATIONS)
    command.add_argument(
        "--pull", type=float, nargs="+", default=[slicing.PULL], help="per_block: to the shared basis"
    )
    command.add_argument("--without-clover", action="store_true", help="leave out what halved heads cost")
    command.add_argument("--why", action="store_true", help="measure where the loss comes from")
    arguments = command.parse_args(argv)
    if arguments.windows < 0 or arguments.calibration_windows < 1 or arguments.length < 2:
        command.error("--windows must not be negative, --calibration-windows and --length must be positive")
    return arguments


def _dense(data: Data) -> dict[str, Any]:
    model = data.load()
    return {"perplexity": data.perplexity(model), "parameters": _parameters(model)}


def _sliced(data: Data, base: dict[str, Any], ratio: float, rotation: Any, pull: float | None) -> dict[str, Any]:
    """Slice a fresh model, measure it, and measure it again with halved values."""
    model, reports = data.load(), []
    slicing.PULL = slicing.PULL if pull is None else pull

    def cut() -> None:
        reports.append(
            clover_peft.slice_hidden_size(model, ratio, data.batches(), rotation=rotation, multiple=MULTIPLE)
        )

    reset_peak_memory()
    seconds = clock(cut, data.arguments.device)
    peak = records.peak_gpu_bytes() or records.peak_memory_bytes()  # while it is sliced, the model included
    perplexity = data.perplexity(model)
    figures = {
        "report": reports[0].to_dict(),
        "seconds": seconds,
        "peak_megabytes": peak // 2**20,
        "perplexity": perplexity,
        "v_dense": perplexity / base["perplexity"],
        "parameters": _parameters(model),
    }
    return {**figures, **_with_clover(model, data, base)}


def _with_clover(model: Any, data: Data, base: dict[str, Any]) -> dict[str, Any]:
    """Halve the value heads of a model, and measure it."""
    if data.arguments.without_clover:
        return {"halved": None}
    report = clover_peft.prune(model, {"vo": 0.5}, calibration=data.batches(), ranks="uniform")
    perplexity = data.perplexity(model)
    return {
        "halved": {
            "perplexity": perplexity,
            "v_dense": perplexity / base["perplexity"],
            "parameters": _parameters(model),
            "cache_bytes": report.cache_bytes,
            "seconds": report.seconds,
        }
    }


def _why(data: Data, base: dict[str, Any], ratio: float) -> dict[str, Any]:
    """The spectrum of the stream, and what one place alone loses."""
    model = data.load()
    slicer = slicing.Slicer(
        model, check_sliceable(model), choose_width(model, ratio, MULTIPLE, stock=True), data.batches()
    )
    with evaluating(model):
        moments = [each.second[0] for each in slicer.moments()]
    total = torch.stack(moments).sum(0)
    spectrum = torch.linalg.eigvalsh(total).flip(0)
    shares = (spectrum.cumsum(0) / spectrum.sum()).tolist()
    layers, places = model.model.layers, {}
    for index in sorted({0, len(layers) // 2, len(layers)}):
        module = model.model.norm if index == len(layers) else layers[index]
        for name, moment in (("shared", total), ("own", moments[2 * index])):
            basis = slicer.basis(moment).to(model.dtype)
            handle = module.register_forward_pre_hook(lambda module, inputs, p=basis: (inputs[0] @ p @ p.mT,))
            places[f"{name} basis in front of layer {index}"] = data.perplexity(model) / base["perplexity"]
            handle.remove()
    for name, figure in places.items():
        print(f"{name}: {figure:.4f}", flush=True)
    kept = {size: shares[size - 1] for size in range(len(shares) // 12, len(shares) + 1, len(shares) // 12)}
    return {"width": slicer.width, "energy_of_leading": kept, "v_dense_of_one_place": places}


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _line(row: dict[str, Any]) -> str:
    return "  ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in _cells(row))


def _cells(row: dict[str, Any]) -> list[object]:
    halved = row["halved"]["v_dense"] if row["halved"] else "-"
    if row["rotation"] is None:
        return ["dense", "", 1.0, "", "", halved]
    width, seconds = row["report"]["width"][1], f"{row['seconds']:.0f}"
    name = f"{row['rotation']} {row['ratio']:.2%}" + (f" pull {row['pull']:g}" if row["pull"] is not None else "")
    return [name, width, row["v_dense"], f"{row['parameters']:,}", seconds, halved]


if __name__ == "__main__":
    main()
