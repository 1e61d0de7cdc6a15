"""How much the scale of `balance_updates` depends on the text it is measured on, and how blocks differ.

    python benchmarks/update_scale.py

The sensitivity kappa of every block of a CLOVER adapter is measured on windows of each of several texts (as in
`configs/ablations/adaptation_search.yaml`), on fewer windows of the first, and on random tokens, which need no data.
Figures: kappa's range over blocks by kind of target, and for each pair of texts the ratio of kappas over all blocks
(10 % to 90 % of blocks, after division by the median ratio: a common factor is a learning rate).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import finish, options, parser, table
from peft import get_peft_model
from torch import Tensor
from tqdm import tqdm

from clover_peft import CloverConfig
from clover_peft.experiments.adaptation.plan import read_experiment
from clover_peft.experiments.adaptation.trial import Laboratory, drawn
from clover_peft.experiments.adaptation.windows import restricted_head
from clover_peft.io import run_record as records
from clover_peft.tuner.update_scale import update_sensitivities

FEW = 4  # windows of the smaller sample


def main(argv: Sequence[str] | None = None) -> Path:
    command = parser(__doc__.splitlines()[0], "update_scale")
    command.add_argument("--windows", type=int, default=24)
    command.add_argument("--targets", nargs="+", default=["k_proj", "v_proj", "up_proj", "down_proj"])
    arguments = command.parse_args(argv)
    environment = records.environment()
    experiment = read_experiment("adaptation_tiny" if arguments.fast else "adaptation_search")
    laboratory = Laboratory(experiment, Path())
    base = laboratory.load().to(arguments.device)
    model = get_peft_model(base, CloverConfig(target_modules=arguments.targets)).eval()
    first, *_ = laboratory.windows
    sources = {name: (name, arguments.windows) for name in laboratory.windows}
    sources |= {f"{first}, {FEW} windows": (first, FEW), "random tokens": ("", arguments.windows)}
    kappas: dict[str, dict[tuple[str, str], Tensor]] = {}
    for label, (name, count) in tqdm(sources.items(), desc="texts", unit="text"):
        with restricted_head(model, laboratory.windows[name].vocabulary if name else None) as labels:
            batches = _batches(laboratory, name, count, arguments.seed, labels)
            kappas[label] = update_sensitivities(model, batches)
    kinds = _by_kind(kappas[first])
    rows = [[kind, *(f"{v:.2e}" for v in _quantiles(values))] for kind, values in kinds.items()]
    print(table([f"kappa on {first}", "0 %", "10 %", "50 %", "90 %", "100 %"], rows))
    ratios = {other: _ratio(kappas[other], kappas[first]) for other in kappas if other != first}
    rows = [[other, *(f"{r[key]:.2f}" for key in ("common", "low", "high"))] for other, r in ratios.items()]
    print(table([f"kappa / that on {first}", "median", "10 % of blocks", "90 %"], rows))
    return finish(
        arguments.out,
        {
            "benchmark": "update_scale",
            "options": options(arguments),
            "environment": environment,
            "model": laboratory.facts["model"],
            "figures": {"kappa": {kind: _quantiles(v) for kind, v in kinds.items()}, "ratios": ratios},
            "kappas": {
                label: {f"{path} ({name})": values.tolist() for (path, name), values in found.items()}
                for label, found in kappas.items()
            },
        },
    )


def _batches(laboratory: Laboratory, name: str, count: int, seed: int, labels: Tensor) -> Iterator[dict[str, Tensor]]:
    """Windows of a domain, or of random tokens without a name."""
    if name:
        windows = drawn(laboratory.windows[name], 1, seed)
    else:
        generator = torch.Generator().manual_seed(seed)
        length = laboratory.experiment.training.length
        windows = (torch.randint(len(labels), (1, length), generator=generator) for _ in range(count))
    for _ in range(count):
        ids = next(windows).to(labels.device)
        yield {"input_ids": ids, "labels": labels[ids]}


def _by_kind(kappas: dict[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    kinds: dict[str, list[Tensor]] = {}
    for (path, _), values in kappas.items():
        kinds.setdefault(path.rpartition(".")[2], []).append(values)
    return {kind: torch.cat(values) for kind, values in kinds.items()}


def _quantiles(values: Tensor) -> list[float]:
    return [float(v) for v in values.quantile(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]).to(values))]


def _ratio(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> dict[str, float]:
    ratio = torch.cat([one[key] / other[key] for key in other])
    common = ratio.median()
    low, high = (ratio / common).quantile(torch.tensor([0.1, 0.9]).to(ratio))
    return {"common": float(common), "low": float(low), "high": float(high)}


if __name__ == "__main__":
    main()
