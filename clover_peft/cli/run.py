"""`clover run`: runs a program that does not import clover_peft itself."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path


def run(given: argparse.Namespace) -> int:
    """Runs a script or a module as Python would: its errors keep their tracebacks, and its exits their codes."""
    name: str = given.program
    if not getattr(sys.flags, "safe_path", False):  # until now, the folder of the `clover` script
        sys.path[0] = os.getcwd() if given.module else str(Path(name).resolve().parent)
    if not (_can_run(name) if given.module else Path(name).exists()):
        expected = "a module that can be run" if given.module else "a script"
        remedy = "check the path, or pass -m to name a module"
        if given.module:
            remedy = "check the name, and that its package is installed in this environment"
        print(f"error: clover run {name}: expected {expected}, found none; {remedy}", file=sys.stderr)
        return 2
    sys.argv = [name, *given.arguments]
    if given.module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")
    return 0


def _can_run(module: str) -> bool:
    """Whether there is such a module; a package needs a `__main__`."""
    try:
        spec = find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{module}.__main__")
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):  # one of its packages
            return False
        raise
    return spec is not None
