"""Finds the subcommand that the command line names, parses its arguments, and runs it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from .._version import __version__
from ..io.extras import missing
from ..io.user_warning import ignore_old_names
from . import parsers
from .checks import CHECKS
from .errors import USER_ERROR, reports_errors


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        help: one line.
        packages: those of an extra that it always imports.
    """

    help: str
    packages: tuple[str, ...] = ()


COMMANDS = {
    "sft": Command("fine-tune a language model on instruction data with TRL", ("trl", "datasets")),
    "prune": Command("make attention heads narrower along their singular directions"),
    "spectra": Command("show what attention heads would lose to pruning"),
    "convert": Command("give a model latent attention, or a smaller hidden size"),
    "export": Command("merge an adapter into its base model, or approximate it by LoRAs"),
    "plan": Command("count an adapter's parameters and bytes without loading weights"),
    "evaluate": Command("ask a model the questions of the commonsense suite"),
    "ablate": Command("compare methods over learning rates and seeds", ("trl", "datasets")),
    "analyze": Command("measure what fine-tuning did to the weights"),
    "prepare-data": Command("build the commonsense suite's training and test rows"),
    "run": Command("run a Python program in which CLOVER is registered with peft"),
}


def parse(arguments: Sequence[str] | None = None) -> tuple[str, argparse.Namespace]:
    """Parses a command line without importing torch.

    Args:
        arguments: those after `clover`; None: those of the process.

    Returns:
        The subcommand's name, and its parsed arguments.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="clover",
        usage="clover COMMAND ...",
        description="Fine-tune and prune attention with CLOVER (arXiv 2411.17426).",
        epilog="\n".join(
            [
                "commands:",
                *(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()),
                "",
                "`clover COMMAND --help` lists a command's options.",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    name = parser.parse_args(arguments[:1]).command
    return name, parsers.PARSERS[name](arguments[1:])


def check(name: str, given: argparse.Namespace) -> int:
    """Checks a command line as far as that takes no heavy import.

    Returns:
        0, or the exit code after an error has been printed.
    """
    for package in COMMANDS[name].packages:
        if find_spec(package) is None:
            print(f"error: clover {name}: {missing(package)}", file=sys.stderr)
            return USER_ERROR

    @reports_errors()
    def checked(given: argparse.Namespace) -> int:
        if name in CHECKS:
            CHECKS[name](given)
        return 0

    return checked(given)


def run(name: str, given: argparse.Namespace) -> int:
    """Runs a subcommand.

    Returns:
        The exit code of the process.
    """
    if name != "run":  # the program's warnings are its own
        ignore_old_names()
    code: int = importlib.import_module(f".{name.replace('-', '_')}", __package__).run(given)
    return code
