#!/usr/bin/env python
"""Kernels that a Llama layer dispatches in a training step beyond the frozen base: they decide small batches on GPUs.

    python benchmarks/kernel_count.py

A kernel is an operation of torch that is no view, forward and backward together; the optimizer's step is not counted.
The count is the same on any machine. The maps are near their start (`STD`). For larger ones, the inverses that a model
computes once take up to five products more, each of two kernels, for values and for the up-projection.

A layer's share is the difference between models of four and of two layers; the rest of the step's count is `once` a
model. The layers' input requires a gradient, as it does below layers that others train. `waits` are calls of
`Tensor.tolist` and `Tensor.item`, for which the host waits for an accelerator.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import PAPER_LORA_TARGETS, finish, llama, options, parser, randomise, table
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from clover_peft import CloverConfig
from clover_peft.io import run_record as records

CLOVER_TARGETS = ("k_proj", "v_proj", "up_proj")
LAYERS = (2, 4)
# Of the trained numbers: so near the start that the inverse of every map takes one product more than the least.
STD = 3e-6
WAITS = {Tensor.tolist, Tensor.item}
WAIT = "wait"  # the name that waits are counted under, beside those of operations
# These return memory or existing tensors, and launch nothing.
FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"} | {
    "aten::_unsafe_view",
    "aten::_reshape_alias",
    "aten::lift_fresh",
}


class Kernels(TorchDispatchMode):
    """Counts the operations below autograd, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Waits(TorchFunctionMode):
    """Counts the reads of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in WAITS
        return func(*args, **(kwargs or {}))


def main(argv: Sequence[str] | None = None) -> Path:
    command = parser(__doc__.splitlines()[0], "kernel_count")
    command.add_argument("--names", action="store_true", help="also print the operations of every method")
    arguments = command.parse_args(argv)
    methods: dict[str, PeftConfig | None] = {
        "base": None,
        "clover": CloverConfig(),
        "clover low rank": CloverConfig(low_rank=4),
        "lora, same modules": LoraConfig(r=8, target_modules=list(CLOVER_TARGETS)),
        "lora": LoraConfig(r=8, target_modules=list(PAPER_LORA_TARGETS)),
        "dora": LoraConfig(r=8, use_dora=True, target_modules=list(PAPER_LORA_TARGETS)),
    }
    environment = records.environment()
    pairs = {name: _counts(config, arguments) for name, config in methods.items()}
    counts, once = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    figures = {
        name: {
            "kernels": counts[name].total() - counts[name][WAIT],
            "beyond_base": counts[name].total() - counts[name][WAIT] - counts["base"].total(),
            "waits": counts[name][WAIT],
            "once_beyond_base": once[name].total() - once[name][WAIT] - once["base"].total(),
            "waits_once": once[name][WAIT],
            "operations": {op: count for op, count in sorted(counts[name].items()) if op != WAIT},
        }
        for name in methods
    }
    rows = [
        (name, f["kernels"], f["beyond_base"], f["waits"], f["once_beyond_base"], f["waits_once"])
        for name, f in figures.items()
    ]
    print(table(["method", "kernels a layer", "beyond the base", "waits", "once a model", "waits"], rows))
    if arguments.names:
        for name, found in counts.items():
            extra = {op: n - counts["base"][op] for op, n in found.items() if n != counts["base"][op]}
            print(f"{name}: {', '.join(f'{op} {n:+d}' for op, n in sorted(extra.items(), key=lambda x: -x[1]))}")
    return finish(
        arguments.out,
        {
            "benchmark": "kernel_count",
            "options": options(arguments),
            "layers": LAYERS,
            "environment": environment,
            "figures": figures,
        },
    )


def _counts(config: PeftConfig | None, arguments: Any) -> tuple[collections.Counter[str], collections.Counter[str]]:
    """What a layer dispatches, and what a model does beside its layers."""
    few, many = (_step(config, layers, arguments) for layers in LAYERS)
    difference = {name: many[name] - few[name] for name in many | few}
    apart = LAYERS[1] - LAYERS[0]
    if odd := [name for name, count in difference.items() if count % apart]:
        raise RuntimeError(f"expected every layer to dispatch the same operations, found {odd} in some alone")
    layer = collections.Counter({name: count // apart for name, count in difference.items() if count})
    return layer, collections.Counter({name: many[name] - LAYERS[1] * layer[name] for name in many})


def _step(config: PeftConfig | None, layers: int, arguments: Any) -> collections.Counter[str]:
    torch.manual_seed(arguments.seed)
    model: Any = llama(64, 4, 128, layers, arguments.seed, torch.float32, arguments.device).requires_grad_(False)
    model.lm_head = nn.Identity()
    if config is not None:
        model = get_peft_model(model, config)
        randomise(model, arguments.seed, std=STD)
    x = torch.randn(2, 24, 64, device=arguments.device, requires_grad=True)

    def step() -> Tensor:
        model.train().zero_grad()
        loss: Tensor = model(inputs_embeds=x, use_cache=False).logits.square().mean()
        loss.backward()
        return loss

    step()  # what happens in the first pass alone is not counted
    with Waits() as waits, Kernels() as kernels:
        step()
    return kernels.counts + collections.Counter({WAIT: waits.count})


if __name__ == "__main__":
    main()
