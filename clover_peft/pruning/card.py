"""The README.md beside a pruned model: how to load it, and what was done to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from .._version import __version__
from ..io import cards
from .narrow.loading import read_record
from .report import PruningReport

_REGISTER = "import clover_peft  # lets transformers make the heads narrow; needed before loading\n"


def needs_import(model: Any) -> bool:
    """Whether `clover_peft` has to be imported to load a model: not one that its own class describes."""
    return bool((read_record(model) or {}).get("blocks"))


def write_card(
    folder: Path, model: Any, report: PruningReport, base: str, license_name: str, calibration: str | None
) -> None:
    """Writes `folder/README.md`.

    Args:
        folder: where the model was saved.
        model: the pruned model.
        report: from `prune`.
        base: name of the model before.
        license_name: its licence, "not stated" where that is so.
        calibration: one line on the data; None without any.
    """
    kind = type(model).__name__
    importing = _REGISTER if needs_import(model) else ""
    versions = {"clover_peft": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    cards.write_card(
        folder,
        title=f"{base}, pruned",
        base=base,
        library="transformers",
        tags=["pruning", "clover_peft"],
        code=f'{importing}from transformers import {kind}\n\nmodel = {kind}.from_pretrained("<this folder>")',
        text=f"{_needs(model, report)}\n\n{report.summary()}",
        facts={
            "base model": f"{base}, licence: {license_name}",
            "calibrated with": calibration or "nothing: directions by weights alone",
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        },
        ending="Ranks of all heads are in pruning.json. The licence of the base model applies; the weights here carry "
        "no licence of their own.",
    )


def _needs(model: Any, report: PruningReport) -> str:
    if report.masked:
        return "Directions are zeroed and all sizes are as they were: for analysis, nothing is smaller."
    if needs_import(model):
        return (
            "Heads have other widths than the model's class gives them: without `import clover_peft` transformers "
            "finds weights of unexpected sizes. Servers with model code of their own, such as vLLM, cannot load it."
        )
    return "Its own class describes the narrower heads: stock transformers loads it, and what serves that class."
