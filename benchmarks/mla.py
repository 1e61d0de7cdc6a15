"""What a small language model loses when its attention becomes latent attention, by TransMLA's rule and by ours.

    python benchmarks/mla.py                                          # the whole test set: hours on a CPU
    python benchmarks/mla.py --windows 16 --calibration-windows 16    # a look
    python benchmarks/mla.py --split validation --windows 6           # for choosing options

SmolLM2-135M-Instruct, perplexity on windows of 1024 tokens of WikiText-2 that do not overlap, spread evenly over the
split if not all are measured; calibrated on windows of the training set, drawn by the seed. Each setting removes a
share of the key-value cache, by each method, and is measured alone and with its heads halved (Q-K without rotation and
V-O, uniform ranks, CLOVER with the same calibration). Nothing is trained. The figure to compare is the logarithm of
the perplexity over the original's. Bytes of the cache are measured in the cache that a forward pass fills.
WikiText-2 is read from CLOVER_DATA.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import clock, finish, options, parser, table
from pruning import windows_of
from real_models import smollm2
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import clover_peft
from clover_peft.convert import convert_to_mla
from clover_peft.io import run_record as records

REDUCTIONS = (0.5, 0.6875, 0.85, 0.9297)
WANTED = 0.5  # of TransMLA's logarithm of the perplexity ratio, at most, with half of the cache


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = _arguments(argv)
    environment = records.environment()
    model, train, test = _subject(arguments)
    calibration = [{"input_ids": window.unsqueeze(0)} for window in train]
    base = perplexity(model, test)
    rows: list[dict[str, Any]] = []
    printed = [["original", base, 0.0, "", "", ""]]
    for reduction in arguments.reductions:
        for method in arguments.methods:
            made: list[Any] = []
            seconds = clock(
                lambda m=method, r=reduction, made=made: made.append(  # type: ignore[misc]
                    convert_to_mla(model, calibration, rope_dims=arguments.rope_dims, cache_reduction=r, method=m)
                ),
                arguments.device,
            )
            result, report = made[0]
            for halved in (False, True) if arguments.prune else (False,):
                if halved:
                    clover_peft.prune(result, 0.5, ranks="uniform", calibration=calibration)
                found = perplexity(result, test)
                rows.append(
                    {
                        "method": method,
                        "reduction": reduction,
                        "halved": halved,
                        "perplexity": found,
                        "log_ratio": math.log(found / base),
                        "parameters": sum(p.numel() for p in result.parameters()),
                        "convert_seconds": seconds,
                        "report": report.to_dict(),
                    }
                )
                name = f"{method} -{reduction:.2%}{', heads halved' if halved else ''}"
                sizes = (report.rope_dims, report.kv_lora_rank, report.cache_bytes[1])
                printed.append([name, found, rows[-1]["log_ratio"], *map(str, sizes)])
                tqdm.write("  ".join(str(cell) for cell in printed[-1]))
    print(table(["", "perplexity", "log ratio", "rope", "latent", "cache bytes"], printed))
    target = _judge(rows)
    print(f"log ratio over TransMLA's at -50 %: {target['reached']} (wanted at most {WANTED})")
    return finish(
        arguments.out,
        {
            "benchmark": "mla",
            "options": options(arguments),
            "environment": environment,
            "data": {"windows": len(test), "window": test.shape[1], "calibration_windows": len(train)},
            "original": {"perplexity": base, "parameters": sum(p.numel() for p in model.parameters())},
            "converted": rows,
            "targets": {"log ratio v TransMLA's at -50 %": target},
        },
    )


def _judge(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = {row["method"]: row["log_ratio"] for row in rows if row["reduction"] == 0.5 and not row["halved"]}
    reached = found["clover"] / found["transmla"] if len(found) == 2 and found["transmla"] > 0 else None
    return {"wanted": WANTED, "reached": reached, "met": None if reached is None else reached <= WANTED}


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """The exponential of the mean loss over windows (n, tokens)."""
    ids = (window.unsqueeze(0).to(model.device) for window in windows)
    progress = tqdm(ids, desc="perplexity", unit="window", total=len(windows), leave=False)
    losses = [float(model.eval()(input_ids=i, labels=i, use_cache=False).loss) for i in progress]
    return math.exp(sum(losses) / len(losses))


def _subject(arguments: argparse.Namespace) -> tuple[Any, Tensor, Tensor]:
    """The model, the windows to calibrate with, and the windows to measure on."""
    generator = torch.Generator().manual_seed(arguments.seed)
    if arguments.fast:
        torch.manual_seed(arguments.seed)
        shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=64, **shape)
        train, test = torch.randint(3, 64, (2, 8, 64), generator=generator)
        return LlamaForCausalLM(config).to(arguments.device).eval(), train, test
    model = smollm2()[0].to(arguments.device)
    train, test = windows_of("train", arguments.calibration_window), windows_of(arguments.split)
    train = train[torch.randperm(len(train), generator=generator)[: arguments.calibration_windows]]
    count = min(arguments.windows or len(test), len(test))
    return model, train, test[[i * len(test) // count for i in range(count)]]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    command = parser(__doc__.splitlines()[0] if __doc__ else "", "mla")
    command.add_argument("--split", default="test", choices=["validation", "test"], help="of WikiText-2")
    command.add_argument("--windows", type=int, default=0, help="measured windows; 0: the whole split")
    command.add_argument("--calibration-windows", type=int, default=64)
    command.add_argument("--calibration-window", type=int, default=1024, help="tokens in one")
    command.add_argument("--reductions", type=float, nargs="+", default=REDUCTIONS, help="shares of the cache")
    command.add_argument("--methods", nargs="+", default=["clover", "transmla"], choices=["clover", "transmla"])
    command.add_argument("--rope-dims", type=int, help="by default what the method chooses")
    command.add_argument("--no-prune", dest="prune", action="store_false", help="leave out halved heads")
    return command.parse_args(argv)


if __name__ == "__main__":
    main()
