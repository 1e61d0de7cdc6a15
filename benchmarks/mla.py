"""What a small language model loses when its attention becomes latent attention, by TransMLA's rule and by ours.

    python benchmarks/mla.py                                          # the whole test set: hours on a CPU
    python benchmarks/mla.py --zeroshot 200                           # and 200 questions of each of seven sets
    python benchmarks/mla.py --other-windows 8                        # and Python's source and French manual pages
    python benchmarks/mla.py --windows 16 --calibration-windows 16    # a look
    python benchmarks/mla.py --split validation --windows 6           # for choosing options

SmolLM2-135M-Instruct, perplexity on windows of 1024 tokens of WikiText-2 that do not overlap, spread evenly over the
split if not all are measured; calibrated on windows of the training set, drawn by the seed. Each setting removes a
share of the key-value cache, by each method, and is measured alone and with its heads halved (Q-K without rotation and
V-O, uniform ranks, CLOVER with the same calibration). Nothing is trained. The figure to compare is the logarithm of
the perplexity over the original's. Bytes of the cache are measured in the cache that a forward pass fills. A
conversion's memory is the process's peak above what it held before, and the model's weights; this and the seconds of
processor time (a thread's share) stand beside what `clover plan --mla` estimates. WikiText-2 and the questions are
read from CLOVER_DATA.

Every row is written as soon as it is measured (`mla.*.rows.json` beside the record), and the same command goes on
where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Rows, at_most, clock, options, parser, table
from pruning import windows_of
from real_models import SOURCES, smollm2, windows_of_domain
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import clover_peft
from clover_peft.convert import convert_to_mla
from clover_peft.convert.plan import MlaPlan, measure_rates, plan_mla
from clover_peft.experiments.adaptation.domains import read_domain
from clover_peft.experiments.adaptation.trial import reset_peak_memory
from clover_peft.experiments.adaptation.zeroshot import SETS, read_questions, score
from clover_peft.io import run_record as records

REDUCTIONS = (0.5, 0.6875, 0.85, 0.9297)
WANTED = 0.5  # of TransMLA's logarithm of the perplexity ratio, at most, with half of the cache
# What no row depends on.
_OF_ALL_ROWS = {"reductions", "methods", "prune"}
Row = dict[str, Any]


class Benchmark:
    """The model, the data, and what is measured of one model."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.model, self.tokenizer, self.train, self.test = _subject(arguments)
        self.calibration = [{"input_ids": window.unsqueeze(0)} for window in self.train]
        # Made at the start, so that a reduction that cannot be reached is refused before anything is measured.
        pairs = [(method, reduction) for reduction in arguments.reductions for method in arguments.methods]
        self.plans = {(method, reduction): self._plan(method, reduction) for method, reduction in pairs}
        self.other = _other_texts(arguments, self.tokenizer)
        self.questions = read_questions(arguments.zeroshot * len(SETS)) if arguments.zeroshot else {}

    def measure(self, model: Any) -> Row:
        """Perplexity, accuracy and size of a model."""
        found: Row = {"perplexity": perplexity(model, self.test), "parameters": _parameters(model)}
        if self.other:
            found["other"] = {name: perplexity(model, windows) for name, windows in self.other.items()}
        if self.questions:
            answers = score(model, self.tokenizer, self.questions)
            found["zeroshot"] = {name: sum(a.values()) / len(a) for name, a in answers.items()}
        return found

    def convert(self, method: Any, reduction: float) -> tuple[Any, Row]:
        """A converted model, and what its conversion took, beside the estimate."""
        arguments = self.arguments
        sizes: dict[str, Any] = {"cache_reduction": reduction, "rope_dims": arguments.rope_dims}
        made: list[Any] = []
        _give_back()
        reset_peak_memory()
        before = _resident_bytes() - sum(p.nbytes for p in self.model.parameters())
        work = partial(convert_to_mla, self.model, self.calibration, method=method, **sizes)
        started = time.process_time()
        seconds = clock(lambda: made.append(work()), arguments.device)
        cpu = (time.process_time() - started) / torch.get_num_threads()
        held = records.peak_gpu_bytes() or records.peak_memory_bytes() - before
        result, report = made[0]
        plan = self.plans[method, reduction]
        planned = asdict(plan) | {"bytes": max(stage.peak for stage in plan.stages.values())}
        if arguments.device == "cpu":
            rates = measure_rates(self.model.dtype, plan.largest)
            planned |= {"rates": rates, "seconds": {n: stage.seconds(rates) for n, stage in plan.stages.items()}}
        took = {"convert_seconds": seconds, "convert_cpu_seconds": cpu, "convert_bytes": held}
        return result, {**took, "report": report.to_dict(), "planned": planned}

    def _plan(self, method: Any, reduction: float) -> MlaPlan:
        with torch.device("meta"):
            empty = type(self.model)(self.model.config)
        sizes: dict[str, Any] = {"cache_reduction": reduction, "rope_dims": self.arguments.rope_dims}
        shape: dict[str, Any] = {"windows": len(self.train), "length": self.train.shape[1], "batch_size": 1}
        return plan_mla(empty, dtype=self.model.dtype, method=method, **shape, **sizes)


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = _arguments(argv)
    environment = records.environment()
    given = options(arguments)
    rows = Rows(arguments.out, {name: value for name, value in given.items() if name not in _OF_ALL_ROWS})
    benchmark = Benchmark(arguments)
    base = rows.get(lambda: benchmark.measure(benchmark.model), method=None)
    found: list[Row] = []
    for reduction in arguments.reductions:
        for method in arguments.methods:
            settings = [{"method": method, "reduction": reduction, "halved": h} for h in (False, True)]
            settings = settings if arguments.prune else settings[:1]
            if not all(rows.find(**each) for each in settings):
                _measure(benchmark, rows, settings, base["perplexity"])
            found += [row for each in settings if (row := rows.find(**each)) is not None]
            for row in found[-len(settings) :]:
                tqdm.write("  ".join(str(cell) for cell in _cells(row)))
    header = [
        "",
        "perplexity",
        "log ratio",
        "rope",
        "latent",
        "cache bytes",
        "parameters",
        "s",
        "GiB",
        "other",
        "zero-shot",
    ]
    before = next((row["report"]["cache_bytes"][0] for row in found), "")
    print(table(header, [_original(base, before), *map(_cells, found)]))
    target = _judge(found)
    print(f"log ratio over TransMLA's at -50 %: {target['reached']} (wanted at most {WANTED})")
    for row in found:
        if not row["halved"]:
            print(f"{_name(row)}, measured over planned: {_over_planned(row)}")
    return rows.finish(
        {
            "benchmark": "mla",
            "options": given,
            "environment": environment,
            "data": {
                "windows": len(benchmark.test),
                "window": benchmark.test.shape[1],
                "calibration_windows": len(benchmark.train),
            },
            "original": base,
            "converted": found,
            "targets": {"log ratio v TransMLA's at -50 %": target},
        },
        arguments.out,
    )


def _measure(benchmark: Benchmark, rows: Rows, settings: Sequence[Row], base: float) -> None:
    """Convert once, and measure the result alone and with its heads halved, unless that was done before."""
    model, facts = benchmark.convert(settings[0]["method"], settings[0]["reduction"])
    for each in settings:
        if each["halved"]:
            clover_peft.prune(model, 0.5, ranks="uniform", calibration=benchmark.calibration)
        if rows.find(**each) is None:
            found = benchmark.measure(model)
            rows.add({**found, "log_ratio": math.log(found["perplexity"] / base), **facts}, **each)
            facts["report"] = {**facts["report"], "layers": []}  # they are in the row before


def _name(row: Row) -> str:
    return f"{row['method']} -{row['reduction']:.2%}{', heads halved' if row['halved'] else ''}"


def _cells(row: Row) -> list[object]:
    report = row["report"]
    sizes = (report["rope_dims"], report["kv_lora_rank"], report["cache_bytes"][1], row["parameters"])
    took = (f"{row['convert_seconds']:.0f}", f"{row['convert_bytes'] / 2**30:.2f}", _others(row), _accuracy(row))
    return [_name(row), row["perplexity"], row["log_ratio"], *map(str, sizes), *took]


def _original(row: Row, cache: object) -> list[object]:
    return [
        "original",
        row["perplexity"],
        0.0,
        "",
        "",
        str(cache),
        str(row["parameters"]),
        "",
        "",
        _others(row),
        _accuracy(row),
    ]


def _others(row: Row) -> str:
    """Perplexities on other texts."""
    return ", ".join(f"{name} {value:.1f}" for name, value in row.get("other", {}).items()) or "-"


def _accuracy(row: Row) -> str:
    """The mean over the sets."""
    found = row.get("zeroshot")
    return f"{sum(found.values()) / len(found):.3f}" if found else "-"


def _over_planned(row: Row) -> str:
    planned = row["planned"]
    ratios = {"memory": row["convert_bytes"] / planned["bytes"]}
    if "seconds" in planned:  # of processor time: others may share the machine
        ratios["seconds"] = row["convert_cpu_seconds"] / sum(planned["seconds"].values())
    return ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())


def _give_back() -> None:
    """Return freed memory to the system where it can be done, so that what comes next does not use it unseen."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _judge(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = {row["method"]: row["log_ratio"] for row in rows if row["reduction"] == 0.5 and not row["halved"]}
    reached = found["clover"] / found["transmla"] if len(found) == 2 and found["transmla"] > 0 else None
    return at_most({"log ratio": WANTED}, {"log ratio": reached})["log ratio"]


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """The exponential of the mean loss over windows (n, tokens)."""
    ids = (window.unsqueeze(0).to(model.device) for window in windows)
    progress = tqdm(ids, desc="perplexity", unit="window", total=len(windows), leave=False)
    losses = [float(model.eval()(input_ids=i, labels=i, use_cache=False).loss) for i in progress]
    return math.exp(sum(losses) / len(losses))


def _subject(arguments: argparse.Namespace) -> tuple[Any, Any, Tensor, Tensor]:
    """The model, its tokenizer, the windows to calibrate with, and the windows to measure on."""
    generator = torch.Generator().manual_seed(arguments.seed)
    if arguments.fast:
        torch.manual_seed(arguments.seed)
        shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=64, **shape)
        train, test = torch.randint(3, 64, (2, 8, 64), generator=generator)
        return LlamaForCausalLM(config).to(arguments.device).eval(), _read_bytes, train, test
    model, tokenizer = smollm2()
    train, test = windows_of("train", arguments.calibration_window), windows_of(arguments.split)
    train = train[torch.randperm(len(train), generator=generator)[: arguments.calibration_windows]]
    count = min(arguments.windows or len(test), len(test))
    return model.to(arguments.device), tokenizer, train, test[[i * len(test) // count for i in range(count)]]


def _other_texts(arguments: argparse.Namespace, tokenizer: Any) -> dict[str, Tensor]:
    """Windows of text of other kinds than what the conversion is calibrated with, by name."""
    names, count = [name for name in SOURCES if name != "wikitext"], arguments.other_windows
    if not count:
        return {}
    if arguments.fast:
        drawn = torch.randint(3, 64, (len(names), count, 64), generator=torch.Generator().manual_seed(arguments.seed))
        return dict(zip(names, drawn, strict=True))
    domains = {name: read_domain(name, SOURCES[name]) for name in names}
    return {name: windows_of_domain(each, "test", count, tokenizer, arguments.seed) for name, each in domains.items()}


def _read_bytes(text: str, **_: Any) -> dict[str, list[int]]:
    """The tokenizer of a tiny model."""
    return {"input_ids": [3 + byte % 61 for byte in text.encode()]}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    command = parser(__doc__.splitlines()[0] if __doc__ else "", "mla")
    command.add_argument("--split", default="test", choices=["validation", "test"], help="of WikiText-2")
    command.add_argument("--windows", type=int, default=0, help="measured windows; 0: the whole split")
    command.add_argument("--other-windows", type=int, default=0, help="measured windows of text of each other kind")
    command.add_argument("--calibration-windows", type=int, default=64)
    command.add_argument("--calibration-window", type=int, default=1024, help="tokens in one")
    command.add_argument("--reductions", type=float, nargs="+", default=REDUCTIONS, help="shares of the cache")
    command.add_argument("--methods", nargs="+", default=["clover", "transmla"], choices=["clover", "transmla"])
    command.add_argument("--rope-dims", type=int, help="by default what the method chooses")
    command.add_argument("--zeroshot", type=int, default=0, help="questions of each of seven sets; 0: none")
    command.add_argument("--no-prune", dest="prune", action="store_false", help="leave out halved heads")
    return command.parse_args(argv)


if __name__ == "__main__":
    main()
