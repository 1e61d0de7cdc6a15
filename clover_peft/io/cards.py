"""The README.md of what a run saves: how to load it, on which base and data it was trained, with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_REGISTER = "import clover_peft  # registers the adapter type with peft; needed before loading\n"
_LOAD = {
    "adapter": """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("<this folder>")""",
    "model": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("<this folder>")""",
}


def write_card(folder: Path, kind: str, record: dict[str, Any]) -> None:
    """Writes `folder/README.md`, over the one that peft or TRL left there.

    Args:
        folder: where an adapter or a model was saved.
        kind: "adapter", or "model" for a whole (merged or fully fine-tuned) model.
        record: the run's record.
    """
    model, data, env = record["model"], record["data"], record["environment"]
    versions = {"clover_peft": env["clover_peft"], **env["versions"]}
    config = record["adapter"]["config"] if record["adapter"] else {}
    method = config.get("peft_type")
    load = (_REGISTER if kind == "adapter" and method == "CLOVER" else "") + _LOAD[kind]
    notes = ""
    if kind == "adapter" and "pissa" in str(config.get("init_lora_weights")):
        notes = (
            "\nPiSSA moves the leading part of each base weight into the adapter. Loading repeats that on the base: "
            "the base in memory is changed, and disabling the adapter does not give it back.\n"
        )
    card = ModelCardData(
        base_model=model["name"] if "/" in model["name"] else None,  # a folder's is none on the hub, or another's
        library_name="peft" if kind == "adapter" else "transformers",
        tags=["sft", "trl", "clover_peft", *([method.lower()] if method else ["full-fine-tuning"])],
    )
    loss = record["loss"]
    text = f"""---
{card.to_yaml()}
---
# {model["name"]}, fine-tuned ({method or "full"})

```python
{load}
```
{notes}
| | |
| --- | --- |
| base model | {model["name"]}, licence: {model["license"]} ({model["origin"]}) |
| data | {data["source"]}: {data["train_rows"]} rows, fingerprint {data["fingerprint"][:16]} |
| trainable parameters | {record["parameters"]["trainable"]:,} of {record["parameters"]["total"]:,} |
| training loss | {change(loss["first"], loss["last"], "not logged")} in {record["steps"]} steps |
| held-out loss | {change(loss["held_out_before"], loss["held_out_after"], "not measured")} |
| seed | {record["seed"]} |
| versions | {", ".join(f"{name} {version}" for name, version in versions.items())} |

The licences of the base model and of the data apply; the weights here carry no licence of their own.
"""
    ModelCard(text).save(folder / "README.md")


def change(first: float | None, last: float | None, otherwise: str) -> str:
    """Shows how a loss changed, or says `otherwise` where it is not known."""
    return otherwise if first is None or last is None else f"{float(first):.3f} -> {float(last):.3f}"
