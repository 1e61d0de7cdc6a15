"""The README.md beside a converted model: how to load and serve it, and how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from .._version import __version__
from ..io import cards
from .report import ConversionReport


def write_card(
    folder: Path,
    model: Any,
    report: ConversionReport,
    pruned: str | None,
    base: str,
    license_name: str,
    calibration: str,
) -> None:
    """Write `folder/README.md`.

    Args:
        folder: where the model was saved.
        model: the converted model.
        report: from `convert_to_mla`.
        pruned: summary of a pruning that followed; None without one.
        base: name of the original model.
        license_name: its licence, or "not stated".
        calibration: one line that describes the data.
    """
    kind = type(model).__name__
    versions = {"clover_peft": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    cards.write_card(
        folder,
        title=f"{base} with latent attention",
        base=base,
        library="transformers",
        tags=["multi-head-latent-attention", "clover_peft"],
        code=f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("<this folder>")',
        text="\n\n".join([_needs(model, report), report.summary(), *([pruned] if pruned else [])]),
        facts={
            "base model": f"{base}, licence: {license_name}",
            "calibrated with": calibration,
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        },
        ending="`convert.json` has the frequencies and the error of every layer. The model was not trained after the "
        "conversion. The licence of the base model applies; these weights have no other licence.",
    )


def _needs(model: Any, report: ConversionReport) -> str:
    in_the_way = [
        *(["its rotary frequencies are a list (`longrope`)"] if report.rope_type != "default" else []),
        *(["it has biases"] if model.config.attention_bias else []),
    ]
    native = (
        f"vLLM's own class for it does not apply, because {' and '.join(in_the_way)}: pass `model_impl=transformers`."
        if in_the_way
        else "vLLM's own class fits."
    )
    return f"Stock transformers loads it, without `clover_peft`. {native}"
