"""Rows in JSON Lines: what is written is read back, and damage is located."""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from pathlib import Path

import pytest

from clover_peft.io.rows import is_rows_file, parse_row, read_lines, read_rows, write_rows

ROWS = [{"text": "a\u2028 b", "n": 1}, {"text": "ü"}, {}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_are_read_back_with_their_places(name, tmp_path):
    digest = write_rows(tmp_path / name, iter(ROWS))
    assert list(read_rows(tmp_path / name)) == [(f"{name}:{i + 1}", row, None) for i, row in enumerate(ROWS)]
    text = b"".join(read_lines(tmp_path / name))
    assert text.decode() == "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    assert digest == hashlib.sha256(text).hexdigest()


def test_the_same_rows_give_the_same_bytes(tmp_path, monkeypatch):
    write_rows(tmp_path / "one.jsonl.gz", ROWS)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    write_rows(tmp_path / "two.jsonl.gz", ROWS)
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()


def test_blank_lines_and_a_mark_of_the_encoding_are_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text('\ufeff{"a": 1}\r\n\r\n  \n{"a": 2}', encoding="utf-8")
    assert list(read_rows(tmp_path / "rows.jsonl")) == [
        ("rows.jsonl:1", {"a": 1}, None),
        ("rows.jsonl:4", {"a": 2}, None),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": 1', "expected one JSON object, found Expecting ',' delimiter at column 8"),
        (b'{"a": "\xff"}', "expected UTF-8, found byte 0xff at column 8"),
        (b"{} {}", "expected one JSON object, found Extra data at column 4"),
    ],
)
def test_a_bad_line_is_described_and_the_next_is_read(line, problem, tmp_path):
    assert parse_row(line) == (None, problem)
    (tmp_path / "rows.jsonl").write_bytes(line + b'\n{"a": 2}\n')
    assert list(read_rows(tmp_path / "rows.jsonl")) == [
        ("rows.jsonl:1", None, problem),
        ("rows.jsonl:2", {"a": 2}, None),
    ]


def test_damage_is_located(tmp_path):
    lines = [{"i": i, "text": hashlib.sha256(bytes([i])).hexdigest()} for i in range(200)]
    cut = tmp_path / "cut.jsonl.gz"
    write_rows(cut, lines)
    cut.write_bytes(cut.read_bytes()[:-500])
    read = []
    with pytest.raises(
        ValueError, match=r"cut\.jsonl\.gz: expected gzip'd JSON lines, found damage after (\d+) lines"
    ) as error:
        read += (row for _, row, _ in read_rows(cut))
    assert f"after {len(read)} lines" in str(error.value)
    assert read == lines[: len(read)]
    for name, kind in {
        "none.jsonl": "JSON lines",
        "none.txt": "text in UTF-8",
        "none.txt.gz": "text in UTF-8",
    }.items():
        with pytest.raises(ValueError, match=f"{name}: expected {kind}, found damage after 0 lines: .*No such file"):
            list(read_lines(tmp_path / name))
    (tmp_path / "plain.txt.gz").write_text("not compressed")
    with pytest.raises(ValueError, match=r"plain\.txt\.gz: expected text in UTF-8, found damage after 0 lines"):
        list(read_lines(tmp_path / "plain.txt.gz"))


def test_lines_of_text(tmp_path):
    with gzip.open(tmp_path / "text.txt.gz", "wb") as file:
        file.write(b"one\r\ntwo")
    assert list(read_lines(tmp_path / "text.txt.gz")) == [b"one\r\n", b"two"]


def test_names_of_rows_files():
    assert [is_rows_file(Path(name)) for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.gz")] == [
        True,
        True,
        False,
        False,
    ]
