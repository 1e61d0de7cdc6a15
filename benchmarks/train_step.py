"""Time and saved activations of one training step on Llama-shaped layers, every method at matched parameters.

    python benchmarks/train_step.py

A step is forward, backward and AdamW. The layers' input requires a gradient, as it does below layers that others
train, so the frozen base has a backward pass too. The budget is CLOVER's on its default targets (key, value, up); the
rank (or OFT's block size) of the others on q, k, v, up, down is solved for. CLOVER diagonal has no such knob and
stays small. All models live in one process; in every round each takes one step, in shuffled order, and ratios are
taken within the round.

Saved activations are the distinct storages that autograd keeps for the backward pass, parameters and buffers excluded.
On CUDA the peak of a step's memory is measured too, with what the adapter and its optimiser's state take all the time.
Weights narrower than float32 run under autocast, as TRL trains.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import (
    PAPER_LORA_TARGETS,
    add_compile,
    add_shape,
    at_most,
    clock,
    compile_decoders,
    fill_out,
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
    told,
    trainable,
)
from peft import HiraConfig, LoraConfig, OFTConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from tqdm import tqdm

from clover_peft import CloverConfig
from clover_peft.io import run_record as records

TARGETS = {  # CLOVER is to be at most this
    "step_v_base": 1.05,
    "step_v_lora": 1.0,
    "saved_over_base_v_lora": 0.5,
    "peak_over_base_v_lora": 1.0,
    "peak_over_base_v_dora": 0.6,
    "peak_over_base_v_hira": 0.6,
}
METHODS = ["clover diagonal", "dora", "pissa", "hira", "oft", "lora on k v up"]


@dataclass
class Contender:
    """One model in the race, with its figures."""

    model: nn.Module
    setting: str
    parameters: int = 0
    saved_bytes: int = 0
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        self.parameters = trainable(self.model)
        if self.parameters:
            self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = _arguments(argv)
    environment = records.environment()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    base = llama(
        arguments.hidden_size,
        arguments.num_heads,
        arguments.mlp_size,
        arguments.layers,
        arguments.seed,
        dtype,
        device,
        key_value_heads=arguments.key_value_heads,
    ).requires_grad_(False)
    base.lm_head = nn.Identity()
    contenders = _contenders(base, arguments.methods)
    x = torch.randn(arguments.batch_size, arguments.tokens, arguments.hidden_size, device=device).to(dtype)
    x.requires_grad_(True)
    if arguments.gradient_checkpointing:
        for contender in contenders.values():
            model: Any = contender.model.train()
            model.gradient_checkpointing_enable()
    if arguments.compile:
        compile_decoders(contender.model for contender in contenders.values())
    cotangent = torch.randn_like(x)

    for contender in tqdm(contenders.values(), desc="warm-up", unit="method"):
        randomise(contender.model, arguments.seed)  # what CLOVER's step takes depends on how far it is from its start
        contender.saved_bytes = saved_bytes(contender.model, partial(decode, contender.model, x, dtype))
        for _ in range(2):
            step(contender, x, cotangent, dtype)
        if device.startswith("cuda"):
            contender.peak_bytes = _peak_bytes(contender, partial(step, contender, x, cotangent, dtype), device)
    order = list(contenders.values())
    shuffle = random.Random(arguments.seed).shuffle
    for _ in tqdm(range(arguments.rounds), desc="rounds", unit="round"):
        shuffle(order)
        for contender in order:
            contender.seconds.append(clock(partial(step, contender, x, cotangent, dtype), device))

    figures = _figures(contenders)
    print(_report(figures))
    return finish(
        arguments.out,
        {
            "benchmark": "train_step",
            "options": options(arguments),
            "environment": environment,
            "figures": figures,
            "seconds": {name: contender.seconds for name, contender in contenders.items()},
            "targets": at_most(TARGETS, figures["clover"]),
        },
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    command = parser(__doc__.splitlines()[0] if __doc__ else "", "train_step")
    add_shape(command, 1, 1)
    command.add_argument("--batch-size", type=int, default=1)
    command.add_argument("--tokens", type=int, help="tokens a sequence; default 512, on cuda 4096")
    command.add_argument("--rounds", type=int, default=15, help="timed steps a method")
    command.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS, help="beside CLOVER and LoRA")
    command.add_argument("--gradient-checkpointing", action="store_true", help="in all models, layer by layer")
    add_compile(command)
    arguments = command.parse_args(argv)
    fill_out(arguments, "train_step")
    fill_shape(arguments)
    if arguments.fast:
        arguments.tokens, arguments.rounds = 8, 2
    arguments.tokens = arguments.tokens or (4096 if arguments.device.startswith("cuda") else 512)
    return arguments


def _contenders(base: nn.Module, methods: Sequence[str]) -> dict[str, Contender]:
    """The frozen base and one copy of it for CLOVER, LoRA and each of `methods`, at CLOVER's trainable parameters."""
    contenders = {"frozen base": Contender(copy.deepcopy(base), "")}

    def add(name: str, setting: str, config: PeftConfig) -> None:
        if name in ("clover", "lora", *methods):
            contenders[name] = Contender(get_peft_model(copy.deepcopy(base), config), setting)

    add("clover", "full, k v up", CloverConfig())
    budget = contenders["clover"].parameters
    add("clover diagonal", "k v up", CloverConfig(s_matrix="diagonal"))
    targets = list(PAPER_LORA_TARGETS)
    rank = rank_for(budget, base, targets)
    lora: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": targets}
    add("lora", f"r {rank}", LoraConfig(**lora))
    add("dora", f"r {rank}", LoraConfig(**lora, use_dora=True))
    # The step does not depend on how exact PiSSA's start is; niter 4 is its fast one.
    add("pissa", f"r {rank}", LoraConfig(**{**lora, "init_lora_weights": "pissa_niter_4"}))
    add("hira", f"r {rank}", HiraConfig(r=rank, target_modules=targets))
    block = _oft_block_size(budget, base, targets)
    add("oft", f"block {block}", OFTConfig(oft_block_size=block, target_modules=targets))
    own = ["k_proj", "v_proj", "up_proj"]
    own_rank = rank_for(budget, base, own)
    add("lora on k v up", f"r {own_rank}", LoraConfig(r=own_rank, lora_alpha=own_rank, target_modules=own))
    return contenders


def _oft_block_size(budget: int, model: nn.Module, targets: Sequence[str]) -> int:
    """Block size b that divides every target's in features and brings sum in (b - 1) / 2 closest to the budget."""
    widths = [m.in_features for name, m in model.named_modules() if name.rpartition(".")[2] in targets]
    sizes = [b for b in range(2, min(widths) + 1) if all(width % b == 0 for width in widths)]
    return min(sizes, key=lambda b: abs(sum(widths) * (b - 1) / 2 - budget))


def decode(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Run the whole model, for which CLOVER folds all maps together; `x` is (batch, tokens, hidden size)."""
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits: torch.Tensor = model(inputs_embeds=x, use_cache=False).logits
        return logits


def step(contender: Contender, x: torch.Tensor, cotangent: torch.Tensor, dtype: torch.dtype) -> None:
    """One training step: forward, backward and optimiser."""
    x.grad = None
    decode(contender.model, x, dtype).backward(cotangent)
    if contender.optimizer is not None:
        contender.optimizer.step()
        contender.optimizer.zero_grad(set_to_none=True)


def saved_bytes(model: nn.Module, forward: Callable[[], torch.Tensor], output_is_kept: bool = False) -> int:
    """Bytes of the distinct storages saved for the backward of `forward`, without the model's own tensors, and without
    its output where that is kept in any case."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # alive until the end, so that no address is used twice
    if output_is_kept:
        saved.pop(output.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def _peak_bytes(contender: Contender, work: Callable[[], None], device: str) -> int:
    """Bytes that a step takes at its peak, with those that an adapter and the optimiser's state take all the time."""
    state = contender.optimizer.state.values() if contender.optimizer is not None else ()
    own = [tensor for values in state for tensor in values.values() if isinstance(tensor, torch.Tensor)]
    if isinstance(contender.model, PeftModel):
        named = [*contender.model.named_parameters(), *contender.model.named_buffers()]
        own += [t for name, t in named if str(contender.model.base_model.prefix) in name]
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before + sum(tensor.nbytes for tensor in own)


def _figures(contenders: dict[str, Contender]) -> dict[str, dict[str, Any]]:
    base, lora = contenders["frozen base"], contenders["lora"]
    peaks = {name: contender.peak_bytes for name, contender in contenders.items()}
    return {
        name: {
            "setting": c.setting,
            "trainable_parameters": c.parameters,
            "median_seconds": statistics.median(c.seconds),
            **measured("step_v_base", ratios(c.seconds, base.seconds)),
            **measured("step_v_lora", ratios(c.seconds, lora.seconds)),
            "saved_bytes": c.saved_bytes,
            "saved_over_base_bytes": c.saved_bytes - base.saved_bytes,
            "saved_over_base_v_lora": over(c.saved_bytes, base.saved_bytes, lora.saved_bytes),
            **{
                f"peak_over_base_v_{other}": over(c.peak_bytes, base.peak_bytes, peaks.get(other))
                for other in ("lora", "dora", "hira")
            },
        }
        for name, c in contenders.items()
    }


def over(value: int | None, base: int | None, other: int | None) -> float | None:
    """What is beyond the base, against what another method is beyond it; None where that is nothing or unknown."""
    return None if value is None or base is None or other in (None, base) else (value - base) / (other - base)


def _report(figures: dict[str, dict[str, Any]]) -> str:
    header = [
        "method",
        "setting",
        "trainable",
        "step s",
        "v base",
        "v LoRA",
        "saved MiB",
        "over base",
        "v LoRA",
        "peak v LoRA",
    ]
    rows = [
        (
            name,
            f["setting"],
            f"{f['trainable_parameters']:,}",
            f["median_seconds"],
            told(f, "step_v_base"),
            told(f, "step_v_lora"),
            f["saved_bytes"] / 2**20,
            f["saved_over_base_bytes"] / 2**20,
            "-" if f["saved_over_base_v_lora"] is None else f["saved_over_base_v_lora"],
            "-" if f["peak_over_base_v_lora"] is None else f["peak_over_base_v_lora"],
        )
        for name, f in figures.items()
    ]
    return table(header, rows)


if __name__ == "__main__":
    main()
