"""Decoding with narrower heads: tokens a second and bytes of the key-value cache, against the unpruned model.

    python benchmarks/pruned_decode.py

A GPT-2-shaped model with random weights (speed does not depend on them), unpruned and with shares of Q-K and V-O
removed evenly from all heads. Every round times one step of each, in shuffled order, with a cache already filled to
the context; the figure is the median of the ratios within a round. Bytes are those of the tensors in the cache.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import FAST_SHAPES, add_shapes, at_least, clock, finish, options, parser, ratio, table
from pruning import cache_bytes
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

import clover_peft
from clover_peft.base_model.resolve import attention_blocks
from clover_peft.io import run_record as records

SHARES = (0.25, 0.5)
# Steps a second, at least, of the model with half of both removed, by batch and context.
WANTED = {"batch 1": 1.0, "large": 1.15}


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = _arguments(argv)
    environment = records.environment()
    models = {"unpruned": _model(arguments)}
    for share in SHARES:
        pruned = copy.deepcopy(models["unpruned"])
        clover_peft.prune(pruned, share, ranks="uniform")
        models[f"{share:.0%} of both removed"] = pruned
    order, results = random.Random(arguments.seed), []
    for batch, context in arguments.shapes:
        caches = {name: _filled(model, batch, context) for name, model in models.items()}
        steps: dict[str, list[float]] = {name: [] for name in models}
        for _ in tqdm(range(arguments.rounds + 1), desc=f"batch {batch}, context {context}", unit="round"):
            for name in order.sample(list(models), len(models)):
                steps[name].append(step(models[name], caches[name], batch, arguments.device))
        for name, cache in caches.items():
            size = cache_bytes(cache)
            seconds = steps[name][1:]  # the first is a warm-up
            faster = ratio(steps["unpruned"][1:], seconds)
            row = {"model": name, "batch": batch, "context": context, "cache_bytes": size, "v_unpruned": faster}
            results.append({**row, "tokens_per_second": batch / statistics.median(seconds), "seconds": seconds})
    header = ["model", "batch", "context", "cache MB", "tokens/s", "v unpruned"]
    rows = [
        (r["model"], r["batch"], r["context"], r["cache_bytes"] / 1e6, r["tokens_per_second"], r["v_unpruned"])
        for r in results
    ]
    print(table(header, rows))
    return finish(
        arguments.out,
        {
            "benchmark": "pruned_decode",
            "options": options(arguments),
            "environment": environment,
            "results": results,
            "targets": _targets(results),
        },
    )


def _targets(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    half = [r for r in results if r["model"].startswith("50%")]
    largest = max(half, key=lambda r: r["batch"] * r["context"])["v_unpruned"]
    slowest = min((r["v_unpruned"] for r in half if r["batch"] == 1), default=None)
    reached = {"batch 1": slowest, "large": largest}
    return {name: at_least(wanted, reached[name]) for name, wanted in WANTED.items()}


def _model(arguments: argparse.Namespace) -> GPT2LMHeadModel:
    torch.manual_seed(arguments.seed)
    size = dict(n_embd=64, n_head=4, n_layer=2, vocab_size=64) if arguments.fast else {}
    config = GPT2Config(n_positions=max(context for _, context in arguments.shapes) + 1, **size)
    with torch.device(arguments.device):
        return GPT2LMHeadModel(config).eval().requires_grad_(False)


def _filled(model: nn.Module, batch: int, context: int) -> DynamicCache:
    """A cache of random keys and values of `context` tokens."""
    cache, parameter = DynamicCache(), next(model.parameters())
    for layer, (path, block) in enumerate(attention_blocks(model).items()):
        slices = block.layout(f"{path}.c_attn", "c_attn")
        keys, values = (
            torch.randn(batch, slices[part].count, context, slices[part].dim).to(parameter) for part in "kv"
        )
        cache.update(keys, values, layer)
    return cache


@torch.no_grad()
def step(model: Any, cache: DynamicCache, batch: int, device: str) -> float:
    """Seconds for the next token of every sequence; the cache is as before afterwards."""
    ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
    seconds = clock(lambda: model(ids, past_key_values=cache, use_cache=True), device)
    cache.crop(-1)
    return seconds


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    command = parser("Decoding with narrower heads", "pruned_decode")
    command.add_argument("--rounds", type=int, default=20)
    add_shapes(command, [(1, 128), (1, 2048), (16, 2048)])
    arguments = command.parse_args(argv)
    if arguments.fast:
        arguments.rounds, arguments.shapes = 2, FAST_SHAPES
    return arguments


if __name__ == "__main__":
    main()
