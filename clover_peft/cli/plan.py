"""`clover plan`: what an adapter takes, counted without weights."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base_model.weight import BaseWeight, base_of, feature_counts
from ..io.hub_models import find_model
from ..io.model_class import class_of, find_class, make_empty, read_config
from ..tuner.bases import compute_frozen_tensors
from ..tuner.block_spec import BlockSpec
from ..tuner.config import CloverConfig
from ..tuner.experts import refuse_experts
from ..tuner.layer import CloverLayer
from ..tuner.layers import clover_layers, inner_model
from . import checks, parsers, plan_mla
from .errors import reports_errors

BYTES = 4  # S and the bases are float32, whatever the base model is


def plan(
    config: transformers.PretrainedConfig, adapter: CloverConfig, model_class: str | None = None
) -> dict[str, Any]:
    """Counts an adapter's tensors on a model without weights.

    Args:
        config: of the base model.
        adapter: of the adapter.
        model_class: see `model_class.find_class`.

    Returns:
        JSON-ready: `model_type`, `model_class`, `parameters` (trainable, base), `bytes` (S, bases, gradients, adamw),
        `adapter_file` (bytes of its tensors under each `save_bases`) and `layers`: path of the layer, "" outside of
        any -> its modules, each with its slices and `gram_flops`.

    Raises:
        ValueError: the adapter does not fit the model.
    """
    kind = class_of(config, adapter, model_class)
    model = _empty(config, kind)
    base = sum(p.numel() for p in model.parameters())
    with torch.device("meta"):
        adapted = get_peft_model(model, adapter)
    inner = inner_model(adapted)
    trainable = sum(p.numel() for p in inner.parameters() if p.requires_grad)
    layers: dict[str, dict[str, Any]] = {}
    s = bases = packed = alone = folded = 0
    for _, layer in clover_layers(inner):
        path = layer.name  # a stack of experts' weights has no path of a module
        specs = layer.specs["default"]
        for spec in specs:
            norms = spec.blocks * spec.size
            s += _numel(spec.s_shape)
            bases += sum(map(_numel, spec.base_shapes.values()))
            packed += _numel(spec.base_shapes["clover_U"]) - _numel(spec.packed_shape) if spec.packed_shape else 0
            alone += _numel(spec.s_shape) + 2 * spec.blocks * spec.r + norms  # with S0 and the probe of the bases
            folded += norms * spec.size + norms
        low_rank = (part for name, part in layer.trained_tensors("default").items() if name != "clover_S")
        count = sum(tensor.numel() for part in low_rank for tensor in part.values())
        s, alone, folded = s + count, alone + count, folded + count
        layers.setdefault(_layer_of(path), {})[path] = {
            "slices": [_describe(spec) for spec in specs],
            "gram_flops": sum(_gram_flops(inner, layer, spec) for spec in specs),
        }
    beside = _bytes_beside(adapted)
    files = {"true": s + bases - packed, "false": alone, "folded": folded}
    return {
        "model_type": config.model_type,
        "model_class": type(model).__name__,
        "parameters": {"trainable": trainable, "S": s, "base": base},
        "bytes": {
            "S": BYTES * s,
            "bases": BYTES * bases,
            "gradients": BYTES * trainable,
            "adamw": 2 * BYTES * trainable,
        },
        "adapter_file": {name: BYTES * count + beside for name, count in files.items()},
        "layers": layers,
    }


def match(
    config: transformers.PretrainedConfig, kind: Any, budget: int, targets: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Ranks at which low-rank methods train as many numbers as CLOVER.

    One rank for all modules comes in steps of their whole size, so the module that is smallest in all gets its own.

    Args:
        config: of the base model.
        kind: its class.
        budget: the trainable parameters to match.
        targets: last parts of the names of the modules, linear ones.

    Returns:
        "lora" (also PiSSA), "dora" (which trains a magnitude for every output, too) -> `r`, `rank_pattern`,
        `parameters`.

    Raises:
        ValueError: the model has no such module, or they are too large for the budget at rank 1.
    """
    sizes, outputs = dict.fromkeys(targets, 0), 0
    for name, module in _empty(config, kind).named_modules():
        if (last := name.rpartition(".")[2]) in sizes and isinstance(module, (nn.Linear, Conv1D)):
            sizes[last] += sum(module.weight.shape)
            outputs += feature_counts(module, name)[1]
    if missing := [name for name, size in sizes.items() if not size]:
        raise ValueError(f"--match {missing[0]}: expected a linear module of the model, found none")
    smallest, found = min(sizes, key=lambda name: sizes[name]), {}
    for method, beside in (("lora", 0), ("dora", outputs)):
        if (low := (budget - beside) // sum(sizes.values())) < 1:
            raise ValueError(
                f"--match: expected modules that fit {budget:,} parameters at rank 1, found too large ones"
            )
        choices = []
        for r in (low, low + 1):
            rest = budget - beside - r * (sum(sizes.values()) - sizes[smallest])
            ranks = dict.fromkeys(sizes, r) | {smallest: max(1, round(rest / sizes[smallest]))}
            choices.append((r, ranks[smallest], beside + sum(ranks[name] * size for name, size in sizes.items())))
        r, own, count = min(choices, key=lambda choice: (abs(choice[2] - budget), abs(choice[1] - choice[0])))
        found[method] = {"r": r, "rank_pattern": {} if own == r else {smallest: own}, "parameters": count}
    return found


def measure(config: transformers.PretrainedConfig, kind: Any, adapter: CloverConfig) -> tuple[str, float]:
    """Makes the bases of the first layer from random float32 weights.

    Returns:
        The layer's path, and the seconds on this machine.
    """
    model = _empty(config, kind)
    with torch.device("meta"):
        found = clover_layers(inner_model(get_peft_model(_empty(config, kind), adapter)))
    refuse_experts(found, "--measure")
    first = _layer_of(found[0][0])
    seconds = 0.0
    for path, layer in found:
        if _layer_of(path) != first:
            continue
        specs = layer.specs["default"]
        partners = [spec.partner.path for spec in specs if spec.partner is not None]
        for name in dict.fromkeys([path, *partners]):
            module = model.get_submodule(name).to_empty(device="cpu")
            for parameter in module.parameters():
                nn.init.normal_(parameter.data, std=0.02)
        started = time.perf_counter()
        compute_frozen_tensors(model, BaseWeight(model.get_submodule(path), path), specs)
        seconds += time.perf_counter() - started
        for name in dict.fromkeys([path, *partners]):
            model.get_submodule(name).to("meta")
    return first, seconds


def _empty(config: transformers.PretrainedConfig, kind: Any) -> nn.Module:
    """The model on the meta device, in float32."""
    with torch.device("meta"):
        return make_empty(kind, config)


def _bytes_beside(model: PeftModel) -> int:
    """What peft saves beside the layers' own tensors, which are removed: biases, modules_to_save, targeted heads."""
    for _, layer in clover_layers(inner_model(model)):
        layer.forget_tensors("default")
    model.peft_config["default"].base_model_name_or_path = None  # peft would ask the hub if the vocabulary has grown
    return sum(tensor.nbytes for tensor in get_peft_model_state_dict(model).values())


def _layer_of(path: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj`."""
    number = re.search(r"\.\d+(?=\.)", path)
    return path[: number.end()] if number else ""


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _describe(spec: BlockSpec) -> dict[str, Any]:
    return {
        "part": spec.part,
        "blocks": spec.blocks,
        "size": spec.size,
        "r": spec.r,
        "basis": spec.basis,
        "parameters": _numel(spec.s_shape),
    }


def _gram_flops(model: nn.Module, layer: CloverLayer, spec: BlockSpec) -> int:
    """Of the d x d Gram matrices of both sides; what is decomposed then is d x d."""
    flops = 2 * layer.in_features * spec.heads.features * spec.size
    if spec.partner is not None and spec.basis == "pair":
        partner: Any = base_of(model.get_submodule(spec.partner.path))
        heads_last = spec.partner.reads != isinstance(partner, Conv1D)  # in the weight, (out, in) but for Conv1D
        outer = partner.weight.shape[0 if heads_last else 1]
        flops += 2 * outer * spec.partner.heads.features * spec.size
    return flops


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.1f} {unit}" if unit != "B" else f"{count:,.0f} B"
        count /= 1024
    raise AssertionError


@reports_errors(TypeError)
def run(given: argparse.Namespace) -> int:
    checks.plan(given)
    config = read_config(given.model if Path(given.model).is_file() else find_model(given.model).path)
    if given.mla is not None:
        return plan_mla.run(given, config)
    adapter = checks.adapter_settings(given.overrides)
    result = plan(config, CloverConfig(**adapter), given.model_class)
    kind = find_class(config, name=result["model_class"])
    if given.match:
        result["match"] = match(config, kind, result["parameters"]["trainable"], given.match)
    if given.measure:
        measured = measure(config, kind, CloverConfig(**adapter))
        result["measured"] = dict(zip(("layer", "seconds"), measured, strict=True))
    if given.json:
        print(json.dumps(result, indent=2))
        return 0
    parameters, size = result["parameters"], result["bytes"]
    print(
        f"{result['model_class']}: {parameters['trainable']:,} trainable of {parameters['base']:,} parameters "
        f"({parameters['trainable'] / parameters['base']:.3%})"
    )
    print(f"S {_size(size['S'])}, gradients {_size(size['gradients'])}, AdamW {_size(size['adamw'])}")
    print(f"frozen bases {_size(size['bases'])}, in every process, whole")
    files = ", ".join(f"{name} {_size(count)}" for name, count in result["adapter_file"].items())
    print(f"adapter file, by save_bases: {files}")
    first, modules = next(iter(result["layers"].items()))
    print(f"{len(result['layers'])} layers; the first, {first}:" if first else "modules:")
    for path, module in modules.items():
        for one in module["slices"]:
            blocks = f"{one['blocks']} blocks of {one['size']}, r={one['r']}, {one['basis']}"
            print(f"  {path} ({one['part']}): {blocks}, {one['parameters']:,} parameters")
    print(f"  Gram matrices: {sum(m['gram_flops'] for m in modules.values()) / 1e9:,.1f} GFLOP in float64")
    for method, found in result.get("match", {}).items():
        own = "".join(f", rank_pattern={{{name}: {r}}}" for name, r in found["rank_pattern"].items())
        off = found["parameters"] / parameters["trainable"] - 1
        print(f"as large: {method} with r={found['r']}{own}, {found['parameters']:,} parameters ({off:+.2%})")
    if given.measure:
        print(f"  bases made in {result['measured']['seconds']:.2f} s on this machine")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parsers.plan(arguments))
