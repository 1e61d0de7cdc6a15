"""What a pruned language model keeps on text of kinds that it was not calibrated with.

    python benchmarks/calibration_text.py

SmolLM2-135M-Instruct loses a share of its V-O, calibrated with each of three texts and with a third of each:
WikiText-2 (from CLOVER_DATA), the source of Python's standard library and French manual pages (from Debian); with as
many tokens that the model writes itself ("own"); and with half of these beside half of WikiText-2. Its loss is
measured on held-out windows of the three texts, and the rise from the unpruned model's is paired by window. An
interrupted run goes on after its last row.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from harness import Rows, options, parser, table, tiny_language_model
from real_models import SOURCES, smollm2, windows_of_domain
from torch import Tensor
from tqdm import tqdm

import clover_peft
from clover_peft.experiments.adaptation.domains import read_domain
from clover_peft.io import run_record as records
from clover_peft.pruning import Calibration

ALL, OWN, BESIDE = "all", "own", "wikitext and own"
OWN_LENGTH, AT_A_TIME = 256, 4  # tokens of a window that the model writes; windows in a batch of them


def main(argv: Sequence[str] | None = None) -> Path:
    command = parser(__doc__.splitlines()[0] if __doc__ else "", "calibration_text")
    command.add_argument("--ratio", nargs="+", type=float, default=[0.25, 0.5], help="shares of V-O to remove")
    command.add_argument("--ranks", default="layer", choices=["layer", "uniform", "global"])
    command.add_argument("--windows", type=int, default=8, help="of 1024 tokens, measured on of each text")
    command.add_argument("--calibration-windows", type=int, default=15, help="a multiple of three")
    arguments = command.parse_args(argv)
    if arguments.calibration_windows < 3 or arguments.calibration_windows % 3 or arguments.windows < 2:
        command.error("--calibration-windows must be a multiple of three, and --windows at least 2")
    environment, subject = records.environment(), _Subject(arguments)
    keys = ("ranks", "windows", "calibration_windows", "seed", "device", "fast")
    rows = Rows(arguments.out, {key: getattr(arguments, key) for key in keys})
    unpruned = rows.get(lambda: {"losses": subject.losses(subject.load())}, calibrated_with=None, ratio=0.0)
    table_rows, measured = [], []
    for text in tqdm([*SOURCES, ALL, OWN, BESIDE], desc="texts", unit="text"):
        data = cache(partial(subject.calibrate, text))  # made once, if a row of it is missing
        for ratio in arguments.ratio:
            measure = partial(subject.measure, data, ratio, arguments.ranks)
            row = rows.get(measure, calibrated_with=text, ratio=ratio)
            row["rises"] = {name: _rise(row["losses"][name], unpruned["losses"][name]) for name in SOURCES}
            measured.append(row)
            cells = [f"{rise:+.3f} ({error:.3f})" for rise, error in row["rises"].values()]
            table_rows.append([f"{text}, {ratio:.1%}", *cells])
    print(table(["calibrated with, removed; rise of the loss on", *SOURCES], table_rows))
    record = {
        "benchmark": "calibration_text",
        "options": options(arguments),
        "environment": environment,
        "data": subject.about,
        "unpruned": unpruned,
        "pruned": measured,
    }
    return rows.finish(record, arguments.out)


class _Subject:
    """The model, and windows of three texts."""

    def __init__(self, arguments: Any) -> None:
        self.fast, self.seed, self.device = arguments.fast, arguments.seed, arguments.device
        self.calibration: dict[str, Tensor] = {}  # text -> (windows, tokens)
        self.held_out: dict[str, Tensor] = {}
        self.about: dict[str, Any] = {}
        tokenizer = None if self.fast else smollm2()[1]
        for name, source in SOURCES.items():
            counts = (arguments.calibration_windows, arguments.windows)
            if tokenizer is None:
                drawn = torch.randint(3, 64, (sum(counts), 64), generator=torch.Generator().manual_seed(self.seed))
                self.calibration[name], self.held_out[name] = drawn.split(counts)
                continue
            domain = read_domain(name, source)
            self.about[name] = domain.describe()
            self.calibration[name], self.held_out[name] = (
                windows_of_domain(domain, split, count, tokenizer, self.seed)
                for split, count in zip(("train", "test"), counts, strict=True)
            )
        share = arguments.calibration_windows // len(SOURCES)
        self.calibration[ALL] = torch.cat([windows[:share] for windows in self.calibration.values()])

    def load(self) -> Any:
        """A new copy of the unpruned model, in evaluation mode."""
        if self.fast:
            return tiny_language_model(self.seed, self.device)
        return smollm2()[0].to(self.device).eval()

    def calibrate(self, text: str) -> Calibration:
        batches = {OWN: self._own, BESIDE: self._beside}.get(text, partial(self._batches, text))()
        return clover_peft.calibrate(self.load(), batches)

    def _batches(self, text: str) -> list[dict[str, Tensor]]:
        return [{"input_ids": window.unsqueeze(0)} for window in self.calibration[text]]

    def _own(self) -> list[dict[str, Tensor]]:
        """As many tokens as the windows of a text have, written by the model."""
        tokens = self.calibration[ALL].numel()
        length = min(OWN_LENGTH, tokens)
        return clover_peft.own_text(self.load(), rows=tokens // length, length=length, batch_size=AT_A_TIME)

    def _beside(self) -> list[dict[str, Tensor]]:
        own, text = self._own(), self._batches("wikitext")
        return own[: -(-len(own) // 2)] + text[: len(text) // 2]

    def measure(self, data: Callable[[], Calibration], ratio: float, ranks: Any) -> dict[str, Any]:
        model = self.load()
        clover_peft.prune(model, {"vo": ratio}, calibration=data(), ranks=ranks)
        return {"losses": self.losses(model)}

    @torch.no_grad()
    def losses(self, model: Any) -> dict[str, list[float]]:
        """Text -> the loss of each held-out window, in nats a token."""
        found = {}
        for name, windows in self.held_out.items():
            batches = [window.unsqueeze(0).to(self.device) for window in windows]
            found[name] = [float(model(input_ids=ids, labels=ids).loss) for ids in batches]
        return found


def _rise(after: Sequence[float], before: Sequence[float]) -> tuple[float, float]:
    """The mean rise of the loss in nats a token, and its standard error over windows."""
    rises = [a - b for a, b in zip(after, before, strict=True)]
    return statistics.mean(rises), statistics.stdev(rises) / len(rises) ** 0.5


if __name__ == "__main__":
    main()
