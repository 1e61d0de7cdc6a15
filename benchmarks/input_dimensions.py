"""How many dimensions of the data the trained numbers of LoRA, CLOVER and HiRA see at the start of training.

    python benchmarks/input_dimensions.py

A trained number multiplies a coordinate of a projection's input x: of `A x` in LoRA, of `C W x` in CLOVER, of
`(w * a) x` in HiRA, with w a row of W and a row of A. With K the second moment of these coordinates on training text,
`tr(K)^2 / tr(K^2)` (the participation ratio) counts the dimensions that share their size: 1 if one direction has it
all, such as the mean that all tokens have in common. A step of AdamW moves every number by about the learning rate, so
with few dimensions most of it goes into directions that all texts have in common. Figures: the median over
projections, by kind of target; random rows of A are averaged over.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import finish, options, parser, table
from peft import get_peft_model
from torch import Tensor, nn

from clover_peft import CloverConfig, initialize_from_activations
from clover_peft.experiments.adaptation.plan import read_experiment
from clover_peft.experiments.adaptation.trial import Laboratory, drawn
from clover_peft.io import run_record as records
from clover_peft.tuner.layer import CloverLayer
from clover_peft.tuner.layers import clover_layers


def main(argv: Sequence[str] | None = None) -> Path:
    command = parser(__doc__.splitlines()[0], "input_dimensions")
    add_adapter(command)
    arguments = command.parse_args(argv)
    environment = records.environment()
    laboratory, model = adapted(arguments)
    layers = dict(clover_layers(model))
    name, *_ = laboratory.windows
    order = drawn(laboratory.windows[name], 1, arguments.seed)
    batches = [{"input_ids": next(order).to(arguments.device)} for _ in range(arguments.windows)]
    moments = _input_moments(model, batches)
    found = {label: dict[str, list[float]]() for label in ("LoRA", "CLOVER", "CLOVER from activations", "HiRA")}
    for path, moment in moments.items():
        kind, layer = path.rpartition(".")[2], layers[path]
        weight = layer.base_weight.transposed().detach().double().T
        found["LoRA"].setdefault(kind, []).append(float(_dimensions(moment)))
        found["HiRA"].setdefault(kind, []).append(float(_of_rows(weight, moment).mean()))
    for label in ("CLOVER", "CLOVER from activations"):
        if label != "CLOVER":
            initialize_from_activations(model, batches)
        for path, moment in moments.items():
            found[label].setdefault(path.rpartition(".")[2], []).append(_of_blocks(layers[path], moment))
    figures = {label: {k: statistics.median(v) for k, v in kinds.items()} for label, kinds in found.items()}
    kinds = list(figures["LoRA"])
    print(
        table(
            [f"dimensions on {name}", *kinds],
            [[label, *(f"{f[k]:.1f}" for k in kinds)] for label, f in figures.items()],
        )
    )
    return finish(
        arguments.out,
        {
            "benchmark": "input_dimensions",
            "options": options(arguments),
            "environment": environment,
            "model": laboratory.facts["model"],
            "domain": name,
            "figures": figures,
            "by_projection": found,
        },
    )


def add_adapter(command: argparse.ArgumentParser) -> None:
    """Options for the windows of a domain and for CLOVER's adapter; see `adapted`."""
    command.add_argument("--windows", type=int, default=24, help="windows of a domain")
    command.add_argument("--targets", nargs="+", default=["v_proj", "up_proj", "down_proj"])
    command.add_argument("--block-size", type=int, default=48, help="features of a block of up and down")


def adapted(arguments: argparse.Namespace) -> tuple[Laboratory, Any]:
    """The search's model and domains, and the model in float32 with a new adapter."""
    laboratory = Laboratory(read_experiment("adaptation_tiny" if arguments.fast else "adaptation_search"), Path())
    config = CloverConfig(target_modules=arguments.targets, mlp_block_size=arguments.block_size)
    return laboratory, get_peft_model(laboratory.load(torch.float32).to(arguments.device), config).eval()


@torch.no_grad()
def _input_moments(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Path of a target -> (in_features, in_features) float64, the sum of `x x^T` over its inputs."""
    moments: dict[str, Tensor] = {}

    def add(path: str, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0].flatten(0, -2).float()
        moments[path] = moments.get(path, 0) + (rows.T @ rows).double()

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, path=path: add(path, inputs))
        for path, layer in clover_layers(model)
    ]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return moments


def _dimensions(moment: Tensor) -> Tensor:
    """`tr(K)^2 / tr(K^2)` of (..., n, n)."""
    return moment.diagonal(dim1=-2, dim2=-1).sum(-1) ** 2 / moment.square().sum((-2, -1))


def _of_rows(weight: Tensor, moment: Tensor) -> Tensor:
    """That of `diag(w) M diag(w)` for every row w of the weight, (out_features,)."""
    squares = weight.square()
    return (squares @ moment.diagonal()) ** 2 / ((squares @ moment.square()) * squares).sum(-1)


def _of_blocks(layer: CloverLayer, moment: Tensor) -> float:
    """The mean over blocks of that of `C W M W^T C^T`."""
    found = []
    weight = layer.base_weight.transposed().detach()  # (in_features, out_features)
    for spec in layer.specs["default"]:
        coordinates = layer.tensors("default", spec).c
        assert coordinates is not None  # the bases are not folded
        rows = coordinates.double() @ spec.heads.blocks(weight, spec.size).permute(1, 2, 0).double()
        found.append(_dimensions(rows @ moment @ rows.mT))
    return float(torch.cat(found).mean())


if __name__ == "__main__":
    main()
