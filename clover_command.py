"""The entry point of the `clover` command.

It lies outside of the package because importing the package imports torch, peft and transformers, which takes seconds.
`clover --help`, `clover prune --help` and errors in the options or in a configuration need none of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec, module_from_spec


def let_threads_sleep() -> None:
    """Lets OpenMP's threads sleep while they wait; to be called before torch is imported, which reads the variable.

    On a shared machine, threads that spin while they wait make a step over ten times slower. A value that the user has
    set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        arguments: those after `clover`; None: those of the process.

    Returns:
        The exit code.
    """
    let_threads_sleep()
    spec = None
    try:
        if "clover_peft" not in sys.modules:
            spec = find_spec("clover_peft")
            assert spec is not None
            assert spec.loader is not None
            # The package as importing it would make it, but its `__init__` has not run: its modules can be imported.
            sys.modules[spec.name] = module_from_spec(spec)
        from clover_peft.cli.command import check, parse, run

        name, given = parse(arguments)
        if code := check(name, given):
            return code
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module(sys.modules[spec.name])
        return run(name, given)
    except KeyboardInterrupt:
        return 130  # as a shell reports it
