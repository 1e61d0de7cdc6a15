"""The entry point of the `clover` command.

It lies outside of the package because importing the package imports torch, peft and transformers, which takes seconds.
`clover --help`, `clover prune --help` and errors in the options or in a configuration need none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec, module_from_spec


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        arguments: those after `clover`; None: those of the process.

    Returns:
        The exit code.
    """
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
