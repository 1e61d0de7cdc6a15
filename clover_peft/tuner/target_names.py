"""The names in `target_modules`: each should be that of a module."""

from __future__ import annotations

import difflib

from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from ..base_model.families import find_suffix
from ..base_model.weight import base_of, is_projection
from ..io.user_warning import warn


def check_names(model: nn.Module, target_modules: object) -> None:
    """Warn of names that no module has; they may be misspelt.

    Args:
        model: the bare model.
        target_modules: a set of names or ends of paths; anything else is passed over.

    Raises:
        NoMatchingPeftModuleError: if no module has any of the names.
    """
    names = {name for name in target_modules if name} if isinstance(target_modules, set) else set()
    paths = [path for path, _ in model.named_modules() if path]
    unknown = sorted(name for name in names if not any(find_suffix(path, [name]) for path in paths))
    if not unknown:
        return
    modules = (path for path, module in model.named_modules() if is_projection(base_of(module)))
    known = sorted({path.rpartition(".")[2] for path in modules})
    near = {name: difflib.get_close_matches(name.rpartition(".")[2], known, n=2) for name in unknown}
    guesses = "; ".join(f"{name}: did you mean {' or '.join(found)}?" for name, found in near.items() if found)
    remedy = guesses or f"its linear modules are called {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"
    if len(unknown) == len(names):
        raise NoMatchingPeftModuleError(f"Target modules {set(unknown)} not found in the base model; {remedy}")
    warn(f"target_modules: no module is called {', '.join(unknown)}, the others are adapted; {remedy}")
