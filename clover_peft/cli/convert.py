"""`clover convert`: saves a model with latent attention, or with a smaller hidden size."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..convert import ConversionReport, SlicingReport, convert_to_mla, slice_hidden_size
from ..convert.card import write_card
from ..io.atomic import new_folder
from ..io.figures import find_pyplot
from ..io.hub_models import announce_model, load_as_saved
from ..pruning import PruningReport, prune
from ..pruning.card import needs_import
from . import checks, parsers
from . import pruning_options as options
from .errors import reports_errors

Batches = Sequence[Mapping[str, Any]]


@reports_errors(TypeError)
def run(given: argparse.Namespace) -> int:
    out: Path = given.out
    checks.convert(given)
    if not given.no_pictures:
        find_pyplot()
    source = announce_model(given.model)
    model, processor = load_as_saved(source, given.model_class, given.dtype)
    batches, data = options.calibration(given, model, processor)
    result, converted, seconds = _convert(given, model, batches or [])
    del model
    pruned = _prune(given, result, batches or [])
    imports = needs_import(result) or (isinstance(converted, SlicingReport) and not converted.stock)
    with new_folder(out) as folder:
        result.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        first = "convert" if isinstance(converted, ConversionReport) else "slicing"
        for name, report in {first: converted, "pruning": pruned}.items():
            if report is None:
                continue
            print(report.summary())
            report.save(folder / f"{name}.json")
            if not given.no_pictures and not isinstance(report, SlicingReport):
                report.plot(folder / f"{name}.png")
        summary = pruned.summary() if pruned else None
        write_card(folder, result, converted, summary, source, str(data), needs_import=imports)
    how = "after `import clover_peft`" if imports else "with stock transformers"
    print(f"{out}: {seconds:.1f} s; load it {how}")
    return 0


def _convert(
    given: argparse.Namespace, model: Any, batches: Batches
) -> tuple[Any, ConversionReport | SlicingReport, float]:
    """The new model, its report, and the seconds that it took."""
    if given.slice is not None:
        sizes = {} if given.multiple is None else {"multiple": given.multiple}
        sliced = slice_hidden_size(model, given.slice, batches, rotation=given.rotation or "per_block", **sizes)
        return model, sliced, sliced.seconds
    result, converted = convert_to_mla(
        model,
        batches,
        rope_dims=given.rope_dims,
        kv_lora_rank=given.kv_lora_rank,
        cache_reduction=given.mla or None,
        method=given.method or "clover",
        release=True,
    )
    return result, converted, sum(converted.seconds.values())


def _prune(given: argparse.Namespace, result: Any, batches: Batches) -> PruningReport | None:
    """Prune the heads of the result, where that was asked for; uniform ranks keep its stock class."""
    if given.prune is None:
        return None
    return prune(result, given.prune, ranks="uniform", multiple=given.multiple or 1, calibration=batches)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parsers.convert(arguments))
