"""Warnings that point at the user's own line, and foreign ones that no user of a command can heed."""

from __future__ import annotations

import sys
import warnings

# Packages between this one and the user: they call it, and their decorators add frames.
_BETWEEN = {
    __name__.partition(".")[0],
    "torch",
    "peft",
    "transformers",
    "accelerate",
    "trl",
    "contextlib",
    "dataclasses",
}


def warn(message: str) -> None:
    """As `warnings.warn`, from the first caller outside of this package and the libraries that call it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def ignore_old_names() -> None:
    """Ignore what transformers says of a name that peft and TRL still use. For commands: in a library, it is yours."""
    message = "`is_gradient_checkpointing` is deprecated"
    warnings.filterwarnings("ignore", message=message, category=FutureWarning)
