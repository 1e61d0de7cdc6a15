"""The forms in which a map of heads can be applied: what the choice in `clover_peft/tuner/execution.py` rests on.

    python benchmarks/forms.py

For the key, value and up projection of one Llama-shaped layer, with full S at the defaults and with a quarter of a
block's directions, on the projections' outputs alone (the projections themselves are not timed). Training: forward and
backward from z and S, folding included, and the bytes that are kept for the backward pass. A few tokens: without
autograd, from maps that were folded before, folded for the pass, and unfolded (E, S and C one after the other). All
forms of one table take turns in every round, in shuffled order; ratios to the first are taken within the round.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import (
    add_shape,
    clock,
    decoder_of,
    fill_shape,
    finish,
    llama,
    measured,
    options,
    parser,
    randomise,
    ratios,
    table,
    told,
)
from peft import get_peft_model
from torch import Tensor
from tqdm import tqdm
from train_step import saved_bytes

from clover_peft import CloverConfig, CloverLayer
from clover_peft.io import run_record as records
from clover_peft.tuner.fused_maps import apply_maps
from clover_peft.tuner.maps import formula

Form = Callable[[CloverLayer, Tensor], Tensor]
ACTIVE = ["default"]


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = _arguments(argv)
    environment = records.environment()
    training, few = {}, {}
    for setting, config in {"full": CloverConfig(), "a quarter": CloverConfig(r=arguments.quarter)}.items():
        for part, layer in _layers(config, arguments).items():
            name = f"{part}, {setting}"
            training[name] = _training(layer, arguments)
            few[name] = {f"{tokens} tokens": _few(layer, tokens, arguments) for tokens in arguments.few_tokens}
    for name, found in training.items():
        print(f"\n{name}: forward and backward of {arguments.tokens} tokens\n{_report(found)}")
        for tokens, rows in few[name].items():
            print(f"\n{name}: {tokens} without autograd\n{_report(rows)}")
    record = {"benchmark": "forms", "options": options(arguments), "environment": environment}
    return finish(arguments.out, {**record, "training": training, "few_tokens": few})


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    command = parser(__doc__.splitlines()[0] if __doc__ else "", "forms")
    add_shape(command, 1, 1)
    command.add_argument("--tokens", type=int, help="of a training pass; default 512, on cuda 4096")
    command.add_argument("--few-tokens", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    command.add_argument("--rounds", type=int, default=25)
    arguments = command.parse_args(argv)
    fill_shape(arguments)
    if arguments.fast:
        arguments.tokens, arguments.few_tokens, arguments.rounds = 8, [1, 2], 2
    arguments.tokens = arguments.tokens or (4096 if arguments.device.startswith("cuda") else 512)
    arguments.quarter = arguments.hidden_size // arguments.num_heads // 4
    return arguments


def _layers(config: CloverConfig, arguments: argparse.Namespace) -> dict[str, CloverLayer]:
    base = llama(
        arguments.hidden_size,
        arguments.num_heads,
        arguments.mlp_size,
        1,
        arguments.seed,
        getattr(torch, arguments.dtype),
        arguments.device,
        key_value_heads=arguments.key_value_heads,
    )
    model = get_peft_model(base.requires_grad_(False), config)
    randomise(model, arguments.seed)
    block = decoder_of(model).layers[0]
    return {"key": block.self_attn.k_proj, "value": block.self_attn.v_proj, "up": block.mlp.up_proj}


def _features(layer: CloverLayer, tokens: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(1, tokens, layer.out_features, device=layer.weight.device).to(layer.weight.dtype)


def _literal(layer: CloverLayer, z: Tensor) -> Tensor:
    """`(I + M) z`, the textbook's form of the product: one operation, whose rounding is that of all of y."""
    (m,) = layer.maps(ACTIVE)
    matrix = m.matrix if m.c is None else m.matrix @ m.c
    matrix = matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.bmm(m.place.tokens(z), matrix.to(z.dtype).mT).transpose(0, 1).reshape(z.shape)


def _training(layer: CloverLayer, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    forms: dict[str, Form] = {
        "as it is": lambda layer, z: apply_maps(z, layer.maps(ACTIVE), layer.output_is_kept(ACTIVE)),
        "keeps z": lambda layer, z: apply_maps(z, layer.maps(ACTIVE)),
        "plain operations": lambda layer, z: formula(z, layer.maps(ACTIVE)),
        "unfolded": lambda layer, z: formula(z, layer.staged_maps(ACTIVE)),
        "(I + M) z": _literal,
    }
    z = _features(layer, arguments.tokens).requires_grad_(True)
    cotangent = torch.randn_like(z)
    found = _race({name: partial(_pass, form, layer, z, cotangent) for name, form in forms.items()}, arguments)
    for name, form in forms.items():  # of values and up projections y is kept by what follows in any case
        found[name]["kept_bytes"] = saved_bytes(layer, partial(form, layer, z), layer.output_is_kept(ACTIVE))
    return found


def _pass(form: Form, layer: CloverLayer, z: Tensor, cotangent: Tensor) -> None:
    form(layer, z).backward(cotangent)
    z.grad = None
    layer.zero_grad(set_to_none=True)


@torch.no_grad()
def _few(layer: CloverLayer, tokens: int, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    z = _features(layer, tokens)
    kept = [m.to(z.dtype) for m in layer.maps(ACTIVE)]
    wide = torch.promote_types(z.dtype, torch.float32)
    forms = {
        "folded before": lambda: apply_maps(z, kept),
        "folded": lambda: apply_maps(z, layer.maps(ACTIVE)),
        "unfolded": lambda: apply_maps(z.to(wide), layer.staged_maps(ACTIVE)).to(z.dtype),
    }
    return _race(forms, arguments)


def _race(works: dict[str, Callable[[], Any]], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in works}
    order = list(works)
    shuffle = random.Random(arguments.seed).shuffle
    for number in tqdm(range(arguments.rounds + 2), desc="rounds", unit="round", leave=False):
        shuffle(order)
        for name in order:
            taken = clock(works[name], arguments.device)
            if number >= 2:  # the first are a warm-up
                seconds[name].append(taken)
    first = next(iter(seconds.values()))
    return {
        name: {
            "median_seconds": statistics.median(taken),
            **measured("v_first", ratios(taken, first)),
            "seconds": taken,
        }
        for name, taken in seconds.items()
    }


def _report(found: dict[str, dict[str, Any]]) -> str:
    kept = "kept_bytes" in next(iter(found.values()))
    rows = [
        (name, 1e3 * f["median_seconds"], told(f, "v_first"), *([f["kept_bytes"] / 2**20] if kept else []))
        for name, f in found.items()
    ]
    return table(["form", "ms", "v the first", *(["kept MiB"] if kept else [])], rows)


if __name__ == "__main__":
    main()
