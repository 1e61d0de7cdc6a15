"""What the benchmarks share: Llama-shaped layers, LoRA-sized budgets, clocks, tables and their common options."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from clover_peft import records

RESULTS = Path(__file__).parent / "results"
PAPER_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # appendix A.2, arXiv 2411.17426


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Argument parser with the options that every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="record to write; never overwrites")
    result.add_argument("--fast", action="store_true", help="tiny shapes, to see that it runs; its times mean nothing")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return result


def llama(
    hidden_size: int, num_heads: int, mlp_size: int, layers: int, seed: int, dtype: torch.dtype, device: str
) -> LlamaForCausalLM:
    """Randomly initialised Llama of the given shape, as good as without a vocabulary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=mlp_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        num_hidden_layers=layers,
        vocab_size=16,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


def trainable(model: nn.Module) -> int:
    """Number of parameters that require a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def rank_for(budget: int, model: nn.Module, targets: Sequence[str]) -> int:
    """Rank at which a low-rank pair on every target has closest to `budget` parameters: r (in + out) each."""
    linears = [m for name, m in model.named_modules() if name.rpartition(".")[2] in targets]
    return max(1, round(budget / sum(m.in_features + m.out_features for m in linears)))


def clock(work: Callable[[], Any], device: str) -> float:
    """Seconds that `work` takes, the accelerator's queue included."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios of values taken in the same round: what slows a whole round down cancels."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain-text table, the first column left-aligned and the others right-aligned."""
    cells = [list(header), *([f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def finish(out: Path, record: dict[str, Any]) -> Path:
    """Write the record, say where, and return its path."""
    path = records.write(out, record)
    print(f"\nrecord: {path}")
    return path


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command line's options, for the record."""
    return {name: value for name, value in vars(arguments).items() if name != "out"}
