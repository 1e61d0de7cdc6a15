"""Prunes the value-output pairs of a model, trains a CLOVER adapter to recover part of the loss, and merges it.

    python examples/prune_and_heal.py --text my_text.txt --ratio 0.25 --out my-pruned-model

Without --text it calibrates and trains on a few generated sentences, which is enough to see the steps alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import clover_peft


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--text", type=Path, help="a text file, one passage a line")
    parser.add_argument("--ratio", type=float, default=0.25, help="share of the directions to remove")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", default="my-pruned-model", help="folder for the model")
    given = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    texts = [f"Is {n} more than {n % 7}? the correct answer is true" for n in range(150)]
    if given.text is not None:
        texts = [line for line in given.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [text for text in texts if len(tokenizer(text).input_ids) > 1]
    # A pass for each row would take three times as long, for the same moments.
    batches = [tokenizer(texts[i : i + 25], padding=True, return_tensors="pt") for i in range(0, len(texts), 25)]

    model = AutoModelForCausalLM.from_pretrained(given.model)
    print(f"loss before pruning: {loss_of(model, batches):.3f}")
    report = clover_peft.prune(model, {"vo": given.ratio}, calibration=batches, ranks="gradient")
    print(report.summary())
    print(f"loss after pruning: {loss_of(model, batches):.3f}")

    # An adapter remembers its base by name, so the pruned model is saved and loaded before one is made.
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(given.out), clover_peft.CloverConfig())
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
    adapted.train()
    for step in range(given.steps):
        batch = batches[step % len(batches)]
        adapted(**batch, labels=labels_of(batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    healed = adapted.eval().merge_and_unload()
    print(f"loss after training: {loss_of(healed, batches):.3f}")
    healed.save_pretrained(given.out)
    print(f"saved: {given.out}; import clover_peft before loading it")


def labels_of(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tokens to predict; padding is none."""
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


@torch.no_grad()
def loss_of(model: torch.nn.Module, batches: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """Mean loss over the first batches."""
    model.eval()
    losses = [model(**batch, labels=labels_of(batch)).loss.item() for batch in batches[:2]]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
