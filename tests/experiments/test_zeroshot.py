"""Zero-shot questions: which texts are compared for a row, and which of them the model finds likeliest."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from clover_peft.experiments.adaptation import zeroshot

WINOGRANDE = {"sentence": "I sold the Z for the Q as _ was old.", "option1": "Z", "option2": "Q", "answer": "2"}
MMLU = {"subject": "us_law", "question": " What is? ", "choices": ["one", "two", "three", "four"], "answer": 2}


def spelling(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
    """A tokenizer of which every byte is a token."""
    return {"input_ids": list(text.encode())}


class Reader(torch.nn.Module):
    """A model that keeps the texts it reads, and expects the letter that `likes` finds in what it has read so far."""

    device = torch.device("cpu")

    def __init__(self, likes: Callable[[str], str]) -> None:
        super().__init__()
        self.likes, self.read = likes, []

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        text = bytes(input_ids[0].tolist()).decode()
        self.read.append(text)
        logits = torch.zeros(1, len(text), 256)
        for i in range(len(text)):
            logits[0, i, ord(self.likes(text[: i + 1]))] = 9.0
        return SimpleNamespace(logits=logits)


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict, Reader], int]:
    """Whether a model answers a row of a set rightly."""

    def ask(name: str, row: dict, model: Reader) -> int:
        (tmp_path / "zeroshot").mkdir()
        with gzip.open(tmp_path / "zeroshot" / f"{name}.jsonl.gz", "wt") as file:
            file.write(json.dumps(row) + "\n")
        monkeypatch.setenv("CLOVER_DATA", str(tmp_path))
        monkeypatch.setattr(zeroshot, "SETS", {name: zeroshot.SETS[name]})
        return zeroshot.score(model, spelling, zeroshot.read_questions(1))[name]["0"]

    return ask


def test_winogrande_fills_the_blank_with_each_option(answer: Callable) -> None:
    model = Reader(lambda text: "x")
    answer("winogrande_xl_validation", WINOGRANDE, model)
    assert model.read == [f"I sold the Z for the Q as {option} was old." for option in "ZQ"]


@pytest.mark.parametrize(("right", "expected"), [("1", 0), ("2", 1)])
def test_winogrande_compares_the_text_after_the_blank(right: str, expected: int, answer: Callable) -> None:
    """The options themselves are no part of the score.

    A model that expects Z at the blank, and the rest of the sentence only after "as Q".
    """

    def likes(text: str) -> str:
        before, _, after = text.partition("as Q")
        return "Z" if before == text else (" was old.x"[len(after)])

    assert answer("winogrande_xl_validation", WINOGRANDE | {"answer": right}, Reader(likes)) == expected


@pytest.mark.parametrize(("right", "expected"), [(2, 1), (0, 0)])
def test_mmlu_compares_the_letters(right: int, expected: int, answer: Callable) -> None:
    model = Reader(lambda text: "C" if text.endswith("Answer: ") else "x")
    assert answer("mmlu_validation", MMLU | {"answer": right}, model) == expected
    prompt = (
        "The following are multiple choice questions (with answers) about us law.\n\n"
        "What is?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    )
    assert model.read == [f"{prompt} {letter}" for letter in "ABCD"]


@pytest.mark.parametrize(("liked", "expected"), [("a", 0), ("b", 1)])
def test_other_sets_compare_the_options_a_byte(liked: str, expected: int, answer: Callable) -> None:
    row = {"goal": "Do", "sol1": "aa", "sol2": "bbbb", "label": 1}
    assert answer("piqa_validation", row, Reader(lambda text: liked)) == expected
