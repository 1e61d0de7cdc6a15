"""The names in `target_modules` and `exclude_modules`: each should be that of a module, which the model calls."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from ..base_model.families import find_suffix
from ..base_model.weight import base_of, is_projection
from ..io.user_warning import warn


def check_names(model: nn.Module, target_modules: object, exclude_modules: object = None) -> None:
    """Warn of names that no module has; they may be misspelt.

    Args:
        model: the bare model.
        target_modules: a set of names or ends of paths; anything else is passed over.
        exclude_modules: the same.

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


# Classes that read a weight in a branch alone -> whether a module of theirs may take it.
_BRANCHES: dict[str, Callable[[Any], bool]] = {
    "BloomAttention": lambda module: module.pretraining_tp > 1 and module.slow_but_exact,
    "BloomMLP": lambda module: module.pretraining_tp > 1 and module.slow_but_exact,
    "DisentangledSelfAttention": lambda module: False,  # DeBERTa's, which passes no query states
    "TransformerEncoderLayer": lambda module: torch.backends.mha.get_fastpath_enabled(),
}


def refuse_bypassed(parent: nn.Module, path: str) -> None:
    """Refuse a projection whose weight its parent reads itself, past the module and so past an adapter.

    State-space layers hand such weights to kernels; WavLM and `nn.MultiheadAttention` hand them to a function.

    Args:
        parent: the layer that holds the projection.
        path: of the projection.

    Raises:
        ValueError: naming the projection.
    """
    *_, holder, name = ("", *path.split("."))
    class_: Any = type(parent)
    branches = [_BRANCHES[each.__name__] for each in class_.__mro__ if each.__name__ in _BRANCHES]
    if name not in (found := _read(class_)) or (branches and not branches[0](parent)):
        return
    place = "" if holder.isdigit() or not holder else f"{holder}."
    remedy = f"pass exclude_modules={[place + each for each in found]}"
    if isinstance(parent, nn.TransformerEncoderLayer):
        remedy = "call torch.backends.mha.set_fastpath_enabled(False) before this, in every process"
    raise ValueError(
        f"{path}: expected a module that the model calls, found that {class_.__name__} reads its weight past it, so "
        f"that an adapter would be skipped; {remedy}"
    )


@cache
def _read(parent: type[nn.Module]) -> list[str]:
    """The attributes whose weights a class of modules reads in its forward methods, and in those that they call.

    To ask for a weight's type, dtype or shape and to change it in place is no reading.
    """
    methods = [name for name in dir(parent) if name.endswith("forward")]
    found: dict[str, None] = {}
    for name in methods:  # grows
        try:
            source = inspect.getsource(getattr(parent, name))
        except (OSError, TypeError):  # compiled, or without its file
            continue
        source = re.sub(r"#.*|isinstance\([^()]*\)", "", source)
        found |= dict.fromkeys(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|data\.\w+_\())", source))
        called = re.findall(r"self\.(\w+)\(", source)
        methods += [each for each in dict.fromkeys(called) if each not in methods and hasattr(parent, each)]
    return list(found)


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
