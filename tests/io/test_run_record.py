"""Run records: complete, never overwritten, and honest about the machine and the revision."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import clover_peft
from clover_peft.io import run_record as records


def test_environment_names_machine_software_and_revision():
    environment = records.environment()
    assert json.loads(json.dumps(environment)) == environment
    assert environment["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert environment["cpu"]
    assert environment["cores"] >= 1
    assert environment["torch_threads"] == torch.get_num_threads()
    assert environment["versions"]["torch"] == torch.__version__
    assert {"torch", "peft", "transformers"} <= environment["versions"].keys()
    assert environment["clover_peft"] == clover_peft.__version__
    assert (environment["git_revision"] is None) == (environment["git_dirty"] is None)


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(records, "PACKAGES", ("torch", "no-such-distribution"))
    assert records.environment()["versions"].keys() == {"torch"}


def test_environment_imports_none_of_the_packages_it_reports():
    before = set(sys.modules)
    records.environment()
    assert not (set(sys.modules) - before) & set(records.PACKAGES)


def test_write_round_trips_and_makes_folders(tmp_path):
    path = records.write(
        tmp_path / "runs" / "a" / "run.json", {"loss": 0.5, "path": Path("x"), "dtype": torch.bfloat16}
    )
    assert path == tmp_path / "runs" / "a" / "run.json"
    assert json.loads(path.read_text()) == {"loss": 0.5, "path": "x", "dtype": "torch.bfloat16"}


def test_what_is_not_finite_is_written_as_text(tmp_path):
    path = records.write(tmp_path / "run.json", {"loss": [float("nan"), 1.0], "norm": -float("inf")})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"loss": ["NaN", 1.0], "norm": "-Infinity"}


def test_lists_of_numbers_take_one_line(tmp_path):
    record = {"ranks": [[1, -2, 3], [4e-7]], "text": "[\n 1\n]", "mixed": [1, "a"], "empty": []}
    text = records.write(tmp_path / "run.json", record).read_text()
    assert json.loads(text) == record
    assert "[1, -2, 3]," in text
    assert "[4e-07]" in text


def test_write_never_overwrites(tmp_path):
    paths = [records.write(tmp_path / "run.json", {"number": i}) for i in range(3)]
    assert [path.name for path in paths] == ["run.json", "run-2.json", "run-3.json"]
    assert [json.loads(path.read_text())["number"] for path in paths] == [0, 1, 2]


def test_concurrent_writers_get_a_name_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda i: records.write(tmp_path / "run.json", {"number": i}), range(32)))
    assert len(set(paths)) == 32
    assert sorted(json.loads(path.read_text())["number"] for path in paths) == list(range(32))


def test_a_file_system_without_links_will_do(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no hard links here")

    monkeypatch.setattr("os.link", refuse)
    paths = [records.write(tmp_path / "run.json", {"number": i}) for i in range(2)]
    assert [json.loads(path.read_text())["number"] for path in paths] == [0, 1]
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_record_is_whole_as_soon_as_it_is_there(tmp_path, monkeypatch):
    """Killed at any moment, or read by another process."""
    sizes = []

    def watched(*arguments, **options):
        sizes.extend(path.stat().st_size for path in tmp_path.glob("run*.json"))
        return link(*arguments, **options)

    link = os.link
    monkeypatch.setattr("os.link", watched)
    monkeypatch.setattr("os.replace", watched)
    for i in range(3):
        records.write(tmp_path / "run.json", {"number": i})
    assert sizes
    assert 0 not in sizes


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="Circular"):
        records.write(tmp_path / "run.json", _circular())
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_the_last_step_leaves_no_partial_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.link", fail)
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        records.write(tmp_path / "run.json", {})
    assert list(tmp_path.iterdir()) == []


def test_git_state_follows_the_checkout(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    file = tmp_path / "module.py"
    file.write_text("x = 1\n")
    git("init")
    assert records._git_state(file) == (None, None)  # inside a checkout, but not part of it
    git("add", "module.py")
    git("commit", "-m", "first")
    revision, dirty = records._git_state(file)
    assert len(revision) == 40
    assert dirty is False
    (tmp_path / "result.json").write_text("{}")
    assert records._git_state(file) == (revision, False)
    os.utime(file, (1, 1))  # `git status` would note the new time in the index, under a lock
    index = (tmp_path / ".git" / "index").read_bytes()
    assert records._git_state(file) == (revision, False)
    assert (tmp_path / ".git" / "index").read_bytes() == index
    file.write_text("x = 2\n")
    assert records._git_state(file) == (revision, True)


def test_git_state_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert records._git_state(Path(records.__file__)) == (None, None)


def test_peak_memory_remembers_a_large_allocation():
    before = records.peak_memory_bytes()
    block = torch.ones(64 * 2**20, dtype=torch.float32)
    held = records.peak_memory_bytes()
    del block
    assert held > 256 * 2**20
    # The kernel counts resident pages in batches, so the mark may waver by a few of them.
    assert held >= before * 0.99
    assert records.peak_memory_bytes() >= held * 0.99


def _circular() -> dict:
    record: dict = {}
    record["self"] = record
    return record


def test_what_was_made_otherwise_is_named() -> None:
    before = {"rate": 0.1, "block": {"r": 8, "kind": "full"}, "path": "runs/x"}
    records.check_same(before, {**before, "path": Path("runs/x")}, "runs/a.json", "choose another")
    with pytest.raises(ValueError, match=re.escape("data.block.r: expected 8 as in runs/a.json, found 4; stay")):
        records.check_same(before, {**before, "block": {"r": 4, "kind": "full"}}, "runs/a.json", "stay", "data.")
    with pytest.raises(ValueError, match=r"new: expected None as in .*, found 1;"):
        records.check_same(before, {**before, "new": 1}, "runs/a.json", "stay")
