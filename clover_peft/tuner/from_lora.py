"""`options_like`: the options of the CLOVER adapter that is nearest to a LoRA."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import MISSING, fields
from itertools import product
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from torch import nn
from transformers import PretrainedConfig

from ..base_model.experts import experts_slice
from ..base_model.families import find_suffix
from ..base_model.resolve import resolve
from ..base_model.slices import TargetSlice
from ..io.model_class import class_of, make_empty
from ..io.user_warning import warn
from .config_checks import CORRESPONDING

# Options that mean the same in both configs.
SAME = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "trainable_token_indices",
    "ensure_weight_tying",
)
# Options that make another model, or another way to run it, out of the same modules.
REFUSED = ("layer_replication", "megatron_config", "alora_invocation_tokens", "arrow_config", "monteclora_config")
# Fields of `LoraConfig` that say nothing about the adapter, or that are read elsewhere in this file.
SILENT = {"r", "lora_dropout", "bias", "peft_type", "peft_version", "auto_mapping", "inference_mode", "runtime_config"}
MOST_UNLIKE = 8  # the most by which the sizes of blocks with and without heads differ, where one can choose
NEAR = 0.1  # counts that differ by less are "about the same"


def options_like(lora: LoraConfig, model: nn.Module | PretrainedConfig | None) -> dict[str, Any]:
    """The options of a CLOVER config for the modules of a LoRA, and for about as many trained numbers.

    A block of d features trains d^2 numbers, so a slice of n features trains n d of them, and a projection of n
    outputs and m inputs takes r (n + m) in LoRA. Among the block sizes that divide all heads and outputs (or are
    wider than an output), those are chosen that come within 10 % and are most alike; if none do, the leading
    directions of a block are trained.

    Arguments and errors as in `CloverConfig.from_lora`.
    """
    changed = [each.name for each in fields(lora) if getattr(lora, each.name) != _default(each)]
    if refused := [name for name in changed if name in REFUSED]:
        raise ValueError(
            f"CloverConfig.from_lora: expected a LoRA that adds updates to its modules, found {', '.join(refused)}, "
            "which CLOVER cannot do; leave it out, or keep the LoRA"
        )
    options = {name: getattr(lora, name) for name in SAME if name in changed}
    if lora.lora_dropout:
        options["clover_dropout"] = lora.lora_dropout
    if lora.bias != "none":
        options["bias"] = "clover_only" if lora.bias == "lora_only" else lora.bias
    left_out = {name: CORRESPONDING.get(name, "no counterpart") for name in changed if name not in {*SAME, *SILENT}}
    if "rank_pattern" in left_out and model is not None:
        left_out["rank_pattern"] = "counted, but all modules get blocks of one size"
    if model is None:
        near, said = (
            False,
            "no model is given, so blocks have CLOVER's sizes whatever the LoRA's r; pass the model or its config",
        )
    else:
        near, said = _choose_sizes(lora, model, options)
    if left_out:
        said += "; left out: " + ", ".join(f"{name} ({why})" for name, why in left_out.items())
    said = f"CloverConfig.from_lora: {said}"
    if left_out or not near:
        warn(said)
    else:
        logging.getLogger(__name__).info(said)
    return options


def _choose_sizes(lora: LoraConfig, model: nn.Module | PretrainedConfig, options: dict[str, Any]) -> tuple[bool, str]:
    """Add the sizes of blocks to the options; returns whether the counts are near, and the choice in one clause."""
    if isinstance(model, PretrainedConfig):
        with torch.device("meta"):
            model = make_empty(class_of(model, lora), model)
    tuner = _adapted(lora, model)
    of_default = ""
    if lora.target_modules is None and not lora.target_parameters:
        options["target_modules"] = sorted(tuner.peft_config["default"].target_modules)
        of_default = f" for peft's default modules {options['target_modules']}"
    stacks, others = _stacks(lora, model, tuner)
    others += _replace_targets(lora, tuner, stacks, options)
    slices = [each for path in tuner.targeted_module_names for each in resolve(model, path, described=True)]
    slices += [experts_slice(model, path)[0] for path in stacks]
    budget = sum(parameter.numel() for name, parameter in tuner.named_parameters() if "lora_" in name)
    sizes = _nearest(budget, slices)
    options |= sizes
    off = (count := _count(slices, **sizes)) / budget - 1
    chosen = ", ".join(f"{name}={size}" for name, size in sizes.items()) or "CLOVER's own sizes of blocks"
    far = "" if abs(off) <= NEAR else ", the nearest that blocks of these modules reach"
    said = f"chose {chosen}{of_default}: {count:,} trained numbers where the LoRA has {budget:,} ({off:+.1%}{far})"
    if others:
        said += f"; without {', '.join(others)}, which CLOVER does not adapt here"
    return not (far or others), said


def _stacks(lora: LoraConfig, model: nn.Module, tuner: LoraModel) -> tuple[list[str], list[str]]:
    """The paths of the experts' weights that the LoRA adapts, and names of parameters that CLOVER leaves out.

    Peft adds parameters that the user has not named, such as routers, to the targets of mixtures of experts.
    """
    stacks, others = [], set[str]()
    for path in tuner.targeted_parameter_names:
        if len(shape := model.get_parameter(path).shape) == 3:
            stacks.append(path)
        elif find_suffix(path, lora.target_parameters or ()):
            raise ValueError(
                f"{path}: expected target_parameters to name stacks of experts' weights, with three dimensions, found "
                f"the shape {tuple(shape)}; name its module in target_modules"
            )
        else:
            others.add(".".join(path.split(".")[-2:]))
    return stacks, sorted(others)


def _replace_targets(lora: LoraConfig, tuner: LoraModel, stacks: list[str], options: dict[str, Any]) -> list[str]:
    """Put the targets into the options that peft has made of the LoRA's; returns names of experts' modules.

    Where a model keeps its experts in stacks, it has no such modules. Peft replaces the names where it can.
    """
    completed, named = tuner.peft_config["default"], lora.target_modules
    if set(completed.target_parameters or ()) != set(lora.target_parameters or ()):
        options["target_parameters"] = sorted({".".join(path.split(".")[-2:]) for path in stacks})
        options["target_modules"] = named = completed.target_modules
    if named is None or isinstance(named, str):
        return []
    if not any(parameter.ndim == 3 for parameter in tuner.model.parameters()):
        return []
    modules = [path for path, _ in tuner.model.named_modules()]
    unused = {name for name in named if not any(find_suffix(path, [name]) for path in modules)}
    options["target_modules"] = sorted(set(named) - unused)
    return sorted(unused)


def _adapted(lora: LoraConfig, model: nn.Module) -> LoraModel:
    """A copy of the model with the LoRA, whose floating-point numbers are on the meta device: peft counts for us."""
    lora = deepcopy(lora)
    lora.init_lora_weights = False  # other ways read the weights
    lora.modules_to_save = lora.trainable_token_indices = None  # both adapters train the same ones
    copied = {}
    for parameter in model.parameters():  # quantised weights are shared with the copy: they have no requires_grad
        plain = type(parameter) is nn.Parameter and parameter.is_floating_point()
        copied[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), False) if plain else parameter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they concern the LoRA
        try:
            return LoraModel(deepcopy(model, copied), lora, "default", low_cpu_mem_usage=True)
        except ValueError as error:
            raise ValueError(f"CloverConfig.from_lora: expected a LoRA that fits the model, found: {error}") from error


def _nearest(budget: int, slices: list[TargetSlice]) -> dict[str, int]:
    """The sizes that come nearest to the budget; among those within 10 %, the ones that are most alike."""
    sizes = {
        "block_size": _divisors(each for each in slices if each.has_heads),
        "mlp_block_size": _divisors(each for each in slices if not each.has_heads),
    }
    used = {name: found for name, found in sizes.items() if found}
    choices = [dict(zip(used, choice, strict=True)) for choice in product(*used.values())]

    def distance(choice: dict[str, int]) -> float:
        return abs(_count(slices, **choice) / budget - 1)

    def unlike(choice: dict[str, int]) -> float:
        return max(choice.values()) / min(choice.values())

    choices = [choice for choice in choices if unlike(choice) <= MOST_UNLIKE] or choices
    if near := [choice for choice in choices if distance(choice) <= NEAR]:
        return min(near, key=lambda choice: (unlike(choice), distance(choice)))
    narrowest = min(each.default_block_size for each in slices)
    return min([*choices, *({"r": r} for r in range(1, narrowest))], key=distance)


def _count(
    slices: list[TargetSlice], block_size: int | None = None, mlp_block_size: int | None = None, r: int | None = None
) -> int:
    """Numbers in S: n d for n features in blocks of d, and r^2 n/d if r directions of each block are trained."""
    count = 0
    for each in slices:
        size = block_size if each.has_heads else mlp_block_size and min(mlp_block_size, each.heads.dim)
        size = size or each.default_block_size
        count += each.heads.features // size * (r or size) ** 2
    return count


def _divisors(slices: Iterable[TargetSlice]) -> list[int]:
    """The sizes of blocks that divide every head, or every projection without heads that has as many features."""
    dims = {(each.heads.dim, each.has_heads) for each in slices}
    sizes = range(1, max((dim for dim, _ in dims), default=0) + 1)
    return [size for size in sizes if all(dim % size == 0 or (dim < size and not heads) for dim, heads in dims)]


def _default(each: Any) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()
