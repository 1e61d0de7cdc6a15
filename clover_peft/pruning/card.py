"""The README.md beside a pruned model: how to load it, and how it was pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from .._version import __version__
from ..io import cards
from ..io.hub_models import ModelSource
from .narrow.loading import read_record
from .report import PruningReport

_REGISTER = "import clover_peft  # needed before loading: lets transformers make the heads narrow\n"
_STOCK = (
    "The model is saved as `MiMoV2FlashForCausalLM`, whose config has a width for values, so that stock transformers "
    "loads it. Its config lacks the keys that the classes of vLLM and SGLang read; `clover_peft.save_stock(..., "
    "hub_keys=True)` writes them."
)


def needs_import(model: Any) -> bool:
    """Whether `clover_peft` must be imported to load a model. A model that its own class describes needs no import."""
    return bool((read_record(model) or {}).get("blocks"))


def write_card(
    folder: Path,
    model: Any,
    report: PruningReport,
    source: ModelSource,
    calibration: str | None,
    *,
    stock: bool = False,
) -> None:
    """Write `folder/README.md`.

    Args:
        folder: where the model was saved.
        model: the pruned model.
        report: from `prune`.
        source: the unpruned model.
        calibration: one line that describes the data; None without data.
        stock: it was saved by `save_stock`.
    """
    kind = "AutoModelForCausalLM" if stock else type(model).__name__
    importing = _REGISTER if needs_import(model) and not stock else ""
    versions = {"clover_peft": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    cards.write_card(
        folder,
        title=f"{source.name}, pruned",
        base=source.name,
        library="transformers",
        tags=["pruning", "clover_peft"],
        code=f'{importing}from transformers import {kind}\n\nmodel = {kind}.from_pretrained("<this folder>")',
        text=f"{_STOCK if stock else _needs(model, report)}\n\n{report.summary()}",
        facts={
            "base model": source.describe(),
            "calibrated with": calibration or "no data: directions by weights alone",
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        },
        ending="`pruning.json` has the ranks of all heads. The licence of the base model applies; these weights have "
        "no other licence.",
    )


def _needs(model: Any, report: PruningReport) -> str:
    if report.masked:
        return "Directions are zeroed and all shapes are unchanged. This is for analysis: nothing is smaller."
    if needs_import(model):
        return (
            "The heads are narrower than the model's class makes them. Without `import clover_peft`, transformers "
            "finds weights of unexpected sizes. Servers with their own model code, such as vLLM, cannot load it."
        )
    return "The model's own class describes the narrower heads: stock transformers loads it, and so do servers for it."
