"""What `clover prune` and `clover spectra` read from their shared options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base_model.own_text import own_text
from ..io.text_windows import DEFAULT_BATCH, batches_for, without_outputs

_HELD_OUT = 8  # windows to measure on


def calibration(
    given: argparse.Namespace, model: Any, processor: Any
) -> tuple[list[dict[str, Any]] | None, str | None]:
    """Reads or has the model write the calibration data, and describes them in a line; both are None without any.

    Args:
        given: parsed options.
        model: the model.
        processor: its tokenizer, or a processor that has one, or None.

    Raises:
        ValueError: see `text_windows.batches_for` and `own_text`.
    """
    batches, described = list[dict[str, Any]](), list[str]()
    tokenizer = getattr(processor, "tokenizer", processor)
    sizes = {"rows": given.rows, "max_length": given.max_length, "batch_size": given.batch_size}
    chosen = {name: size for name, size in sizes.items() if size is not None}
    if given.calibration is not None:
        batches += batches_for(model, tokenizer, given.calibration, **chosen)
        rows, length = sum(len(batch["input_ids"]) for batch in batches), batches[0]["input_ids"].shape[1]
        name = Path(given.calibration).name if Path(given.calibration).exists() else given.calibration
        described.append(f"{rows} windows of {length} tokens from {name}")
    if own := getattr(given, "own_text", None):  # `clover spectra` has no such option
        written = own_text(model, rows=own, batch_size=given.batch_size or DEFAULT_BATCH)
        batches += [{**batch, **without_outputs(model)} for batch in written]
        described.append(f"{own} windows of {written[0]['input_ids'].shape[1]} tokens that the model wrote")
    if not batches:
        return None, None
    data = " and ".join(described)
    print(f"calibration: {data}", flush=True)
    return batches, data


def held_out(
    given: argparse.Namespace, model: Any, processor: Any, batches: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Windows of the same text that are not among the calibration's, on the model's device; none in a short text."""
    known = {tuple(window) for batch in batches for window in batch["input_ids"].tolist()}
    tokenizer = getattr(processor, "tokenizer", processor)
    length = batches[0]["input_ids"].shape[1]
    # Windows of one length begin at multiples of it, so two of them are the same or do not overlap.
    more = batches_for(
        model, tokenizer, given.calibration, rows=2 * len(known) + _HELD_OUT, max_length=length, batch_size=1
    )
    new = [batch for batch in more if tuple(batch["input_ids"][0].tolist()) not in known][:_HELD_OUT]
    return [
        {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        for batch in new
    ]


def target_modules(given: argparse.Namespace) -> str | list[str] | None:
    """`--target-modules` as `prune` takes it: text for a regular expression, a list for ends of paths."""
    names: list[str] | None = given.target_modules
    if names and len(names) == 1 and not re.fullmatch(r"[\w.]+", names[0]):
        return names[0]
    return names
