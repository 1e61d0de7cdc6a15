"""`clover prune`: makes the attention heads of a saved model narrower."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..base_model.plain import check_unquantised
from ..convert.stock import check_stock, save_stock
from ..io.atomic import new_folder
from ..io.figures import find_pyplot
from ..io.hub_models import announce_model, load_as_saved
from ..pruning import PruningReport, prune
from ..pruning.card import needs_import, write_card
from . import checks, parsers
from . import pruning_options as options
from .errors import reports_errors


@reports_errors(TypeError)
def run(given: argparse.Namespace) -> int:
    model, report = _prune(given)
    print(report.summary())
    for kind, reason in report.skipped.items():
        print(f"{kind}: not pruned, {reason}")
    how = "after `import clover_peft`" if needs_import(model) and not given.stock else "with stock transformers"
    print(f"{given.out}: {report.seconds:.1f} s; load it {how}")
    if report.masked:
        print("masked: directions are zeroed and no size is changed, for analysis")
    return 0


def _prune(given: argparse.Namespace) -> tuple[Any, PruningReport]:
    out: Path = given.out
    checks.prune(given)
    figures = {name: checks.figures(f"--{name}", getattr(given, name)) for name in ("ratio", "threshold", "energy")}
    if not given.no_pictures:
        find_pyplot()
    source = announce_model(given.model)
    model, processor = load_as_saved(source, given.model_class)
    check_unquantised(model, source.name)
    if given.stock:
        check_stock(model)
    batches, data = options.calibration(given, model, processor)
    report = prune(
        model,
        **figures,
        method=given.method,
        calibration=batches,
        ranks=given.ranks,
        multiple=given.multiple,
        masked=given.masked,
        target_modules=options.target_modules(given),
    )
    if not given.stock:
        _check_loads(model, given.masked)
    with new_folder(out) as folder:
        if given.stock:
            save_stock(model, folder)
        else:
            model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        report.save(folder / "pruning.json")
        if not given.no_pictures:
            report.plot(folder / "pruning.png")
        write_card(folder, model, report, source, data, stock=given.stock)
    return model, report


def _check_loads(model: Any, masked: bool) -> None:
    """Raises ValueError if the model's class would not make all tensors, with their shapes, from its configuration."""
    with torch.device("meta"):
        made = {name: tensor.shape for name, tensor in type(model)(copy.deepcopy(model.config)).state_dict().items()}
    for name, tensor in model.state_dict().items():
        if made.get(name) == tensor.shape:
            continue
        if masked:
            raise ValueError(
                f"--masked: {name} holds the mean of what was removed, and {type(model).__name__} has no such bias, "
                "so that the folder would not load as it is; leave --masked out, or mask in Python"
            )
        found = "none" if name not in made else list(made[name])
        raise ValueError(
            f"{name}: expected a tensor of shape {list(tensor.shape)} when the folder is loaded, found {found}; the "
            "model was not saved, please report this with the command"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parsers.prune(arguments))
