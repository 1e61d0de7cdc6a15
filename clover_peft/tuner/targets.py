"""Which modules and parameters may be adapted: those that the config names, at one place, called by the model."""

from __future__ import annotations

import difflib
import inspect
import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from ..base_model.families import find_suffix
from ..base_model.rewritten import wrap_once
from ..base_model.weight import base_of, is_projection
from ..io.user_warning import warn
from ..runtime.sharding import whole_shape
from .adapter_tensors import file_key
from .config import CloverConfig
from .experts import CloverExperts
from .layer import CloverLayer


def check_names(model: nn.Module, target_modules: object, exclude_modules: object = None) -> None:
    """Warn of names that no module has; they may be misspelt. What is no set of names is passed over.

    Raises:
        NoMatchingPeftModuleError: if no module has any of the names in `target_modules`.
    """
    names, unknown, remedy = _unknown(model, target_modules)
    if unknown and len(unknown) == len(names):
        raise NoMatchingPeftModuleError(f"Target modules {set(unknown)} not found in the base model; {remedy}")
    if unknown:
        warn(f"target_modules: no module is called {', '.join(unknown)}, the others are adapted; {remedy}")
    _, unknown, remedy = _unknown(model, exclude_modules)
    if unknown:
        warn(f"exclude_modules: no module is called {', '.join(unknown)}, nothing is left out for it; {remedy}")


def _unknown(model: nn.Module, given: object) -> tuple[set[str], list[str], str]:
    """The names in a set, those of them that no module has, and what may be meant."""
    names = {name for name in given if name} if isinstance(given, set) else set()
    if not names:
        return names, [], ""
    paths = [path for path, _ in model.named_modules() if path]
    unknown = sorted(name for name in names if not any(find_suffix(path, [name]) for path in paths))
    if not unknown:
        return names, [], ""
    modules = (path for path, module in model.named_modules() if is_projection(base_of(module)))
    known = sorted({path.rpartition(".")[2] for path in modules})
    near = {name: difflib.get_close_matches(name.rpartition(".")[2], known, n=2) for name in unknown}
    guesses = "; ".join(f"{name}: did you mean {' or '.join(found)}?" for name, found in near.items() if found)
    remedy = guesses or f"its linear modules are called {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"
    return names, unknown, remedy


# Classes that read a weight in a branch alone -> whether a module of theirs may take it.
_BRANCHES: dict[str, Callable[[Any], bool]] = {
    "BloomAttention": lambda module: module.pretraining_tp > 1 and module.slow_but_exact,
    "BloomMLP": lambda module: module.pretraining_tp > 1 and module.slow_but_exact,
    "DisentangledSelfAttention": lambda module: False,  # DeBERTa's, which passes no query states
    "TransformerEncoderLayer": lambda module: torch.backends.mha.get_fastpath_enabled(),
}


def refuse_bypassed(parent: nn.Module, path: str) -> None:
    """Refuse a projection whose weight its parent reads itself, past the module and so past an adapter.

    State-space layers hand such weights to kernels; WavLM and `nn.MultiheadAttention` hand them to a function. Where
    the parent also calls the projection, it may read the weight for another reason, such as a penalty: a warning.
    """
    *_, holder, name = ("", *path.split("."))
    class_: Any = type(parent)
    branches = [_BRANCHES[each.__name__] for each in class_.__mro__ if each.__name__ in _BRANCHES]
    if name not in (found := _read(class_)) or (branches and not branches[0](parent)):
        return
    place = "" if holder.isdigit() or not holder else f"{holder}."
    remedy = f"pass exclude_modules={[place + each for each in found]}"
    if found[name] and not branches and not hasattr(parent, "conv1d"):
        warn(
            f"{class_.__name__} calls {name}, and also reads its weight past it, where an adapter is skipped until it "
            f"is merged; if the weight acts on activations there, {remedy}"
        )
        return
    if isinstance(parent, nn.TransformerEncoderLayer):
        remedy = "call torch.backends.mha.set_fastpath_enabled(False) before this, in every process"
    raise ValueError(
        f"{path}: expected a module that the model calls, found that {class_.__name__} reads its weight past it, so "
        f"that an adapter would be skipped; {remedy}"
    )


def refuse_fusing(parent: nn.Module) -> None:
    """Have diffusers' attention refuse to copy weights of projections together, past adapters that are not merged."""
    if hasattr(parent, "fuse_projections"):
        wrap_once(type(parent), "fuse_projections", _fused_if_merged)


def _fused_if_merged(fuse: Callable[..., Any]) -> Callable[..., Any]:
    def fuse_projections(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, child in self.named_children():
            if isinstance(child, CloverLayer) and not child.merged:
                raise ValueError(
                    f"{child.name}: expected a merged adapter, found one that fuse_projections would leave out, "
                    f"because it copies the weight of {name} past it; call merge_adapter or merge_and_unload first"
                )
        return fuse(self, *args, **kwargs)

    return fuse_projections


@cache
def _read(parent: type[nn.Module]) -> dict[str, bool]:
    """The attributes whose weights a class of modules reads, and whether it calls them too.

    It looks at the forward methods, and at those that they call. To ask for a weight's type, dtype or shape and to
    change it in place is no reading.
    """
    methods = [name for name in dir(parent) if name.endswith("forward")]
    read, called = set[str](), set[str]()
    for name in methods:  # grows
        try:
            source = inspect.getsource(getattr(parent, name))
        except (OSError, TypeError):  # compiled, or without its file
            continue
        source = re.sub(r"#.*|isinstance\([^()]*\)", "", source)
        read |= set(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|data\.\w+_\())", source))
        called |= (calls := dict.fromkeys(re.findall(r"self\.(\w+)\(", source))).keys()
        methods += [each for each in calls if each not in methods and hasattr(parent, each)]
    return {name: name in called for name in sorted(read)}


def shared_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The modules that several modules have as a child, and the paths that lead to them."""
    paths = defaultdict(list)
    for path, parent in model.named_modules():
        for name, child in parent._modules.items():
            if child is not None:
                paths[child].append(f"{path}.{name}".removeprefix("."))
    return {child: found for child, found in paths.items() if len(found) > 1}


def refuse_shared(path: str, paths: list[str]) -> None:
    """Refuse to adapt a module that other modules run as well: they would run it without the adapter.

    `paths` are all that lead to the module, empty if there is one; `path` may be that of its parameter.
    """
    if others := [other for other in paths if not f"{path}.".startswith(f"{other}.")]:
        raise ValueError(
            f"{path}: expected a module at one place, found the same module at {others[0]}, where it would run "
            "without the adapter; give one of them a copy (copy.deepcopy), or leave it out with exclude_modules"
        )


class TargetParameters(BaseTuner):
    """The part of `CloverModel` that finds the parameters to adapt."""

    def _inject_parameters(
        self, peft_config: CloverConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adapt the parameters of `target_parameters`, and return their paths.

        Raises:
            ValueError: if a name matches no parameter, or the model's weights are going to be sharded.
        """
        wanted = sorted(peft_config.target_parameters or ())
        if wanted and (is_fsdp_enabled() or is_deepspeed_zero3_enabled()):
            raise ValueError(
                f"target_parameters={wanted}: expected whole experts, found FSDP or DeepSpeed's ZeRO-3, which shard "
                "them; train on one device or with DistributedDataParallel or ZeRO-2, or leave target_parameters out"
            )
        own = (path for path, _ in model.named_parameters() if ".clover_" not in path)
        paths = [".".join(part for part in path.split(".") if part != "base_layer") for path in own]
        found: set[str] = set()
        for name in wanted:
            matched = {path for path in paths if find_suffix(path, [name])}
            if not matched:
                raise ValueError(
                    "target_parameters: expected names such as 'experts.gate_up_proj', which end the path of a "
                    f"parameter, found {name!r}, which ends none; correct it or leave it out (quantised experts may "
                    "have other names)"
                )
            config = replace(peft_config, target_modules={name})  # for its layers and exclusions
            found |= {path for path in matched if check_target_module_exists(config, path) is True}
        for path in sorted(found):
            holder, _, parameter = path.rpartition(".")
            parent, _, child = holder.rpartition(".")
            target = outermost = model.get_submodule(holder)
            while isinstance(target, CloverExperts) and target.base_weight.parameter != parameter:
                target = target.base_layer
            target = target if isinstance(target, CloverExperts) else outermost
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(
                    peft_config=peft_config,
                    adapter_name=adapter_name,
                    target=target,
                    target_name=child,
                    parent=model.get_submodule(parent),
                    current_key=path,
                    parameter_name=parameter,
                )
        return sorted(found)

    def _check_experts(self, config: CloverConfig, is_new: bool) -> None:
        """Refuse a target module that is a stack of experts' weights: each stack is one parameter, not a module.

        A name that is also a projection's, such as that of a shared expert, adapts the projections alone. For a new
        adapter this is a warning.
        """
        names = sorted(config.target_modules) if isinstance(config.target_modules, set) else []
        modules = [path for path, module in self.model.named_modules() if is_projection(base_of(module))]
        left_out: dict[str, str] = {}
        own = ((path, parameter) for path, parameter in self.model.named_parameters() if ".clover_" not in path)
        for path, parameter in own:
            path = ".".join(part for part in path.split(".") if part != "base_layer")
            shape, found = whole_shape(parameter), [name for name in names if path.endswith("." + name)]
            if len(shape) <= 2 or not found or find_suffix(path, config.target_parameters or ()):
                continue
            name = found[0]
            remedy = f"pass target_parameters={[name if '.' in name else f'experts.{name}']} to adapt it"
            if not any(find_suffix(module, found) for module in modules):
                raise ValueError(
                    f"{path}: expected a linear projection, found a stack of {shape[0]} experts' weights of "
                    f"shape {shape[1:]}; leave it out of target_modules, and {remedy}"
                )
            left_out.setdefault(name, f"{name} is also {path}, a stack of experts' weights, and is left out; {remedy}")
        if left_out and is_new:
            warn(f"target_modules: {'; '.join(left_out.values())}")

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return file_key(super()._remove_adapter_name_from_key(key, adapter_name))
