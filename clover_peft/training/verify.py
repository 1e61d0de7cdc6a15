"""Checks what a run saved: the adapter reloaded and the merged model must be the model that was trained.

    python -m clover_peft.training.verify <output_dir>

A run stores what its trained model answers to held-out questions, and the logits (probe.safetensors). This loads
`adapter/` and `merged/` in its own process and compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import clover_peft  # noqa: F401  registers CLOVER, which the adapter may need
from clover_peft.training.run import answer_logits, greedy_ids

LOSS_RATIO = 0.8


def verify(output_dir: str | Path, tolerance: float = 1e-4) -> dict[str, Any]:
    """Reloads the adapter and the merged model of a finished run and compares both with the trained one.

    Args:
        output_dir: of a run with `merge=true` and at least one question.
        tolerance: largest absolute difference allowed in a logit.

    Returns:
        `problems` (empty if all is well), `loss` and per saved form `logits`, its largest difference.

    Raises:
        ValueError: the folder is not that of such a run.
    """
    out = Path(output_dir)
    missing = [name for name in ("record.json", "probe.safetensors", "adapter", "merged") if not (out / name).exists()]
    if missing:
        raise ValueError(f"{out}: expected a finished run with merge=true and questions > 0, missing {missing}")
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    probe = load_file(out / "probe.safetensors")
    loss, problems = record["loss"], []
    # "not <" also catches NaN
    if not loss["last"] < LOSS_RATIO * loss["first"]:
        problems.append(f"loss: expected a fall to {LOSS_RATIO:.0%} or less, found {loss['first']} -> {loss['last']}")
    report: dict[str, Any] = {"loss": (loss["first"], loss["last"]), "problems": problems}
    dtype = record["model"]["dtype"].removeprefix("torch.")
    for form, loader in (("adapter", AutoPeftModelForCausalLM), ("merged", AutoModelForCausalLM)):
        model = loader.from_pretrained(out / form, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(out / form)
        report[form] = 0.0
        for i, item in enumerate(record["answers"]):
            prompt, answer, logits = (probe[f"{name}.{i}"] for name in ("prompt", "answer", "logits"))
            difference = (answer_logits(model, prompt, answer) - logits).abs().max().item()
            report[form] = max(report[form], difference)
            if not difference <= tolerance:
                problems.append(f"{form}, question {i}: expected logits within {tolerance:g}, found {difference:g}")
            again = greedy_ids(model, tokenizer, prompt, answer.shape[1])
            if not torch.equal(again, answer):
                found = tokenizer.decode(again[0], skip_special_tokens=True).strip()
                problems.append(f"{form}, question {i}: expected the answer {item['after']!r}, found {found!r}")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Prints the comparison; returns 0 if the saved forms are the trained model and its loss fell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir")
    try:
        report = verify(parser.parse_args(arguments).output_dir)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    first, last = report["loss"]
    print(f"loss                                  {first:.3f} -> {last:.3f}")
    print(f"adapter reloaded, largest difference  {report['adapter']:.1e}")
    print(f"merged model, largest difference      {report['merged']:.1e}")
    for problem in report["problems"]:
        print(f"FAILED: {problem}")
    print("answers, logits and loss: " + ("NOT as expected" if report["problems"] else "as expected"))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
