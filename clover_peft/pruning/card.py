"""The README.md beside a pruned model: how to load it, and what was done to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from .._version import __version__
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
    importing = _REGISTER if needs_import(model) else ""
    kind = type(model).__name__
    named = base if "/" in base else None  # a folder's name is none on the hub, or another model's
    card = ModelCardData(base_model=named, library_name="transformers", tags=["pruning", "clover_peft"])
    versions = f"clover_peft {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    text = f"""---
{card.to_yaml()}
---
# {base}, pruned

```python
{importing}from transformers import {kind}

model = {kind}.from_pretrained("<this folder>")
```

{_needs(model, report)}

{report.summary()}

| | |
| --- | --- |
| base model | {base}, licence: {license_name} |
| calibrated with | {calibration or "nothing: directions by weights alone"} |
| versions | {versions} |

Ranks of all heads are in pruning.json. The licence of the base model applies; the weights here carry no licence of
their own.
"""
    ModelCard(text).save(folder / "README.md")


def _needs(model: Any, report: PruningReport) -> str:
    if report.masked:
        return "Directions are zeroed and all sizes are as they were: for analysis, nothing is smaller."
    if needs_import(model):
        return (
            "Heads have other widths than the model's class gives them: without `import clover_peft` transformers "
            "finds weights of unexpected sizes. Servers with model code of their own, such as vLLM, cannot load it."
        )
    return "Its own class describes the narrower heads: stock transformers loads it, and what serves that class."
