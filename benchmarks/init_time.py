"""Seconds to initialise an adapter on Llama-2-7B-shaped layers: CLOVER, PiSSA, and the textbook D x D SVD.

    python benchmarks/init_time.py

One decoder layer with random weights is held in memory. CLOVER on its default targets (key, value, up) and PiSSA on
q, k, v, up, down, at the rank with as many trainable parameters, are timed through `get_peft_model`, in turn. Two
costs are measured on a part and extrapolated, and the record says so:

- exact PiSSA: one attention and one MLP projection, times the number of each;
- textbook: `torch.linalg.svd(W_o^h @ W_v^h)`, D x D, of one head, times the heads of a layer. It covers the V-O
  pairs alone and is compared with CLOVER's whole initialisation.

The run is cut into rounds. In each, CLOVER initialises its share of `--layers` layers one after the other, and the
others one layer (or head) each, extrapolated to all; a speed-up is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import (
    PAPER_LORA_TARGETS,
    at_least,
    at_most,
    clock,
    finish,
    llama,
    options,
    parser,
    rank_for,
    ratio,
    table,
    trainable,
)
from peft import LoraConfig, PeftConfig, get_peft_model
from tqdm import tqdm
from transformers import LlamaForCausalLM

from clover_peft import CloverConfig
from clover_peft.io import run_record as records

TARGETS = {"textbook": 100.0, "pissa_niter_16": 5.0}  # CLOVER is to be at least this much faster
SECONDS = 60.0  # and to make the adapters of Llama-2-7B's 32 layers in at most this


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = _arguments(argv)
    environment = records.environment()
    hidden, heads, mlp = (64, 4, 128) if arguments.fast else (4096, 32, 11008)
    layer = llama(hidden, heads, mlp, 1, arguments.seed, torch.float32, arguments.device)

    count, _ = _initialise(layer, CloverConfig(), arguments.device)  # a warm-up, and the budget
    rank = rank_for(count, layer, PAPER_LORA_TARGETS)
    parameters = {"clover": count}
    rounds: list[dict[str, Any]] = []

    def pissa(kind: str, targets: Sequence[str] = PAPER_LORA_TARGETS) -> tuple[int, float]:
        settings: dict[str, Any] = {"r": rank, "init_lora_weights": kind, "target_modules": list(targets)}
        config = LoraConfig(**settings, lora_alpha=rank)
        return _initialise(copy.deepcopy(layer), config, arguments.device)  # a copy: PiSSA changes the base weights

    for _ in tqdm(range(arguments.rounds), desc="rounds", unit="round"):
        share = range(arguments.layers // arguments.rounds)
        clover = [_initialise(layer, CloverConfig(), arguments.device)[1] for _ in share]
        parameters["pissa_niter_16"], niter = pissa("pissa_niter_16")
        rounds.append({"clover": clover, "pissa_niter_16": niter, "textbook_head": _textbook_head(layer, arguments)})
    if not arguments.skip_exact_pissa:  # once, in the last round
        rounds[-1]["pissa_attention_projection"] = pissa("pissa", ["q_proj"])[1]
        rounds[-1]["pissa_mlp_projection"] = pissa("pissa", ["up_proj"])[1]

    figures = _figures(rounds, heads, arguments.layers)
    rows = [(name, f["one_layer"], f["all_layers"], f["v_clover"], f["how"]) for name, f in figures.items()]
    print(table(["method", "s a layer", f"s {arguments.layers} layers", "v CLOVER", "how"], rows))
    return finish(
        arguments.out,
        {
            "benchmark": "init_time",
            "options": options(arguments),
            "shape": {"hidden_size": hidden, "num_heads": heads, "mlp_size": mlp, "dtype": "float32"},
            "environment": environment,
            "rank": rank,
            "trainable_parameters_per_layer": parameters,
            "rounds": rounds,
            "figures": figures,
            "targets": {
                **{name: at_least(wanted, figures[name]["v_clover"]) for name, wanted in TARGETS.items()},
                **at_most({"seconds": SECONDS}, {"seconds": 32 * figures["clover"]["one_layer"]}),
            },
        },
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    command = parser(__doc__.splitlines()[0] if __doc__ else "", "init_time")
    command.add_argument("--layers", type=int, default=32, help="layers that CLOVER initialises, one after the other")
    command.add_argument("--rounds", type=int, default=4, help="must divide --layers")
    command.add_argument("--skip-exact-pissa", action="store_true", help="leave out PiSSA with the exact SVD")
    arguments = command.parse_args(argv)
    if arguments.fast:
        arguments.layers, arguments.rounds = 4, 2
    if arguments.rounds < 1 or arguments.layers < 1 or arguments.layers % arguments.rounds:
        command.error(f"--rounds {arguments.rounds} does not divide --layers {arguments.layers}")
    return arguments


def _initialise(model: LlamaForCausalLM, config: PeftConfig, device: str) -> tuple[int, float]:
    """Trainable parameters of the adapter and seconds to make it; it is taken off again."""
    wrapped: list[Any] = []
    elapsed = clock(lambda: wrapped.append(get_peft_model(model, config)), device)
    count = trainable(wrapped[0])
    wrapped[0].unload()
    return count, elapsed


def _textbook_head(model: LlamaForCausalLM, arguments: argparse.Namespace) -> float:
    """Seconds for the SVD of one head's D x D product W_o^h W_v^h, the product included."""
    attention = model.model.layers[0].self_attn
    d = attention.head_dim
    value, output = attention.v_proj.weight.detach()[:d], attention.o_proj.weight.detach()[:, :d]
    return clock(lambda: torch.linalg.svd(output @ value, full_matrices=False), arguments.device)


def _figures(rounds: list[dict[str, Any]], heads: int, layers: int) -> dict[str, dict[str, Any]]:
    """Seconds a layer (median of the rounds) and for all layers, and the ratio to CLOVER, by method."""
    clover = [statistics.median(r["clover"]) for r in rounds]
    one_layer = {
        "clover": ("measured", clover),
        "pissa_niter_16": ("a layer measured, all extrapolated", [r["pissa_niter_16"] for r in rounds]),
        "textbook": (
            f"extrapolated from one head to {heads}, V-O only",
            [r["textbook_head"] * heads for r in rounds],
        ),
    }
    last = rounds[-1]
    if "pissa_mlp_projection" in last:
        layer = 3 * last["pissa_attention_projection"] + 2 * last["pissa_mlp_projection"]
        one_layer["pissa"] = ("extrapolated from two projections to five", [layer])
    measured = sum(sum(r["clover"]) for r in rounds)
    return {
        name: {
            "one_layer": statistics.median(seconds),
            "all_layers": measured if name == "clover" else statistics.median(seconds) * layers,
            "v_clover": ratio(seconds, clover[-len(seconds) :]),
            "how": how,
        }
        for name, (how, seconds) in one_layer.items()
    }


if __name__ == "__main__":
    main()
