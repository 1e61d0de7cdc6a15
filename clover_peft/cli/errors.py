"""How a subcommand reports errors that a user can correct."""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable

from ..io.extras import EXTRAS, how_to_install, missing

Run = Callable[[argparse.Namespace], int]


USER_ERROR = 2  # the exit code, as argparse's


def reports_errors(*more: type[Exception]) -> Callable[[Run], Run]:
    """Makes a subcommand print such an error as one sentence and return 2; any other keeps its traceback.

    Args:
        more: kinds of errors that this subcommand's user can correct, besides ValueError, OSError and ImportError.
    """

    kinds: tuple[type[Exception], ...] = (ValueError, OSError, ImportError, *more)

    def decorate(run: Run) -> Run:
        @functools.wraps(run)
        def reporting(given: argparse.Namespace) -> int:
            try:
                return run(given)
            except kinds as error:
                print(f"error: {_sentence(error)}", file=sys.stderr)
                return USER_ERROR

        return reporting

    return decorate


def _sentence(error: Exception) -> str:
    sentence = " ".join(str(error).split())
    if not isinstance(error, ImportError) or any(how_to_install(extra) in sentence for extra in EXTRAS.values()):
        return sentence
    if error.name in EXTRAS:
        return missing(error.name)
    # Raised by a library that names the package in its text alone, as transformers does.
    named = next((package for package in EXTRAS if re.search(rf"\b{package}\b", sentence)), None)
    return f"{sentence}; {missing(named)}" if named else sentence
