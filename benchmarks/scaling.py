"""How the cost of CLOVER's training step grows: tokens, head size, heads, hidden size, layers and r, one at a time.

    python benchmarks/scaling.py

A step and what is saved for its backward pass are those of train_step.py: forward, backward and AdamW on Llama-shaped
layers whose input requires a gradient. From one point in the middle one size at a time goes from a quarter to twice
its value, the others stay; heads alone take the hidden size with them, which is heads x head size. r counts from an
eighth of a block to a whole one, layers from one to eight. What is told is the cost beyond the frozen base's: seconds
(the median of the differences within a round), as a ratio, and bytes saved for the backward pass.

All sizes of one dimension, each with and without the adapter, take turns in every round, in shuffled order. The
exponent p of `extra ~ size ** p` is the slope of a straight line through the logarithms; there is none where something
costs nothing extra. What does not depend on the size (the folded maps, where tokens grow) draws it below 1; bytes,
which are exact, have a second exponent without that, of the part that grows: the same fit to what each size adds to
the one before. Sizes double, so that `a + b * size ** p` gives p.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from harness import at_most, clock, finish, llama, measured, options, parser, randomise, ratios, table, told
from peft import get_peft_model
from tqdm import tqdm
from train_step import Contender, decode, saved_bytes, step

from clover_peft import CloverConfig
from clover_peft.io import run_record as records

FACTORS = (1 / 4, 1 / 2, 1, 2)
LAYERS = (1, 2, 4, 8)
SHARES_OF_BLOCK = (1 / 8, 1 / 4, 1 / 2, 1)
DIMENSIONS = ("tokens", "head_dim", "heads", "hidden_size", "layers", "r")
# Exponents, at most: linear, with room for what timing leaves uncertain.
TARGETS = {
    "tokens, growing bytes": 1.05,
    "heads, growing bytes": 1.05,
    "tokens, seconds": 1.15,
    "heads, seconds": 1.15,
}


@dataclass(frozen=True)
class Point:
    """The sizes of one model, its adapter and its input."""

    tokens: int
    head_dim: int
    heads: int
    hidden_size: int
    mlp_size: int
    layers: int = 1
    r: int | None = None  # directions trained in a block; None for all


CPU = Point(tokens=512, head_dim=64, heads=16, hidden_size=1024, mlp_size=2752)
CUDA = Point(tokens=2048, head_dim=128, heads=32, hidden_size=4096, mlp_size=11008)
FAST = Point(tokens=256, head_dim=16, heads=4, hidden_size=64, mlp_size=16)


@dataclass
class Runner:
    """One model at one point, with what a step of it needs."""

    contender: Contender
    x: torch.Tensor
    cotangent: torch.Tensor
    dtype: torch.dtype

    def __call__(self) -> None:
        step(self.contender, self.x, self.cotangent, self.dtype)


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = _arguments(argv)
    environment = records.environment()
    point = FAST if arguments.fast else CUDA if arguments.device.startswith("cuda") else CPU
    dimensions: dict[str, dict[str, Any]] = {}
    for dimension in arguments.dimensions:
        points = _points(point, dimension)
        rows = _measure(points, dimension, arguments)
        exponents = _exponents(rows)
        dimensions[dimension] = {"rows": rows, "exponents": exponents}
        print(f"\n{_report(dimension, rows, exponents)}")
    reached = {
        f"{dimension}, {what}": value
        for dimension, found in dimensions.items()
        for what, value in found["exponents"].items()
    }
    return finish(
        arguments.out,
        {
            "benchmark": "scaling",
            "options": options(arguments),
            "environment": environment,
            "point": asdict(point),
            "dimensions": dimensions,
            "targets": at_most({name: most for name, most in TARGETS.items() if name in reached}, reached),
        },
    )


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """p of `value ~ size ** p` by least squares on the logarithms; None where a value is not above 0."""
    if min(values) <= 0:
        return None
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(v) for v in values]).slope


def _exponents(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    sizes, saved = [row["size"] for row in rows], [row["extra_saved_bytes"] for row in rows]
    return {
        "bytes": exponent(sizes, saved),
        "growing bytes": exponent(sizes[1:], [after - before for before, after in pairwise(saved)]),
        "seconds": exponent(sizes, [row["extra_seconds"] for row in rows]),
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    command = parser(__doc__.splitlines()[0] if __doc__ else "", "scaling")
    command.add_argument("--dimensions", nargs="+", choices=DIMENSIONS, default=list(DIMENSIONS))
    command.add_argument("--dtype", help="of the weights; default float32, on cuda bfloat16")
    command.add_argument("--rounds", type=int, default=9, help="timed steps a model")
    arguments = command.parse_args(argv)
    if arguments.fast:
        arguments.rounds = 2
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    return arguments


def _points(point: Point, dimension: str) -> dict[int, Point]:
    """Size -> the point with that size of one dimension."""
    if dimension == "layers":
        return {layers: replace(point, layers=layers) for layers in LAYERS}
    if dimension == "r":
        block = min(point.head_dim, 64)  # of up-projections at most 64
        return {r: replace(point, r=r) for r in (int(block * share) for share in SHARES_OF_BLOCK)}
    sizes = [int(getattr(point, dimension) * factor) for factor in FACTORS]
    if dimension == "heads":
        return {heads: replace(point, heads=heads, hidden_size=heads * point.head_dim) for heads in sizes}
    return {size: replace(point, **{dimension: size}) for size in sizes}


def _runners(point: Point, arguments: argparse.Namespace) -> dict[str, Runner]:
    """The frozen base and CLOVER on it, warmed up."""
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    base = llama(
        point.hidden_size,
        point.heads,
        point.mlp_size,
        point.layers,
        arguments.seed,
        dtype,
        device,
        head_dim=point.head_dim,
    ).requires_grad_(False)
    base.lm_head = torch.nn.Identity()  # only the decoder layers are measured
    clover = get_peft_model(copy.deepcopy(base), CloverConfig(r=point.r))
    x = torch.randn(1, point.tokens, point.hidden_size, device=device).to(dtype).requires_grad_(True)
    cotangent = torch.randn_like(x)
    runners = {}
    for name, model in {"frozen base": base, "clover": clover}.items():
        runners[name] = Runner(Contender(model, ""), x, cotangent, dtype)
        if not arguments.fast:  # whose blocks are larger than the hidden size, and so hardly invertible
            randomise(model, arguments.seed)
        runners[name].contender.saved_bytes = saved_bytes(model, partial(decode, model, x, dtype))
        for _ in range(2):
            runners[name]()
    return runners


def _measure(points: dict[int, Point], dimension: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    runners = {size: _runners(point, arguments) for size, point in points.items()}
    order = [runner for both in runners.values() for runner in both.values()]
    shuffle = random.Random(arguments.seed).shuffle
    for _ in tqdm(range(arguments.rounds), desc=dimension, unit="round"):
        shuffle(order)
        for runner in order:
            runner.contender.seconds.append(clock(runner, arguments.device))
    return [
        _row(size, points[size], both["frozen base"].contender, both["clover"].contender)
        for size, both in runners.items()
    ]


def _row(size: int, point: Point, base: Contender, clover: Contender) -> dict[str, Any]:
    extra = clover.saved_bytes - base.saved_bytes
    return {
        "size": size,
        "point": asdict(point),
        "trainable_parameters": clover.parameters,
        "base_seconds": statistics.median(base.seconds),
        "extra_seconds": statistics.median(a - b for a, b in zip(clover.seconds, base.seconds, strict=True)),
        **measured("v_base", ratios(clover.seconds, base.seconds)),
        "base_saved_bytes": base.saved_bytes,
        "extra_saved_bytes": extra,
        "extra_saved_bytes_a_layer": extra / point.layers,
        "seconds": {"frozen base": base.seconds, "clover": clover.seconds},
    }


def _report(dimension: str, rows: Sequence[dict[str, Any]], exponents: dict[str, float | None]) -> str:
    header = [dimension, "base ms", "extra ms", "v base", "extra saved MiB a layer", "base saved MiB a layer"]
    cells: list[Sequence[object]] = [
        (
            row["size"],
            1e3 * row["base_seconds"],
            1e3 * row["extra_seconds"],
            told(row, "v_base"),
            row["extra_saved_bytes_a_layer"] / 2**20,
            row["base_saved_bytes"] / row["point"]["layers"] / 2**20,
        )
        for row in rows
    ]
    powers = [f"{what} {'none' if p is None else f'{p:.3f}'}" for what, p in exponents.items()]
    return f"{table(header, cells)}\nexponents of what is extra: {', '.join(powers)}"


if __name__ == "__main__":
    main()
