"""How a subcommand reports errors that a user can correct."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable

# Package -> the extra that installs it.
EXTRAS = {
    **dict.fromkeys(("trl", "datasets", "pyarrow", "gguf"), "train"),
    "matplotlib": "plots",
    "bitsandbytes": "quant",
}
Run = Callable[[argparse.Namespace], int]


def reports_errors(*more: type[Exception], status: int = 1) -> Callable[[Run], Run]:
    """Makes a subcommand print such an error as one sentence and return `status`; any other keeps its traceback.

    Args:
        more: kinds of errors that this subcommand's user can correct, besides ValueError, OSError and ImportError.
        status: the exit code.
    """

    kinds: tuple[type[Exception], ...] = (ValueError, OSError, ImportError, *more)

    def decorate(run: Run) -> Run:
        @functools.wraps(run)
        def reporting(given: argparse.Namespace) -> int:
            try:
                return run(given)
            except kinds as error:
                sentence = " ".join(str(error).split())
                if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
                    sentence = missing(error.name)
                print(f"error: {sentence}", file=sys.stderr)
                return status

        return reporting

    return decorate


def missing(package: str) -> str:
    """The sentence that names a package which is not installed, and the extra that it belongs to."""
    return f'expected the package {package}, found none; pip install "clover-peft[{EXTRAS[package]}]"'
