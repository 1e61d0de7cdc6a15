"""What an adapter costs in inference: one-token steps with a filled key-value cache, and switching between adapters.

    python benchmarks/decode.py

Llama-shaped layers with random weights and adapters that are no longer at their start, in evaluation mode and without
autograd. CLOVER at its defaults (key, value, up), the same as it is in training (as rollouts run it), the same
merged, and CLOVER with a quarter of a head's directions; LoRA and DoRA on q, k, v, up, down, unmerged, at the rank
with as many trainable parameters as CLOVER full. These two are in the precision of the base (peft's default float32
would cost them casts), DoRA also with what peft can cache of it. All live in one process; in every round each takes
`--tokens` steps, in shuffled order, from a cache of `--context` tokens that is cut back afterwards, so that all see
the same lengths. Ratios are taken within the round. The merged model runs the base model's code: how far its ratio is
from 1 is the error of the others.

Switching: a model with two adapters of one kind. Each round times a usual step, `set_adapter` to the adapter that is
not active, the first step with it and another usual one; the cost is that of `set_adapter` and the first step beyond
the mean of the usual ones, divided by the layers. It is taken twice: of an adapter that is new (its parameters were
written to), which the target is for, and of one that was active before.
"""

from __future__ import annotations

import copy
import random
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
    decoder_of,
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
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.helpers import DoraCaching
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache

from clover_peft import CloverConfig
from clover_peft.io import run_record as records

AGAINST_BASE = {"clover": 1.03, "clover low rank": 1.03, "clover merged": 1.0}  # in the worst of the batch sizes
TARGETS = {**AGAINST_BASE, "switching_ms_a_layer": 1.0}  # at most this


@dataclass
class Contender:
    """One model in the race; `around` is entered for its steps. Seconds a step are by batch size."""

    model: nn.Module
    setting: str
    parameters: int
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    seconds: dict[int, list[float]] = field(default_factory=dict)


@torch.no_grad()
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
    contenders = _contenders(base, arguments.seed)
    effects = _effects(contenders, base)
    if arguments.compile:
        compile_decoders(contender.model for contender in contenders.values())
    for batch in arguments.batch_sizes:
        _race(contenders, base, batch, arguments)
    figures = {f"batch {batch}": _figures(contenders, batch) for batch in arguments.batch_sizes}
    switching = {name: _switching(base, config, arguments) for name, config in _configs(base).items()}

    for name, rows in figures.items():
        print(f"\n{name}, context {arguments.context}\n{_report(rows)}")
    header = ["switching, ms a layer", "set_adapter", "first step beyond a usual one", "both"]
    parts = ("set_adapter_ms_a_layer", "first_step_ms_a_layer", "ms_a_layer")
    switches = [
        (f"{name}, to a {kind} adapter", *(told(found, part) for part in parts))
        for name, kinds in switching.items()
        for kind, found in kinds.items()
    ]
    print(f"\n{table(header, switches)}")
    reached: dict[str, Any] = {}
    for name in AGAINST_BASE:
        worst = max((rows[name] for rows in figures.values()), key=lambda found: found["v_base"])
        reached.update({name: worst["v_base"], f"{name}_interval": worst["v_base_interval"]})
    switched = switching["clover"]["new"]
    reached.update({f"switching_{key}": value for key, value in switched.items() if key.startswith("ms_a_layer")})
    return finish(
        arguments.out,
        {
            "benchmark": "decode",
            "options": options(arguments),
            "environment": environment,
            "figures": figures,
            "effects": effects,
            "switching": switching,
            "seconds": {name: contender.seconds for name, contender in contenders.items()},
            "targets": at_most(TARGETS, reached),
        },
    )


def _arguments(argv: Sequence[str] | None) -> Namespace:
    command = parser(__doc__.splitlines()[0] if __doc__ else "", "decode")
    add_shape(command, 2, 4)
    command.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    command.add_argument("--context", type=int, default=128, help="tokens in the cache before the first step")
    command.add_argument("--tokens", type=int, default=8, help="steps a round")
    command.add_argument("--rounds", type=int, default=15)
    add_compile(command)
    arguments = command.parse_args(argv)
    fill_out(arguments, "decode")
    fill_shape(arguments)
    if arguments.fast:
        arguments.batch_sizes, arguments.context, arguments.tokens, arguments.rounds = [1, 2], 8, 2, 2
    return arguments


def _configs(base: nn.Module) -> dict[str, PeftConfig]:
    """CLOVER at its defaults, and LoRA at as many trainable parameters."""
    budget = trainable(get_peft_model(_with_same_weights(base), CloverConfig()))
    rank = rank_for(budget, base, PAPER_LORA_TARGETS)
    return {
        "clover": CloverConfig(),
        "lora": LoraConfig(r=rank, lora_alpha=rank, target_modules=list(PAPER_LORA_TARGETS)),
    }


def _with_same_weights(base: nn.Module) -> nn.Module:
    """A copy of the modules around the same weights, for adapters that leave them alone."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def _wrapped(base: nn.Module, config: PeftConfig, seed: int) -> PeftModel:
    # Peft keeps adapters of a bfloat16 model in float32, for training. CLOVER folds its tensors in float32 either way.
    autocast = not isinstance(config, LoraConfig)
    torch.manual_seed(seed)  # LoRA's A starts at random numbers
    model = get_peft_model(base, copy.deepcopy(config), autocast_adapter_dtype=autocast)
    randomise(model, seed)
    return model.eval()


def _contenders(base: nn.Module, seed: int) -> dict[str, Contender]:
    """The base and every adapter, each with weights of its own, so that none finds them in a processor's cache."""
    configs = _configs(base)
    contenders = {"base": Contender(base, "", 0)}

    def add(name: str, setting: str, config: PeftConfig, **kwargs: Any) -> Contender:
        model = _wrapped(copy.deepcopy(base), config, seed)
        contenders[name] = Contender(model, setting, trainable(model), **kwargs)
        model.requires_grad_(False)  # as adapters are loaded for inference: CLOVER keeps the maps of frozen ones alone
        return contenders[name]

    clover = add("clover", "full, k v up", configs["clover"])
    add("clover in training", "full, k v up", configs["clover"]).model.requires_grad_(True)
    merged = _wrapped(copy.deepcopy(base), configs["clover"], seed).merge_and_unload()
    contenders["clover merged"] = Contender(merged.eval(), "full, k v up", clover.parameters)
    quarter = decoder_of(base).get_submodule("layers.0.self_attn").head_dim // 4
    add("clover low rank", f"r {quarter}, k v up", CloverConfig(r=quarter))
    lora: Any = configs["lora"]
    add("lora", f"r {lora.r}", lora)
    dora = LoraConfig(r=lora.r, lora_alpha=lora.r, target_modules=list(PAPER_LORA_TARGETS), use_dora=True)
    add("dora", f"r {lora.r}", dora)
    add("dora cached", f"r {lora.r}, DoraCaching", dora, around=DoraCaching)
    return contenders


def _effects(contenders: dict[str, Contender], base: nn.Module) -> dict[str, float]:
    """How far each model's output of one step is from the base's, relative to it: what is timed does something."""
    parameter = next(base.parameters())
    torch.manual_seed(0)
    x = torch.randn(1, 1, decoder_of(base).config.hidden_size).to(parameter)
    cache = _filled(base, 1, 4)
    outputs = {}
    for name, contender in contenders.items():
        with contender.around():
            decoded = decoder_of(contender.model)(inputs_embeds=x, past_key_values=cache, use_cache=True)
        outputs[name] = decoded.last_hidden_state.double()
        cache.crop(-1)
    norm = outputs["base"].norm()
    return {name: float((output - outputs["base"]).norm() / norm) for name, output in outputs.items()}


def _filled(base: nn.Module, batch: int, context: int) -> DynamicCache:
    """A cache of random keys and values of `context` tokens, for any of the models."""
    cache, config, parameter = DynamicCache(), decoder_of(base).config, next(base.parameters())
    for layer in range(config.num_hidden_layers):
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        cache.update(*(torch.randn(shape).to(parameter) for _ in "kv"), layer)
    return cache


def _steps(model: nn.Module, x: torch.Tensor, cache: DynamicCache, count: int, device: str) -> float:
    """Seconds for `count` one-token steps; `x` is (batch, 1, hidden size). The cache is as before afterwards."""
    decoder = decoder_of(model)

    def work() -> None:
        for _ in range(count):
            decoder(inputs_embeds=x, past_key_values=cache, use_cache=True)

    seconds = clock(work, device)
    cache.crop(-count)
    return seconds


def _prompt(model: nn.Module, x: torch.Tensor) -> None:
    """A pass of two tokens, as a prompt's before its decoding: CLOVER keeps the maps of it."""
    decoder_of(model)(inputs_embeds=x.expand(-1, 2, -1), use_cache=False)


def _race(contenders: dict[str, Contender], base: nn.Module, batch: int, arguments: Namespace) -> None:
    cache = _filled(base, batch, arguments.context)
    x = torch.randn(batch, 1, arguments.hidden_size).to(next(base.parameters()))
    order = list(contenders.values())
    shuffle = random.Random(arguments.seed).shuffle
    for contender in order:
        contender.seconds[batch] = []
    warm_up = 3 if arguments.compile else 1  # caches that were cut back are compiled for too
    for number in tqdm(range(arguments.rounds + warm_up), desc=f"batch {batch}", unit="round"):
        shuffle(order)
        for contender in order:
            with contender.around():
                _prompt(contender.model, x)
                seconds = _steps(contender.model, x, cache, arguments.tokens, arguments.device)
            if number >= warm_up:
                contender.seconds[batch].append(seconds / arguments.tokens)


def _figures(contenders: dict[str, Contender], batch: int) -> dict[str, dict[str, Any]]:
    base, lora = contenders["base"].seconds[batch], contenders["lora"].seconds[batch]
    return {
        name: {
            "setting": c.setting,
            "trainable_parameters": c.parameters,
            "median_seconds": statistics.median(c.seconds[batch]),
            **measured("v_base", ratios(c.seconds[batch], base)),
            **measured("v_lora", ratios(c.seconds[batch], lora)),
        }
        for name, c in contenders.items()
    }


def _report(rows: dict[str, dict[str, Any]]) -> str:
    header = ["method", "setting", "trainable", "ms a step", "v base", "v LoRA"]
    return table(
        header,
        [
            (
                name,
                f["setting"],
                f"{f['trainable_parameters']:,}",
                1e3 * f["median_seconds"],
                told(f, "v_base"),
                told(f, "v_lora"),
            )
            for name, f in rows.items()
        ],
    )


def _write(model: nn.Module, adapter: str) -> None:
    """Write to the adapter's parameters, so that nothing that was made of them may be used again."""
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name:
            parameter.mul_(1.0)


def _switching(base: nn.Module, config: PeftConfig, arguments: Namespace) -> dict[str, Any]:
    """What the switch to another adapter costs at batch 1, to one that is new and to one that is not."""
    model = _wrapped(_with_same_weights(base), config, arguments.seed)
    model.add_adapter("other", copy.deepcopy(config), autocast_adapter_dtype=not isinstance(config, LoraConfig))
    model.set_adapter("other")
    randomise(model, arguments.seed + 1)
    model.requires_grad_(False)
    if arguments.compile:
        compile_decoders([model])
    cache = _filled(base, 1, arguments.context)
    x = torch.randn(1, 1, arguments.hidden_size).to(next(base.parameters()))
    step = partial(_steps, model, x, cache, 1, arguments.device)
    rounds: dict[str, list[dict[str, float]]] = {"new": [], "known": []}
    for number in tqdm(range(2 * arguments.rounds + 1), desc="switching", unit="round"):
        for kind, found in rounds.items():
            name = next(name for name in ("default", "other") if name not in model.active_adapters)
            if kind == "new":
                _write(model, name)
            before = step()
            switch = clock(partial(model.set_adapter, name, inference_mode=True), arguments.device)
            first, after = step(), step()
            if number:  # the first is a warm-up
                found.append({"set_adapter": switch, "first_step": first, "usual_step": (before + after) / 2})

    def milliseconds(name: str, values: Iterable[float]) -> dict[str, Any]:
        return measured(f"{name}ms_a_layer", [1e3 * value / arguments.layers for value in values])

    return {
        kind: {
            **milliseconds("", (r["set_adapter"] + r["first_step"] - r["usual_step"] for r in found)),
            **milliseconds("set_adapter_", (r["set_adapter"] for r in found)),
            **milliseconds("first_step_", (r["first_step"] - r["usual_step"] for r in found)),
            "rounds": found,
        }
        for kind, found in rounds.items()
    }


if __name__ == "__main__":
    main()
