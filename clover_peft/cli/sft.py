"""`clover sft`: fine-tunes a language model with TRL."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from accelerate import PartialState

from ..experiments.training import arguments as settings
from ..experiments.training.run import run as train
from . import checks, parsers
from .errors import reports_errors


@reports_errors()
def run(given: argparse.Namespace) -> int:
    checks.sft(given)
    train(settings.parse(given.config, given.overrides))
    # A process that ends with a group open aborts now and then, and fails the launch although all is saved.
    PartialState().destroy_process_group()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parsers.sft(arguments))
