"""Raw zero-shot questions: the option that the model finds likeliest, a byte.

The options' texts are compared, but for WinoGrande the text after the blank, and for MMLU the letters.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...base_model.activations import evaluating
from ...io.rows import read_rows

Question = tuple[list[str], list[str], int]  # what stands before each option, the options, which of them is right


def _ask(before: str, options: list[str], answer: int) -> Question:
    return [before] * len(options), options, answer


def _choices(row: dict[str, Any]) -> Question:
    return _ask(f"Question: {row['question']}\nAnswer:", row["choices"], row["answer"])


def _piqa(row: dict[str, Any]) -> Question:
    return _ask(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _hellaswag(row: dict[str, Any]) -> Question:
    return _ask(f"{row['activity_label']}: {row['ctx']}", row["endings"], int(row["label"]))


def _winogrande(row: dict[str, Any]) -> Question:
    """Partial evaluation (arXiv 1806.02847): the text after the blank, given each option in the blank."""
    before, _, after = row["sentence"].partition("_")
    filled = [before + row["option1"], before + row["option2"]]
    return filled, [after.strip()] * 2, int(row["answer"]) - 1


def _mmlu(row: dict[str, Any]) -> Question:
    """The prompt of arXiv 2009.03300 without examples: the letters, with the options in the prompt."""
    letters = list("ABCD")
    options = "".join(f"{letter}. {text}\n" for letter, text in zip(letters, row["choices"], strict=True))
    subject = row["subject"].replace("_", " ")
    about = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return _ask(f"{about}{row['question'].strip()}\n{options}Answer:", letters, row["answer"])


SETS: dict[str, Callable[[dict[str, Any]], Question]] = {
    "arc_easy_test": _choices,
    "arc_challenge_test": _choices,
    "openbookqa_test": _choices,
    "piqa_validation": _piqa,
    "hellaswag_validation": _hellaswag,
    "winogrande_xl_validation": _winogrande,
    "mmlu_validation": _mmlu,
}


def read_questions(count: int) -> dict[str, dict[str, Question]]:
    """Questions of all sets, as many of each, drawn with seed 0.

    Args:
        count: over all sets.

    Returns:
        Set -> row number -> question.

    Raises:
        ValueError: CLOVER_DATA names no folder with zeroshot/, or a file there is damaged.
    """
    folder = Path(os.environ.get("CLOVER_DATA") or "") / "zeroshot"
    if not os.environ.get("CLOVER_DATA") or not folder.is_dir():
        raise ValueError(
            "zeroshot: expected the environment variable CLOVER_DATA to name a folder with zeroshot/, found none; set "
            "it, or ask no questions (evaluation.zeroshot=0)"
        )
    result = {}
    for name, read in SETS.items():
        rows = []
        for place, row, problem in read_rows(folder / f"{name}.jsonl.gz"):
            if problem is not None:
                raise ValueError(f"{place}: {problem}; copy the file again")
            rows.append(row)
        chosen = sorted(random.Random(0).sample(range(len(rows)), min(len(rows), count // len(SETS))))
        result[name] = {str(i): read(rows[i]) for i in chosen}
    return result


@torch.no_grad()
def score(model: Any, tokenizer: Any, questions: dict[str, dict[str, Question]]) -> dict[str, dict[str, int]]:
    """Which questions a causal language model answers rightly: set -> row number -> 1 or 0."""
    with evaluating(model):
        return {
            name: {i: int(_is_right(model, tokenizer, *question)) for i, question in of_set.items()}
            for name, of_set in questions.items()
        }


def _is_right(model: Any, tokenizer: Any, befores: list[str], options: list[str], answer: int) -> bool:
    scores = []
    for before, option in zip(befores, options, strict=True):
        start = len(tokenizer(before, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([tokenizer(f"{before} {option}", add_special_tokens=False)["input_ids"]]).to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
        scores.append(-float(F.cross_entropy(logits, ids[0, start:], reduction="sum")) / len(option.encode()))
    return max(range(len(options)), key=scores.__getitem__) == answer
