"""What the benchmarks share: Llama-shaped layers, LoRA-sized budgets, clocks, tables and their common options."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from clover_peft.io import atomic
from clover_peft.io import run_record as records

RESULTS = Path(__file__).parent / "results"
PAPER_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # appendix A.2, arXiv 2411.17426

FAST_SHAPES = [(1, 8), (2, 16)]  # of --fast: batch size and context


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Argument parser with the options that every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="record to write; never overwrites")
    result.add_argument("--fast", action="store_true", help="tiny shapes, to see that it runs; its times mean nothing")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    return result


def _device(name: str) -> str:
    """A device's name; it becomes torch's current one, whose memory `run_record` reads and which trainers use."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, found {name}") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return name


def add_shape(command: argparse.ArgumentParser, layers: int, cuda_layers: int) -> None:
    """Options for the shape of `llama`; `fill_shape` gives those that were left out their defaults."""
    command.add_argument("--hidden-size", type=int, help="default 2048, on cuda 4096")
    command.add_argument("--num-heads", type=int, help="default hidden size / 128")
    command.add_argument("--key-value-heads", type=int, help="default as many as heads")
    command.add_argument("--mlp-size", type=int, help="default as Llama-2-7B: hidden size x 2.6875")
    command.add_argument("--layers", type=int, help=f"default {layers}, on cuda {cuda_layers}")
    command.add_argument("--dtype", help="of the weights; default float32, on cuda bfloat16")
    command.set_defaults(default_layers=(layers, cuda_layers))


def fill_shape(arguments: argparse.Namespace) -> None:
    """Llama-2-7B's shape on CUDA, half of it on a CPU, next to nothing with `--fast`, where no option says more."""
    cuda = arguments.device.startswith("cuda")
    if arguments.fast:
        arguments.hidden_size, arguments.num_heads = 64, 4
    arguments.hidden_size = arguments.hidden_size or (4096 if cuda else 2048)
    arguments.num_heads = arguments.num_heads or arguments.hidden_size // 128
    arguments.key_value_heads = arguments.key_value_heads or arguments.num_heads
    arguments.mlp_size = arguments.mlp_size or arguments.hidden_size * 43 // 16
    arguments.layers = arguments.layers or arguments.default_layers[cuda]
    arguments.dtype = arguments.dtype or ("bfloat16" if cuda else "float32")
    del arguments.default_layers


def llama(
    hidden_size: int,
    num_heads: int,
    mlp_size: int,
    layers: int,
    seed: int,
    dtype: torch.dtype,
    device: str,
    head_dim: int | None = None,
    key_value_heads: int | None = None,
) -> LlamaForCausalLM:
    """Randomly initialised Llama of the given shape, as good as without a vocabulary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=mlp_size,
        num_attention_heads=num_heads,
        num_key_value_heads=key_value_heads or num_heads,
        num_hidden_layers=layers,
        vocab_size=16,
        head_dim=head_dim or hidden_size // num_heads,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


def tiny_language_model(seed: int, device: str) -> LlamaForCausalLM:
    """A random Llama with 64 tokens, in evaluation mode, in place of a real model where `--fast` is given."""
    torch.manual_seed(seed)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=64, **shape)
    return LlamaForCausalLM(config).to(device).eval()


def add_compile(command: argparse.ArgumentParser) -> None:
    """The option for `compile_decoders`, whose records have a name of their own."""
    command.add_argument("--compile", action="store_true", help="all decoders under torch.compile")
    command.set_defaults(out=None)


def fill_out(arguments: argparse.Namespace, name: str) -> None:
    """Where the record of a benchmark with `add_compile` goes, if no option says so."""
    arguments.out = arguments.out or RESULTS / f"{name}{'_compiled' if arguments.compile else ''}.json"


def compile_decoders(models: Iterable[nn.Module]) -> None:
    """Put the decoder layers of `llama`s under torch.compile, in place.

    What torch learns of a function counts for all modules that run the same code: after DoRA, which cannot be compiled
    in one graph, all other models would be split where DoRA is. So each decoder gets its own copy of the code.
    """
    torch._dynamo.config.recompile_limit = 64  # adapters and lengths of the cache need versions of their own
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # beyond it they would run as they are
    for model in models:
        decoder = decoder_of(model)
        found = type(decoder).forward
        own = types.FunctionType(
            found.__code__.replace(), found.__globals__, found.__name__, found.__defaults__, found.__closure__
        )
        own.__kwdefaults__ = found.__kwdefaults__
        decoder.forward = types.MethodType(own, decoder)
        decoder.compile()


def decoder_of(model: nn.Module) -> Any:
    """The decoder layers of `llama`, with or without an adapter, below the language-model head."""
    return model.get_submodule("base_model.model.model" if isinstance(model, PeftModel) else "model")


@torch.no_grad()
def randomise(model: nn.Module, seed: int, std: float = 0.01) -> None:
    """Add small random numbers to what is trained, so that no adapter is at its start, where it does nothing."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=std)


def trainable(model: nn.Module) -> int:
    """Number of parameters that require a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def rank_for(budget: int, model: nn.Module, targets: Sequence[str]) -> int:
    """Rank at which a low-rank pair on every target has closest to `budget` parameters: r (in + out) each.

    Args:
        budget: trained parameters.
        model: the base model.
        targets: names of modules, or ends of their paths.
    """
    ends = tuple(f".{target}" for target in targets)
    linears = [m for name, m in model.named_modules() if f".{name}".endswith(ends)]
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
        torch.cuda.synchronize(device)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios of values taken in the same round: what slows a whole round down cancels."""
    return statistics.median(ratios(numerator, denominator))


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Ratios of values taken in the same round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median is with 95 % confidence, whatever the distribution: between two of the values in order.

    As many are left out at either end as a fair coin falls on one side in `len(values)` throws with a probability of
    at most 2.5 %; below six values none are, and the confidence is less.
    """
    n, left_out, probability = len(values), 0, 0.5 ** len(values)
    while probability <= 0.025:
        left_out += 1
        probability += math.comb(n, left_out) * 0.5**n
    left_out = max(0, left_out - 1)
    ordered = sorted(values)
    return ordered[left_out], ordered[n - 1 - left_out]


def measured(name: str, values: Sequence[float]) -> dict[str, Any]:
    """A figure for the record: the median of values of all rounds, and its `interval`."""
    return {name: statistics.median(values), f"{name}_interval": interval(values)}


def told(figures: Mapping[str, Any], name: str) -> str:
    """A figure of `measured`, for a table."""
    low, high = figures[f"{name}_interval"]
    return f"{figures[name]:.3f} ({low:.3f} to {high:.3f})"


def at_most(wanted: Mapping[str, float], reached: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Targets for the record: what each figure was to be at most, and what it is.

    One that was not measured is neither met nor missed (None), nor is one whose `interval` has the target in it.
    """

    def judged(most: float, value: float | None, around: tuple[float, float] | None) -> dict[str, Any]:
        low, high = around or (value, value)
        met = None if low is None or high is None or low <= most < high else high <= most
        return {"wanted": most, "reached": value, "interval": around, "met": met}

    return {name: judged(most, reached[name], reached.get(f"{name}_interval")) for name, most in wanted.items()}


def at_least(wanted: float, reached: float | None, interval: Sequence[float] | None = None) -> dict[str, Any]:
    """A target for the record: what a figure was to be at least, and what it is.

    One that was not measured is neither met nor missed (None). The whole of an interval has to reach the target.
    """
    low = interval[0] if interval else reached
    return {"wanted": wanted, "reached": reached, "met": None if low is None else low >= wanted}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain-text table, the first column left-aligned and the others right-aligned."""
    cells = [list(header), *([f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


class Rows:
    """The rows of a record, each written as soon as it is measured, so that an interrupted run can go on.

    They are kept beside the record to write, as `mla.5b2f0c19.rows.json` for `mla.json`, until `finish` is done. The
    number in the name stands for the common settings, so that runs with other settings and the same record have rows
    of their own.

    Args:
        out: the record to write.
        common: settings that all rows share. A row of other settings is not taken.
    """

    def __init__(self, out: Path, common: Mapping[str, Any]) -> None:
        self.common, self._revision = dict(common), records.environment()["git_revision"]
        name = hashlib.sha256(json.dumps(self._settings({}), sort_keys=True).encode()).hexdigest()[:8]
        self.path = out.with_name(f"{out.stem}.{name}.rows.json")
        remedy = "move it away to measure all rows again"
        self._kept = records.read_json(self.path, remedy)["rows"] if self.path.exists() else []

    def find(self, **settings: Any) -> dict[str, Any] | None:
        """The row that was measured with these settings and the common ones; None if there is none."""
        wanted = self._settings(settings)
        return next((kept["row"] for kept in self._kept if kept["settings"] == wanted), None)

    def add(self, row: dict[str, Any], **settings: Any) -> dict[str, Any]:
        """Write a row down; it also names the revision that measured it."""
        row = {**settings, **row, "git_revision": self._revision}
        self._kept.append({"settings": self._settings(settings), "row": row})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(self.path, {"rows": self._kept})
        return row

    def get(self, make: Callable[[], dict[str, Any]], **settings: Any) -> dict[str, Any]:
        """The row of these settings, measured now if it was not before."""
        return self.find(**settings) or self.add(make(), **settings)

    def finish(self, record: dict[str, Any], out: Path) -> Path:
        """As `finish` of a record, whose rows need no file of their own then."""
        path = finish(out, record)
        self.path.unlink(missing_ok=True)
        return path

    def _settings(self, settings: Mapping[str, Any]) -> Any:
        return json.loads(json.dumps({**self.common, **settings}, default=str))  # as they are read again


def finish(out: Path, record: dict[str, Any]) -> Path:
    """Write the record, say where, and return its path."""
    path = records.write(out, record)
    print(f"\nrecord: {path}")
    return path


def add_shapes(command: argparse.ArgumentParser, default: Sequence[tuple[int, int]]) -> None:
    """Adds --shapes, batch sizes and contexts to decode at; `--fast` takes `FAST_SHAPES` instead."""
    command.add_argument(
        "--shapes",
        nargs="+",
        type=lambda text: tuple(map(int, text.split("x"))),
        default=default,
        metavar="BATCHxCONTEXT",
    )


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command line's options, for the record."""
    return {name: value for name, value in vars(arguments).items() if name != "out"}
