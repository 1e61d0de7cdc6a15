"""What the parsers of several subcommands share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def new_parser(command: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"clover {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a shortened option could be meant as a key, or as another option
    )


def expanded(text: str) -> str:
    """A path, or a name on the hub, with the home folder for `~`, which a shell leaves in quotes and behind `=`."""
    return os.path.expanduser(text)


def path(text: str) -> Path:
    return Path(expanded(text))


def add_model_class(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-class",
        metavar="CLASS",
        help="class of transformers, such as WhisperForConditionalGeneration; by default the one that the adapter or "
        "the model's config.json names",
    )


def add_latent(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose the sizes of latent attention, besides --mla itself."""
    parser.add_argument(
        "--rope-dims",
        type=int,
        help="dimensions of the rotary key; by default a head's, if they are at most 0.6 of the cache",
    )
    parser.add_argument("--kv-lora-rank", type=int, help="dimensions of the latent")
    parser.add_argument(
        "--method", choices=["clover", "transmla"], help="of --mla: transmla is the published baseline"
    )


def add_model_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the weights; by default the one they were saved in"
    )


def add_windows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, help="windows of calibration text, at most; 64 by default")
    parser.add_argument("--max-length", type=int, help="tokens of a window; by default 512, or the model's limit")
    parser.add_argument("--batch-size", type=int, help="windows at a time, 8 by default")


def add_calibration(parser: argparse.ArgumentParser, pairs: bool = True, own_text: bool = True) -> None:
    """Adds the options that choose calibration data and, with `pairs`, the pairs to prune."""
    parser.add_argument(
        "--calibration",
        type=expanded,
        metavar="TEXT",
        help="a .txt or .jsonl file, .gz too, or a data set on the hub (name or name:configuration); rows have text, "
        "content, messages, prompt and completion, or instruction and output",
    )
    add_windows(parser)
    if own_text:
        parser.add_argument(
            "--own-text",
            type=int,
            metavar="ROWS",
            help="windows of 256 tokens that the model writes itself, such as 60, beside --calibration or in its "
            "place; they stand for kinds of text that you do not have (causal language models alone)",
        )
    if not pairs:
        return
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="which pairs: ends of the paths of key or value projections, or one regular expression for whole paths",
    )
