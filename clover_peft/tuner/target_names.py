"""The names in `target_modules` and `exclude_modules`: each should be that of a module, which the model calls."""

from __future__ import annotations

import difflib
import inspect
import re

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


def refuse_bypassed(parent: nn.Module, path: str) -> None:
    """Refuse a projection whose weight a state-space layer reads itself, past the module and so past an adapter.

    Transformers' Mamba layers hand such weights to kernels, on a GPU or in every forward pass.

    Args:
        parent: the layer that holds the projection.
        path: of the projection.

    Raises:
        ValueError: naming the projection.
    """
    name = path.rpartition(".")[2]
    if not hasattr(parent, "conv1d"):  # only layers with a convolution beside the projections do so
        return
    reads = re.compile(rf"self\.{re.escape(name)}\.weight\b(?!\.(dtype|device|shape))")
    for method in [attribute for attribute in dir(type(parent)) if attribute.endswith("forward")]:
        try:
            source = inspect.getsource(getattr(type(parent), method))
        except (OSError, TypeError):  # compiled, or without its file
            continue
        if reads.search(source):
            raise ValueError(
                f"{path}: expected a module that the model calls, found that {type(parent).__name__}.{method} reads "
                f"its weight past it, so that an adapter would be skipped; pass exclude_modules=[{name!r}]"
            )


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
