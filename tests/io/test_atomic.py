"""Files and folders that are whole or not there; `write_new` is tested by the run records."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from clover_peft.io.atomic import build_once, write_json, write_text


def test_a_text_replaces_the_one_before(tmp_path):
    for text in ("one", "zwei, ü"):
        write_text(tmp_path / "file.txt", text)
        assert (tmp_path / "file.txt").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(step, tmp_path, monkeypatch):
    write_text(tmp_path / "file.txt", "old")

    def full(*arguments, **more):
        raise OSError("full")

    monkeypatch.setattr(*((Path, step) if step == "write_text" else (os, step)), full)
    with pytest.raises(OSError, match="full"):
        write_text(tmp_path / "file.txt", "new")
    monkeypatch.undo()
    assert (tmp_path / "file.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_json_keeps_what_it_does_not_know_as_text(tmp_path):
    write_json(tmp_path / "a.json", {"path": Path("x"), "n": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"path": "x", "n": [1, None]}
    assert (tmp_path / "a.json").read_text().endswith("}\n")


def test_build_once_is_atomic(tmp_path):
    target = tmp_path / "a" / "b"

    def fails(folder):
        (folder / "half").touch()
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        build_once(target, fails)
    assert not list(target.parent.iterdir())

    def slow(folder):  # another process finishes first
        (folder / "mine").touch()
        build_once(target, lambda other: (other / "theirs").touch())

    assert build_once(target, slow) == target
    assert [file.name for file in target.iterdir()] == ["theirs"]
    assert build_once(target, lambda folder: pytest.fail("built again")) == target
