"""`clover convert`: saves a model in another stock class that servers load without this package."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..convert import ConversionReport, convert_to_mla
from ..convert.card import write_card
from ..io.figures import find_pyplot
from ..io.hub_models import find_model, load_as_saved
from ..pruning import PruningReport, prune
from . import checks, parsers
from . import pruning_options as options
from .errors import reports_errors


@reports_errors(TypeError)
def run(given: argparse.Namespace) -> int:
    out: Path = given.out
    checks.convert(given)
    if not given.no_pictures:
        find_pyplot()
    source = find_model(given.model)
    model, processor = load_as_saved(source, given.model_class)
    batches, data = options.calibration(given, model, processor)
    result, converted = _convert(given, model, batches)
    del model
    pruned = _prune(given, result, batches)
    result.save_pretrained(out)
    if processor is not None:
        processor.save_pretrained(out)
    reports: dict[str, ConversionReport | PruningReport | None] = {"convert": converted, "pruning": pruned}
    for name, report in reports.items():
        if report is not None:
            print(report.summary())
            report.save(out / f"{name}.json")
            if not given.no_pictures:
                report.plot(out / f"{name}.png")
    write_card(out, result, converted, pruned.summary() if pruned else None, source.name, source.license, str(data))
    print(f"{out}: {sum(converted.seconds.values()):.1f} s; load it with stock transformers")
    return 0


def _convert(
    given: argparse.Namespace, model: Any, batches: Sequence[Mapping[str, Any]] | None
) -> tuple[Any, ConversionReport]:
    return convert_to_mla(
        model,
        batches or [],
        rope_dims=given.rope_dims,
        kv_lora_rank=given.kv_lora_rank,
        cache_reduction=given.mla or None,
        method=given.method,
    )


def _prune(
    given: argparse.Namespace, result: Any, batches: Sequence[Mapping[str, Any]] | None
) -> PruningReport | None:
    """Prune the heads of the result, where that was asked for; uniform ranks keep its stock class."""
    if given.prune is None:
        return None
    return prune(result, given.prune, ranks="uniform", multiple=given.multiple, calibration=batches)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parsers.convert(arguments))
