"""Weights before and after a fine-tuning, module by module, and the inputs of the modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...base_model.activations import evaluating

_PROJECTIONS = (nn.Linear, Conv1D)  # what is measured


@dataclass(frozen=True)
class Change:
    """The weight of one projection before and after a fine-tuning.

    Attributes:
        name: the module's name in the base model.
        before: (out features, in features), at least float32.
        after: the same shape.
    """

    name: str
    before: Tensor
    after: Tensor


def moves_base(config: Any) -> bool:
    """Whether making or loading an adapter with this configuration of peft changes the base's own weights."""
    start = str(getattr(config, "init_lora_weights", None)).lower()
    return start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))


def adapter_changes(model: Any) -> Iterator[Change]:
    """Yield how merging the active adapters changes each adapted projection; see `left_out_of_adapter` for the rest.

    One module is merged at a time, and restored. This works for every method of peft that merges into a weight and
    leaves the base weights alone (see `moves_base`).

    Args:
        model: a `PeftModel` on float weights; load it in float32, because a merge in bfloat16 rounds the update.

    Raises:
        ValueError: a projection is quantised or already merged, or the method does not merge, or moves the base.
    """
    if moved := [name for name, config in model.peft_config.items() if moves_base(config)]:
        raise ValueError(
            f"adapter {moved[0]!r}: expected one that leaves the base as it is, found init_lora_weights="
            f"{model.peft_config[moved[0]].init_lora_weights!r}, which moves a part of it into the adapter; merge it, "
            "and compare two models with model_changes"
        )
    found = False
    for name, module in model.base_model.model.named_modules():
        layer: Any = module if isinstance(module, BaseTunerLayer) else None
        base = layer and layer.get_base_layer()
        if not isinstance(base, _PROJECTIONS):
            continue
        found = True
        if layer.merged or not base.weight.is_floating_point():
            raise ValueError(f"{name}: expected an unmerged adapter on float weights, found another; reload it so")
        before = _weight(base)
        original = base.weight.detach().clone()
        layer.merge()
        try:
            after = _weight(layer.get_base_layer())
        finally:
            layer.unmerge()
            layer.get_base_layer().weight.data.copy_(original)  # Not every method restores the exact bits.
        yield Change(name, before, after)
    if not found:
        others = ", ".join(left_out_of_adapter(model)[:3])
        raise ValueError(f"expected adapted projections with a weight, found {others or 'none'}")


def left_out_of_adapter(model: Any, saved: Iterable[str] = ()) -> list[str]:
    """What an adapter changes and `adapter_changes` does not measure: experts, embeddings, whole modules, biases.

    Args:
        model: a `PeftModel`.
        saved: the names in the adapter's file; those of the base's own parameters are left out too.

    Returns:
        The names of modules and parameters in the base model.
    """
    inner = model.base_model.model
    found: dict[str, None] = {}
    for name, module in inner.named_modules():
        is_adapted = isinstance(module, BaseTunerLayer) and not isinstance(module.get_base_layer(), _PROJECTIONS)
        if is_adapted or isinstance(module, AuxiliaryTrainingWrapper):
            found[_base_name(name)] = None
    own = dict(inner.named_parameters())
    for name in map(_base_name, (name for name in saved if name in own)):
        if name.rpartition(".")[0] not in found:
            found[name] = None
    return list(found)


def _base_name(name: str) -> str:
    """The name in the base model of what is wrapped by peft."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "token_adapter"))


def left_out_of_models(before: nn.Module, after: nn.Module) -> list[str]:
    """The names of parameters that differ between two models and that `model_changes` does not measure."""
    measured = {f"{name}.weight" for name, module in before.named_modules() if isinstance(module, _PROJECTIONS)}
    others = dict(after.named_parameters())
    return [
        name
        for name, one in before.named_parameters()
        if name not in measured
        and ((two := others.get(name)) is None or one.shape != two.shape or not torch.equal(one, two))
    ]


def model_changes(before: nn.Module, after: nn.Module) -> Iterator[Change]:
    """Yield the projections that differ between two models of one architecture; see `left_out_of_models`.

    Raises:
        ValueError: a projection has another shape in the other model, or they share none.
    """
    others = {name: module for name, module in after.named_modules() if isinstance(module, _PROJECTIONS)}
    shared = 0
    for name, module in before.named_modules():
        other = others.get(name)
        if not isinstance(module, _PROJECTIONS):
            continue
        shapes = tuple(module.weight.shape), None if other is None else tuple(other.weight.shape)
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name}: expected the shape {shapes[0]} in both models, found {shapes[1]} in the other")
        shared += 1
        one, two = _weight(module), _weight(others[name])
        if not torch.equal(one, two):
            yield Change(name, one, two)
    if not shared:
        raise ValueError("expected two models of one architecture, found no projection that both have")


def collect_inputs(
    model: Any, names: Iterable[str], batches: Iterable[dict[str, Tensor]], tokens: int = 256
) -> dict[str, Tensor]:
    """Collect the inputs of projections while the model runs without its adapters.

    Args:
        model: a `PeftModel`, or a plain model.
        names: names of modules, as in `Change.name`.
        batches: inputs of the model, without padding: padding tokens would count.
        tokens: how many rows to keep for each module; they are spread evenly over the batches and within each.

    Returns:
        name -> (rows, in features), float32, on the CPU; at most `tokens` rows.
    """
    batches = list(batches)
    inner = model.base_model.model if hasattr(model, "peft_config") else model
    wanted = 0  # rows to keep of the batch that runs
    kept: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2)
            if count := min(wanted, len(rows)):
                chosen = (torch.arange(count, device=rows.device) + 0.5) * (len(rows) / count)
                kept[name].append(rows[chosen.long()].float().cpu())

        return hook

    without = model.disable_adapter if hasattr(model, "peft_config") else contextlib.nullcontext
    with evaluating(model), contextlib.ExitStack() as hooked, torch.no_grad():
        for name in kept:
            hooked.enter_context(inner.get_submodule(name).register_forward_pre_hook(keep(name)))
        for i, batch in enumerate(batches):
            wanted = tokens * (i + 1) // len(batches) - tokens * i // len(batches)
            with without():
                model(**batch)
    return {name: torch.cat(rows)[:tokens] for name, rows in kept.items() if rows}


def _weight(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight
