"""Checks what a run saved: the adapter reloaded and the merged model must be the model that was trained.

    python -m clover_peft.experiments.training.verify <output_dir>

A run stores the answers of its trained model to held-out questions, and their logits (probe.safetensors). This command
loads `adapter/` and `merged/` in its own process and compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import clover_peft  # noqa: F401  registers CLOVER, which the adapter may need

from ...io.user_warning import ignore_old_names
from .answers import answer_logits, greedy_ids
from .card import show_training

LOSS_RATIO = 0.8  # the largest ratio of the last to the first training loss that counts as a fall
EXACT = 1e-4  # the largest difference allowed in a float32 logit: a merge changes the order of the operations
ROUNDED = 8.0  # the same for a narrower dtype, in roundings of the largest logit
LOST = 0.5  # the same in shares of the adapter's largest effect on a logit; a lost adapter differs by all of it


def verify(output_dir: str | Path, tolerance: float | None = None, loss_fell: bool = False) -> dict[str, Any]:
    """Reload the adapter and the merged model of a finished run, and compare both with the trained model.

    The adapter is compared with the trained model's logits. Merging rounds every weight: where the model is narrower
    than float32, the merged weights are compared with the reloaded adapter in float32, and may differ by a share of
    the adapter's effect on the base. A merge that was lost differs by all of that effect.

    Args:
        output_dir: the folder of a run with `merge=true` and at least one question.
        tolerance: the largest absolute difference allowed in a logit; None derives it from the dtype of the training
            and, where that is narrower than float32, from the adapter's effect.
        loss_fell: also require that the training loss fell to `LOSS_RATIO`.

    Returns:
        `problems` (empty if both are equal), `loss`, the largest difference of a logit for `adapter` and `merged`, and
        `limits`, which these may have, and the logits that they were compared `against`.

    Raises:
        ValueError: the folder does not hold such a run.
    """
    out = Path(output_dir)
    missing = [name for name in ("record.json", "probe.safetensors", "adapter", "merged") if not (out / name).exists()]
    if missing:
        raise ValueError(f"{out}: expected a finished run with merge=true and questions > 0, missing {missing}")
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    probe = load_file(out / "probe.safetensors")
    loss, problems = record["loss"], []
    shown = show_training(loss, record["steps"])
    # "not <" is also true for NaN.
    if loss_fell and not (loss["last"] is not None and float(loss["last"]) < LOSS_RATIO * float(loss["first"])):
        problems.append(f"loss: expected a fall to {LOSS_RATIO:.0%} or less, found {shown}")
    report: dict[str, Any] = {"loss": shown, "problems": problems, "limits": {}, "against": {}}
    dtype = getattr(torch, record["model"]["dtype"].removeprefix("torch."))
    narrow = dtype.itemsize < 4
    pairs = [(probe[f"prompt.{i}"], probe[f"answer.{i}"]) for i in range(len(record["answers"]))]

    def logits_of(model: Any) -> list[torch.Tensor]:
        return [answer_logits(model, prompt, answer) for prompt, answer in pairs]

    trained = expected = [probe[f"logits.{i}"] for i in range(len(pairs))]
    near = tolerance if tolerance is not None else EXACT
    plain: list[torch.Tensor] = []
    plain_wide: list[torch.Tensor] = []
    if narrow and tolerance is None:
        near = ROUNDED * torch.finfo(dtype).eps * max(logits.abs().max().item() for logits in trained)
        base = PeftConfig.from_pretrained(str(out / "adapter")).base_model_name_or_path
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        plain, plain_wide = logits_of(model), logits_of(model.float())
    for form, loader in (("adapter", AutoPeftModelForCausalLM), ("merged", AutoModelForCausalLM)):
        model = loader.from_pretrained(out / form, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(out / form)
        again = [greedy_ids(model, tokenizer, prompt, answer.shape[1]) for prompt, answer in pairs]
        found = logits_of(model) if form == "adapter" or not narrow else logits_of(model.float())
        allowed = min(near, max(EXACT, LOST * _difference(expected, plain))) if plain else near
        report[form], report["limits"][form] = _difference(found, expected), allowed
        of_trained = form == "adapter" or not narrow
        report["against"][form] = "the trained model's" if of_trained else "the reloaded adapter's in float32"
        for i, (logits, there, (_, answer)) in enumerate(zip(found, expected, pairs, strict=True)):
            if not (difference := _difference([logits], [there])) <= allowed:
                problems.append(f"{form}, question {i}: expected logits within {allowed:.2g}, found {difference:.2g}")
            if not torch.equal(again[i], answer) and _lead(trained[i], answer[0], again[i][0]) > 2 * near:
                text = tokenizer.decode(again[i][0], skip_special_tokens=True).strip()
                after = record["answers"][i]["after"]
                problems.append(f"{form}, question {i}: expected the answer {after!r}, found {text!r}")
        if narrow and form == "adapter":
            expected, plain = logits_of(model.float()), plain_wide
    return report


def _difference(these: list[torch.Tensor], those: list[torch.Tensor]) -> float:
    """Return the largest difference of a logit, or NaN; tokens that the base does not have are left out."""
    width = min(these[0].shape[1], those[0].shape[1])
    differences = [(a[:, :width] - b[:, :width]).abs().max() for a, b in zip(these, those, strict=True)]
    return torch.stack(differences).max().item()


def _lead(logits: torch.Tensor, answer: torch.Tensor, again: torch.Tensor) -> float:
    """Return by how much the trained model preferred its first token that differs: near ties may fall either way."""
    at = next(i for i, (a, b) in enumerate(zip(answer, again, strict=False)) if a != b)
    return (logits[at, answer[at]] - logits[at, again[at]]).item()


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison; return 0 if both saved forms equal the trained model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir")
    parser.add_argument(
        "--loss-fell", action="store_true", help=f"also require a training loss that fell to {LOSS_RATIO:.0%}%"
    )
    ignore_old_names()
    try:
        report = verify(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"training loss: {report['loss']}")
    for form, name in (("adapter", "reloaded adapter"), ("merged", "merged model")):
        found, limit = report[form], report["limits"][form]
        print(
            f"logits of the {name} differ from {report['against'][form]} by at most {found:.1e} (limit {limit:.1e}): "
            + ("passed" if found <= limit else "FAILED")
        )
    for problem in report["problems"]:
        print(f"FAILED: {problem}")
    if not report["problems"]:
        print("answers of both saved forms are the trained model's: passed")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
