"""Decoding with latent attention in transformers: tokens a second and bytes of the cache, against the original model.

    python benchmarks/mla_decode.py                                  # 16 x 16,384 tokens need 20 GB
    python benchmarks/mla_decode.py --shapes 1x512 1x4096 1x16384

Models with SmolLM2-135M's shape and random weights (speed does not depend on them): the original, and the stock
`DeepseekV3ForCausalLM` that `convert_to_mla` makes of it at several shares of the cache. Every round times one step of
each, in shuffled order, with a cache of random numbers that is filled to the context; the figure is the median of the
ratios within a round, with the interval that holds the median with 95 % confidence. Two more rounds time what a step
spends in `kv_b_proj`, by which transformers makes keys and values of all heads from the whole cache, in every step.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from harness import (
    FAST_SHAPES,
    add_shapes,
    at_least,
    finish,
    measured,
    options,
    parser,
    ratios,
    synchronise,
    table,
    told,
)
from pruned_decode import step
from pruning import cache_bytes
from torch import nn
from tqdm import tqdm
from transformers import DeepseekV3ForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from clover_peft.convert.plan import result_config
from clover_peft.io import run_record as records

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
TINY = SMOLLM2 | {"hidden_size": 36, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
SHAPES = [(batch, context) for batch in (1, 16) for context in (512, 4096, 16384)]
REDUCTIONS = [0.5, 0.6875, 0.9297]
WANTED = 1.5  # times the original's tokens a second at a context of 16,384, at least


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = _arguments(argv)
    environment = records.environment()
    torch.manual_seed(arguments.seed)
    models = _models(arguments)
    order, results = random.Random(arguments.seed), []
    for batch, context in arguments.shapes:
        caches = {name: filled(model, batch, context) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for number in tqdm(range(arguments.rounds + 1), desc=f"batch {batch}, context {context}", unit="round"):
            for name in order.sample(list(models), len(models)):
                took = step(models[name], caches[name], batch, arguments.device)
                if number:  # the first is a warm-up
                    seconds[name].append(took)
        for name, model in models.items():
            spent = [_in_expansion(model, caches[name], batch, arguments.device) for _ in range(2)]
            results.append(
                {
                    "model": name,
                    "batch": batch,
                    "context": context,
                    "cache_bytes": cache_bytes(caches[name]),
                    "tokens_per_second": batch / statistics.median(seconds[name]),
                    **measured("v_original", ratios(seconds["original"], seconds[name])),
                    "share_in_kv_b_proj": min(spent),
                    "seconds": seconds[name],
                }
            )
    header = ["model", "batch", "context", "cache MB", "tokens/s", "v original", "share in kv_b_proj"]
    sizes = [(r["model"], r["batch"], r["context"], r["cache_bytes"] / 1e6, r["tokens_per_second"]) for r in results]
    shares = [(told(r, "v_original"), f"{r['share_in_kv_b_proj']:.0%}") for r in results]
    print(table(header, [(*size, *share) for size, share in zip(sizes, shares, strict=True)]))
    return finish(
        arguments.out,
        {
            "benchmark": "mla_decode",
            "options": options(arguments),
            "environment": environment,
            "results": results,
            "targets": _targets(results),
        },
    )


def _targets(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The target at the longest context, for every model and batch."""
    longest = max(r["context"] for r in results)
    return {
        f"{r['model']}, batch {r['batch']}, context {longest}": at_least(
            WANTED, r["v_original"], r["v_original_interval"]
        )
        for r in results
        if r["context"] == longest and r["model"] != "original"
    }


def _models(arguments: argparse.Namespace) -> dict[str, nn.Module]:
    longest = max(context for _, context in arguments.shapes) + 1
    original = LlamaForCausalLM(LlamaConfig(**(TINY if arguments.fast else SMOLLM2), max_position_embeddings=longest))
    models: dict[str, Any] = {"original": original}
    for reduction in arguments.reductions:
        models[f"latent -{reduction:.2%}"] = DeepseekV3ForCausalLM(result_config(original, cache_reduction=reduction))
    return {name: model.to(arguments.device).eval().requires_grad_(False) for name, model in models.items()}


@torch.no_grad()
def filled(model: Any, batch: int, context: int) -> DynamicCache:
    """A cache of random numbers for `context` tokens; one token shows what its layers hold."""
    shape = model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True).past_key_values
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(shape.layers):
        held = (
            torch.randn(batch, x.shape[1], context, x.shape[3], dtype=x.dtype, device=x.device)
            for x in (layer.keys, layer.values)
        )
        cache.update(*held, index)
    return cache


def _in_expansion(model: nn.Module, cache: DynamicCache, batch: int, device: str) -> float:
    """The share of a step's time that `kv_b_proj` takes, over all layers; 0 for a model without it."""
    started, spent = [0.0], [0.0]

    def before(*_: Any) -> None:
        synchronise(device)
        started[0] = time.perf_counter()

    def after(*_: Any) -> None:
        synchronise(device)
        spent[0] += time.perf_counter() - started[0]

    with ExitStack() as hooked:
        for name, module in model.named_modules():
            if name.endswith("kv_b_proj"):
                hooked.enter_context(module.register_forward_pre_hook(before))
                hooked.enter_context(module.register_forward_hook(after))
        seconds = step(model, cache, batch, device)
    return spent[0] / seconds


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    command = parser("Decoding with latent attention", "mla_decode")
    command.add_argument("--rounds", type=int, default=12)
    command.add_argument("--reductions", type=float, nargs="+", help=f"of the cache; by default {REDUCTIONS}")
    add_shapes(command, SHAPES)
    arguments = command.parse_args(argv)
    if arguments.fast:
        arguments.rounds, arguments.shapes = 2, FAST_SHAPES
    # The last of them leaves no room for a latent in a tiny model's cache.
    arguments.reductions = arguments.reductions or ([0.5, 0.75] if arguments.fast else REDUCTIONS)
    return arguments


if __name__ == "__main__":
    main()
