"""`python -m clover_peft` imports the package, and torch with it, before `__main__` runs.

What the command sets before torch is imported is therefore set here, and only in that case.
"""

from __future__ import annotations

import sys


def runs_as_command() -> bool:
    """Whether this import is that of `python -m clover_peft`: until a module runs, its `sys.argv[0]` is "-m"."""
    arguments = getattr(sys, "argv", [])
    if arguments[:1] != ["-m"] or len(sys.orig_argv) <= len(arguments):
        return False
    return sys.orig_argv[-len(arguments)].removeprefix("-m") == __package__


if runs_as_command():
    import clover_command

    clover_command.let_threads_sleep()
