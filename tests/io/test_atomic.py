"""Files and folders that are whole or not there; `write_new` is tested by the run records."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from clover_peft.io.atomic import build_once, check_new_folder, new_folder, write_json, write_text


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


def _link_to_empty(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to("there")
    return tmp_path / "out"


def _dangling_link(tmp_path, monkeypatch):
    (tmp_path / "out").symlink_to(Path("deep", "there"))
    return tmp_path / "out"


def _working_directory(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    return Path()


def _mount_point(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    is_mount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out" or is_mount(path))
    _busy(tmp_path, monkeypatch)
    return tmp_path / "out"


def _busy(tmp_path, monkeypatch):
    """As a bind mount, which `ismount` does not find."""
    rmdir = Path.rmdir
    (tmp_path / "out").mkdir(exist_ok=True)

    def refuses(path):
        if path == tmp_path / "out":
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", refuses)
    return tmp_path / "out"


def _write(out, *files):
    with new_folder(out) as folder:
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).touch()
    return folder


PLACES = [_link_to_empty, _dangling_link, _working_directory, _mount_point, _busy]


@pytest.mark.parametrize("make", PLACES)
def test_a_new_folder_takes_the_place_of_any_empty_one(make, tmp_path, monkeypatch):
    out = make(tmp_path, monkeypatch)
    was_link = out.is_symlink()
    check_new_folder(out)
    assert _write(out, "config.json", "parts/a").name == out.resolve().name
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "parts"]
    assert (out / "parts" / "a").is_file()
    assert out.is_symlink() == was_link
    assert not list(tmp_path.rglob(".*"))
    with pytest.raises(ValueError, match="expected a new or empty folder, found files; choose another"):
        check_new_folder(out)


@pytest.mark.parametrize("make", PLACES)
def test_a_new_folder_that_fails_leaves_the_place_as_it_was(make, tmp_path, monkeypatch):
    out = make(tmp_path, monkeypatch)

    def fails():
        with new_folder(out) as folder:
            (folder / "half").touch()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fails()
    check_new_folder(out)


@pytest.mark.parametrize("make", [_working_directory, _mount_point, _busy])
def test_a_move_that_fails_leaves_an_empty_folder(make, tmp_path, monkeypatch):
    out = make(tmp_path, monkeypatch)
    move = shutil.move

    def full(source, target):
        if Path(source).name == "config.json":
            raise OSError("full")
        move(source, target)

    monkeypatch.setattr(shutil, "move", full)
    with pytest.raises(OSError, match="full"):
        _write(out, "a", "config.json", "parts/z")
    assert not list(out.iterdir())


@pytest.mark.parametrize("make", [_working_directory, _mount_point, _busy, _link_to_empty])
def test_a_file_that_came_meanwhile_stays(make, tmp_path, monkeypatch):
    out = make(tmp_path, monkeypatch)
    with pytest.raises(OSError, match="not empty"):
        _write(out, "mine", out.resolve() / "theirs")
    assert [path.name for path in out.iterdir()] == ["theirs"]


def test_a_place_that_cannot_work_is_refused_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out .*loop: expected a new or empty folder, found a link that leads"):
        check_new_folder(tmp_path / "loop", "--out ")
    with pytest.raises(ValueError, match=r"found the file .*file in its way; choose another"):
        check_new_folder(tmp_path / "file" / "a" / "out")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=f"found that {tmp_path} cannot be written to; choose another"):
        check_new_folder(tmp_path / "a" / "out")
