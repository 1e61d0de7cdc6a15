"""Saving and loading an adapter: bytes of its file, and seconds against plainly reading and writing as many bytes.

    python benchmarks/adapter_io.py

CLOVER at its defaults (key, value, up) with each form of file that `save_bases` has, and LoRA on q, k, v, up, down
with as many trainable parameters, on Llama-shaped layers that are in memory already. Timed are `save_pretrained`, and
`PeftModel.from_pretrained` onto the bare base (the adapter is taken off again afterwards), by default and with
`low_cpu_mem_usage=True`. In the same round the weight file is plainly read (`safetensors.torch.load_file`, and every
tensor cloned, so that each page is read) and its tensors plainly written; ratios are to these. Files are in the
system's page cache: no disk is measured. What was loaded is compared with what was saved, by the outputs of both.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import (
    PAPER_LORA_TARGETS,
    add_shape,
    at_most,
    clock,
    decoder_of,
    fill_shape,
    finish,
    llama,
    measured,
    options,
    parser,
    randomise,
    rank_for,
    ratios,
    table,
    trainable,
)
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from clover_peft import CloverConfig
from clover_peft.io import run_record as records

BASES: dict[str, Any] = {"clover": True, "clover folded": "folded", "clover without bases": False}
WAYS = {"load": False, "load_low_cpu": True}  # low_cpu_mem_usage
TARGETS = {"load_v_read": 1.2, "load_low_cpu_v_read": 1.2}  # CLOVER with its bases is to take at most this


@dataclass
class Contender:
    """A model with an adapter, the folder it is saved in, and seconds by what was done."""

    model: PeftModel
    folder: Path
    bases: Any = None  # save_bases
    seconds: dict[str, list[float]] = field(default_factory=dict)
    difference: dict[str, float] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.folder / "adapter_model.safetensors"

    def save(self) -> None:
        if self.bases is not None:
            self.model.peft_config["default"].save_bases = self.bases
        self.model.save_pretrained(str(self.folder))


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = _arguments(argv)
    environment = records.environment()
    base = llama(
        arguments.hidden_size,
        arguments.num_heads,
        arguments.mlp_size,
        arguments.layers,
        arguments.seed,
        getattr(torch, arguments.dtype),
        arguments.device,
        key_value_heads=arguments.key_value_heads,
    )
    base.requires_grad_(False).eval()
    with tempfile.TemporaryDirectory() as folder:
        contenders = _contenders(base, Path(folder), arguments.seed)
        order = list(contenders.values())
        shuffle = random.Random(arguments.seed).shuffle
        for number in tqdm(range(arguments.rounds + 1), desc="rounds", unit="round"):
            shuffle(order)
            for contender in order:
                seconds = _once(contender, base, arguments.device)
                if number:  # the first is a warm-up
                    for what, value in seconds.items():
                        contender.seconds.setdefault(what, []).append(value)
        for contender in order:
            contender.difference = {
                way: _difference(contender, base, arguments.device, low) for way, low in WAYS.items()
            }
        figures = {name: _figures(contender) for name, contender in contenders.items()}
    print(_report(figures))
    return finish(
        arguments.out,
        {
            "benchmark": "adapter_io",
            "options": options(arguments),
            "environment": environment,
            "figures": figures,
            "seconds": {name: contender.seconds for name, contender in contenders.items()},
            "targets": at_most(TARGETS, figures["clover"]),
        },
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    command = parser(__doc__.splitlines()[0] if __doc__ else "", "adapter_io")
    add_shape(command, 8, 8)
    command.add_argument("--rounds", type=int, default=9)
    arguments = command.parse_args(argv)
    fill_shape(arguments)
    if arguments.fast:
        arguments.layers, arguments.rounds = 2, 2
    return arguments


def _contenders(base: nn.Module, folder: Path, seed: int) -> dict[str, Contender]:
    """Models with one adapter each around the same weights, which neither method changes, saved once."""

    def wrapped(config: PeftConfig) -> PeftModel:
        around = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
        model = get_peft_model(around, config)
        randomise(model, seed)
        return model.eval()

    clover = wrapped(CloverConfig())
    contenders = {name: Contender(clover, folder / name, bases) for name, bases in BASES.items()}
    rank = rank_for(trainable(clover), base, PAPER_LORA_TARGETS)
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(PAPER_LORA_TARGETS))
    contenders["lora"] = Contender(wrapped(lora), folder / "lora")
    for contender in contenders.values():
        contender.save()
    return contenders


def _once(contender: Contender, base: nn.Module, device: str) -> dict[str, float]:
    """Seconds of everything that is done with one adapter, each after the other."""
    tensors: dict[str, torch.Tensor] = {}

    def read() -> None:
        tensors.update({name: tensor.clone() for name, tensor in load_file(contender.file, device=device).items()})

    seconds = {"read": clock(read, device)}
    seconds["write"] = clock(partial(save_file, tensors, contender.folder / "plain.safetensors"), device)
    seconds["save"] = clock(contender.save, device)
    tensors.clear()
    loaded: list[PeftModel] = []
    for way, low in WAYS.items():

        def load(low: bool = low) -> None:
            loaded.append(_load(contender, base, device, low))

        seconds[way] = clock(load, device)
        loaded.pop().unload()
    return seconds


def _load(contender: Contender, base: nn.Module, device: str, low_cpu_mem_usage: bool) -> PeftModel:
    folder = contender.folder
    return PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage, torch_device=device)


@torch.no_grad()
def _difference(contender: Contender, base: nn.Module, device: str, low_cpu_mem_usage: bool) -> float:
    """How far the outputs of the loaded adapter are from those of the saved one, relative to what the adapter does."""
    torch.manual_seed(0)
    x = torch.randn(1, 4, decoder_of(base).config.hidden_size).to(next(base.parameters()))

    def output(model: nn.Module) -> torch.Tensor:
        return decoder_of(model)(inputs_embeds=x, use_cache=False).last_hidden_state.double()

    bare, saved = output(base), output(contender.model)
    loaded = _load(contender, base, device, low_cpu_mem_usage).eval()
    found = output(loaded)
    loaded.unload()
    return float((found - saved).norm() / (saved - bare).norm())


def _figures(contender: Contender) -> dict[str, Any]:
    seconds = contender.seconds
    return {
        "bytes": contender.file.stat().st_size,
        **{f"{what}_seconds": statistics.median(values) for what, values in seconds.items()},
        **measured("save_v_write", ratios(seconds["save"], seconds["write"])),
        **{
            key: value
            for way in WAYS
            for key, value in measured(f"{way}_v_read", ratios(seconds[way], seconds["read"])).items()
        },
        "difference": contender.difference,
    }


def _report(figures: dict[str, dict[str, Any]]) -> str:
    header = ["file", "MiB", "read ms", "save ms", "v write", "load ms", "v read", "low_cpu ms", "v read"]
    return table(
        header,
        [
            (
                name,
                f["bytes"] / 2**20,
                1e3 * f["read_seconds"],
                1e3 * f["save_seconds"],
                f["save_v_write"],
                1e3 * f["load_seconds"],
                f["load_v_read"],
                1e3 * f["load_low_cpu_seconds"],
                f["load_low_cpu_v_read"],
            )
            for name, f in figures.items()
        ],
    )


if __name__ == "__main__":
    main()
