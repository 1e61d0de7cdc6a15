"""The model card of a fine-tuning: how to load the result, and its base, data and versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...io import cards

_REGISTER = "import clover_peft  # registers the adapter type with peft; needed before loading\n"
_LOAD = {
    "adapter": """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("<this folder>")""",
    "model": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("<this folder>")""",
}


def write_card(folder: Path, kind: str, record: dict[str, Any]) -> None:
    """Write `folder/README.md`, over the one that peft or TRL left there.

    Args:
        folder: where an adapter or a model was saved.
        kind: "adapter", or "model" for a whole (merged or fully fine-tuned) model.
        record: the run's record.
    """
    model, data, env, loss = record["model"], record["data"], record["environment"], record["loss"]
    versions = {"clover_peft": env["clover_peft"], **env["versions"]}
    config = record["adapter"]["config"] if record["adapter"] else {}
    method = config.get("peft_type")
    notes = ""
    if kind == "adapter" and "pissa" in str(config.get("init_lora_weights")):
        notes = (
            "PiSSA moves the leading part of each base weight into the adapter. Loading repeats that on the base: "
            "the base in memory is changed, and disabling the adapter does not give it back."
        )
    cards.write_card(
        folder,
        title=f"{model['name']}, fine-tuned ({method or 'full'})",
        base=model["name"],
        library="peft" if kind == "adapter" else "transformers",
        tags=["sft", "trl", "clover_peft", method.lower() if method else "full-fine-tuning"],
        code=(_REGISTER if kind == "adapter" and method == "CLOVER" else "") + _LOAD[kind],
        text=notes,
        facts={
            "base model": f"{model['name']}, {model['origin']}, licence: {model['license']}",
            "data": f"{data['source']}: {data['train_rows']} rows, fingerprint {data['fingerprint'][:16]}",
            "trainable parameters": "{trainable:,} of {total:,}".format(**record["parameters"]),
            "training loss": show_training(loss, record["steps"]),
            "held-out loss": show_change(loss["held_out_before"], loss["held_out_after"], "not measured"),
            "seed": str(record["seed"]),
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        },
        ending="The licences of the base model and of the data apply; the weights here carry no licence of their own.",
    )


def eighth(logged: int) -> int:
    """How many logged losses make the first and the last mean: single batches are too noisy."""
    return max(1, logged // 8)


def show_training(loss: dict[str, Any], steps: int) -> str:
    """Show the means of the first and of the last logged training losses, and the steps that they are over.

    Args:
        loss: the record's `loss`.
        steps: of the whole training.
    """
    if loss["first"] is None or loss["last"] is None:
        return f"not logged in {steps} steps"
    ends = [0, *(entry["step"] for entry in loss["log"])]  # a logged loss is the mean since the one before it
    n = eighth(len(ends) - 1)
    first, last = float(loss["first"]), float(loss["last"])
    if len(ends) == 2:
        return f"{first:.3f} (mean of steps 1 to {ends[1]})"
    return f"{first:.3f} (mean of steps 1 to {ends[n]}) -> {last:.3f} (mean of steps {ends[-n - 1] + 1} to {ends[-1]})"


def show_change(first: float | None, last: float | None, unknown: str) -> str:
    """Show how a loss changed, or `unknown` where one of its values is missing."""
    return unknown if first is None or last is None else f"{float(first):.3f} -> {float(last):.3f}"
