"""What a CLOVER adapter takes from data before it is trained: bases, the start of the low-rank part, and scales."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ... import balance_updates, initialize_from_activations, initialize_from_contrast, own_text
from .job_arguments import JobArguments
from .trainer import Trainer


def initialize(trainer: Trainer, job: JobArguments, say: Callable[[str], None]) -> float:
    """Initialise the trainer's new adapter as the job's keys say.

    Returns:
        The seconds that it took.
    """
    started, model = time.perf_counter(), trainer.model
    calibration, contrast = (_rows(trainer, count) for count in (job.calibration_rows, job.contrast_rows))
    written: list[dict[str, Tensor]] = []
    if count := max(job.own_text_rows, job.contrast_rows):
        say(f"the model writes {count} texts")
        with model.disable_adapter():  # the base's text, also where the adapter truncates, in 0.6 of the time
            written = own_text(model, rows=count, seed=trainer.args.seed)
    if job.calibration_rows or job.own_text_rows:
        say(f"making bases from {f'{len(calibration)} training rows' if calibration else 'these texts'}")
        initialize_from_activations(model, calibration or written)
    if job.contrast_rows:
        say(f"pointing the low-rank part at what {len(contrast)} training rows have and these texts have not")
        initialize_from_contrast(model, contrast, written)
    if job.balance_updates:
        say(f"balancing the updates by {job.balance_updates} batches of training rows")
        balance_updates(model, _batches(trainer, job.balance_updates))
    return time.perf_counter() - started


def _rows(trainer: Trainer, count: int) -> list[dict[str, Tensor]]:
    """The first training rows, each a batch without padding."""
    rows = trainer.train_dataset.select(range(min(count, len(trainer.train_dataset))))
    return [{"input_ids": torch.tensor([row["input_ids"]])} for row in rows]


def _batches(trainer: Trainer, count: int) -> Iterator[dict[str, Any]]:
    """The first training rows, collated as for training."""
    size = trainer.args.per_device_train_batch_size
    rows = trainer.train_dataset.select(range(min(count * size, len(trainer.train_dataset))))
    for start in range(0, len(rows), size):
        yield trainer.data_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
