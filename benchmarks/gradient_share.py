"""How much of a text domain's gradient the directions of LoRA and of CLOVER contain at the start of training.

    python benchmarks/gradient_share.py

The gradient of the mean loss on a domain says which change of a projection's weight learns the domain fastest. An
adapter makes the part of it that lies in the changes it can express: for a block of CLOVER, all matrices whose rows
are combinations of the block's rows of the weight; for a LoRA of rank r, which can turn to it, the nearest matrix of
rank r. The gradient is that of half the windows, and its share is measured by the other half: a subspace that fits the
noise of the first gains nothing. The mean input is that of all windows. Figures: the
median over projections, by kind of target.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from harness import finish, options, parser, table
from input_dimensions import adapted, add_adapter
from torch import Tensor, nn
from tqdm.auto import trange

from clover_peft.experiments.adaptation.trial import Laboratory, drawn
from clover_peft.experiments.adaptation.windows import restricted_head
from clover_peft.io import run_record as records
from clover_peft.tuner.layer import CloverLayer
from clover_peft.tuner.layers import clover_layers


def main(argv: Sequence[str] | None = None) -> Path:
    command = parser(__doc__.splitlines()[0], "gradient_share")
    add_adapter(command)
    command.add_argument("--rank", type=int, default=24, help="of LoRA")
    arguments = command.parse_args(argv)
    environment = records.environment()
    laboratory, model = adapted(arguments)
    layers = dict(clover_layers(model))
    figures = dict[str, dict[str, dict[str, float]]]()
    for domain in laboratory.windows:
        found = dict[str, dict[str, list[float]]]()
        halves, means = _gradients(laboratory, model, layers, domain, arguments)
        for path, layer in layers.items():
            kind = path.rpartition(".")[2]
            for label, share in _shares(layer, halves[0][path], halves[1][path], means[path], arguments.rank):
                found.setdefault(label, {}).setdefault(kind, []).append(share)
        figures[domain] = {label: {k: statistics.median(v) for k, v in by.items()} for label, by in found.items()}
        kinds = list(next(iter(figures[domain].values())))
        rows = [[label, *(f"{f[k]:.1%}" for k in kinds)] for label, f in figures[domain].items()]
        print(table([f"share of the gradient on {domain}", *kinds], rows))
    return finish(
        arguments.out,
        {
            "benchmark": "gradient_share",
            "options": options(arguments),
            "environment": environment,
            "model": laboratory.facts["model"],
            "figures": figures,
        },
    )


def _gradients(
    laboratory: Laboratory,
    model: nn.Module,
    layers: dict[str, CloverLayer],
    domain: str,
    arguments: argparse.Namespace,
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Path -> (out_features, in_features), the gradient of either half of the windows; path -> sum of the inputs."""
    halves: list[dict[str, Tensor]] = [{}, {}]
    means: dict[str, Tensor] = {}

    def add(path: str, x: Tensor) -> None:
        total = x.detach().flatten(0, -2).double().sum(0)
        means[path] = means[path] + total if path in means else total

    weights: dict[str, Any] = {path: layer.get_base_layer().weight for path, layer in layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    text = laboratory.windows[domain]
    order = drawn(text, 1, arguments.seed)
    with restricted_head(model, text.vocabulary) as labels, ExitStack() as hooked:
        for path, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda _, inputs, path=path: add(path, inputs[0]))
            hooked.enter_context(hook)
        for number in trange(arguments.windows, desc=domain, unit="window"):
            ids = next(order).to(labels.device)
            model(input_ids=ids, labels=labels[ids], use_cache=False).loss.backward()
            for path, weight in weights.items():
                half = halves[number % 2]
                half[path] = half[path] + weight.grad if path in half else weight.grad.clone()
            model.zero_grad()
    return halves, means


def _shares(layer: CloverLayer, one: Tensor, other: Tensor, mean: Tensor, rank: int) -> Iterator[tuple[str, float]]:
    """Label, and the share of the gradient in a subspace."""
    one, other = one.double(), other.double()
    whole = float((one * other).sum())

    def share(part: Tensor) -> float:
        return float((part * other).sum()) / whole

    u, s, v = torch.linalg.svd(one, full_matrices=False)
    for count in (1, 8):
        yield f"its {count} largest singular directions", share((u[:, :count] * s[:count]) @ v[:count])
    direction = mean / mean.norm()
    yield "along the mean input", share(torch.outer(one @ direction, direction))
    yield f"LoRA r={rank}, turned to it", share((u[:, :rank] * s[:rank]) @ v[:rank])
    yield f"LoRA r={rank}, at the start", rank / one.shape[1]  # the expectation over random A; B is zero
    yield "CLOVER", share(_in_row_spaces(layer, one))


def _in_row_spaces(layer: CloverLayer, gradient: Tensor) -> Tensor:
    """Each block's part of the gradient that the block's rows of the weight span."""
    weight = layer.base_weight.transposed().detach().double()
    part = torch.zeros(gradient.T.shape, dtype=torch.float64, device=gradient.device)
    for spec in layer.specs["default"]:
        rows = spec.heads.blocks(weight, spec.size).permute(1, 2, 0)  # (blocks, size, in_features)
        basis = torch.linalg.qr(rows.mT).Q
        found = spec.heads.blocks(gradient.T, spec.size).permute(1, 2, 0) @ basis @ basis.mT
        spec.heads.blocks(part, spec.size).copy_(found.permute(2, 0, 1))
    return part.T


if __name__ == "__main__":
    main()
