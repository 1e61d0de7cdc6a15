"""The README.md beside a converted or sliced model: how to load and serve it, and how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from .._version import __version__
from ..io import cards
from ..io.hub_models import ModelSource
from .report import ConversionReport
from .slicing_report import SlicingReport

_REGISTER = "import clover_peft  # needed before loading: lets transformers make the narrow layers\n"
_ENDINGS = {
    ConversionReport: "`convert.json` has the frequencies and the error of every layer.",
    SlicingReport: "`slicing.json` has the energy that every block kept.",
}


def write_card(
    folder: Path,
    model: Any,
    report: ConversionReport | SlicingReport,
    pruned: str | None,
    source: ModelSource,
    calibration: str,
    *,
    needs_import: bool,
) -> None:
    """Write `folder/README.md`.

    Args:
        folder: where the model was saved.
        model: the new model.
        report: from `convert_to_mla` or `slice_hidden_size`.
        pruned: summary of a pruning that followed; None without one.
        source: the original model.
        calibration: one line that describes the data.
        needs_import: whether the folder loads after `import clover_peft` alone.
    """
    kind = type(model).__name__
    versions = {"clover_peft": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    latent = isinstance(report, ConversionReport)
    needs = (
        "Without `import clover_peft`, transformers finds weights of unexpected sizes. Servers with their own model "
        "code, such as vLLM, cannot load it."
        if needs_import
        else "Stock transformers loads it, without `clover_peft`."
    )
    importing = _REGISTER if needs_import else ""
    cards.write_card(
        folder,
        title=f"{source.name} with latent attention" if latent else f"{source.name}, sliced",
        base=source.name,
        library="transformers",
        tags=["multi-head-latent-attention" if latent else "slicing", "clover_peft"],
        code=f'{importing}from transformers import {kind}\n\nmodel = {kind}.from_pretrained("<this folder>")',
        text="\n\n".join(
            [
                f"{needs} {_servers(model, report)}" if isinstance(report, ConversionReport) else needs,
                report.summary(),
                *([pruned] if pruned else []),
            ]
        ),
        facts={
            "base model": source.describe(),
            "calibrated with": calibration,
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        },
        ending=f"{_ENDINGS[type(report)]} The model was not trained after the change. The licence of the base model "
        "applies; these weights have no other licence.",
    )


def _servers(model: Any, report: ConversionReport) -> str:
    in_the_way = [
        *(["its rotary frequencies are a list (`longrope`)"] if report.rope_type != "default" else []),
        *(["it has biases"] if model.config.attention_bias else []),
    ]
    if in_the_way:
        return (
            f"vLLM's own class for it does not apply, because {' and '.join(in_the_way)}: pass "
            "`model_impl=transformers`."
        )
    return "vLLM's own class fits."
