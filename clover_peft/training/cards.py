"""The README.md of what a run saves: how to load it, on which base and data it was trained, with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_LOAD = {
    "adapter": """import clover_peft  # registers the adapter type with peft; needed before loading
from peft import AutoPeftModelForCausalLM

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
    method = (record["settings"].get("peft") or {}).get("peft_type")
    notes = ""
    if method and method != "CLOVER":
        notes = (
            f"\nThis is a {method} adapter; it loads without `import clover_peft` too.\n" if kind == "adapter" else ""
        )
    if kind == "adapter" and "pissa" in str(record["settings"]["peft"].get("init_lora_weights")):
        notes += (
            "\nPiSSA moves the leading part of each base weight into the adapter. Loading repeats that on the base: "
            "the base in memory is changed, and disabling the adapter does not give it back.\n"
        )
    card = ModelCardData(
        base_model=model["name"],
        library_name="peft" if kind == "adapter" else "transformers",
        tags=["sft", "trl", "clover_peft", *([method.lower()] if method else ["full-fine-tuning"])],
    )
    loss = record["loss"]
    text = f"""---
{card.to_yaml()}
---
# {model["name"]}, fine-tuned ({method or "full"})

```python
{_LOAD[kind]}
```
{notes}
| | |
| --- | --- |
| base model | {model["name"]}, licence: {model["license"]} ({model["origin"]}) |
| data | {data["source"]}: {data["train_rows"]} rows, fingerprint {data["fingerprint"][:16]} |
| trainable parameters | {record["parameters"]["trainable"]:,} of {record["parameters"]["total"]:,} |
| training loss | {loss["first"]:.3f} to {loss["last"]:.3f} in {record["steps"]} steps |
| held-out loss | {_held_out(loss)} |
| seed | {record["seed"]} |
| versions | {", ".join(f"{name} {version}" for name, version in versions.items())} |

The licences of the base model and of the data apply; the weights here carry no licence of their own.
"""
    ModelCard(text).save(folder / "README.md")


def _held_out(loss: dict[str, Any]) -> str:
    if loss["held_out_before"] is None:
        return "not measured"
    return f"{loss['held_out_before']:.3f} to {loss['held_out_after']:.3f}"
