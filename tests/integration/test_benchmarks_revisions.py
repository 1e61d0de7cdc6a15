"""The comparison of two revisions, without running a benchmark."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from tests.support.benchmarks import run


@pytest.fixture
def compare(benchmark, monkeypatch):
    """The module, whose benchmark's record is `compare.record`; its commands are in `compare.commands`."""
    module = benchmark("compare_revisions")

    @contextmanager
    def checkout(revision, folder):
        yield folder

    def measure(root, command, out):
        module.commands.append(command)
        return module.record

    for name, value in {"_checkout": checkout, "_run": measure, "commands": [], "record": {}}.items():
        monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setattr(module, "_git", lambda *arguments: "0" * 40)
    return module


def compared(compare, tmp_path, *options):
    arguments = ["--base", "HEAD", "--rounds", "2", *options, "--", "train_step", "--rounds", "5"]
    return run(compare, tmp_path / "record.json", *arguments)


def test_a_benchmark_gets_the_seed_and_the_device(compare, tmp_path):
    compare.record = {"benchmark": "train_step", "figures": {"clover": {"step": 2.0}, "lora": {"step": 3.0}}}
    record = compared(compare, tmp_path, "--seed", "7", "--figures", "clover")
    expected = ["train_step", "--seed", "7", "--device", "cpu", "--rounds", "5", "--fast"]
    assert compare.commands == [expected] * 4
    assert record["options"]["compared"] == expected
    assert record["figures"]["clover/step"]["now_v_before"] == 1
    assert record["base_revision"] == "0" * 40


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"benchmark": "mla"}, "mla: expected a record with `figures`, found none"),
        ({"benchmark": "decode", "figures": {"base": {"v_base": 1.0}}}, "--figures clover: .* in decode.*base/v_base"),
    ],
)
def test_what_cannot_be_compared_ends_in_the_first_run(compare, tmp_path, record, message):
    compare.record = record
    with pytest.raises(SystemExit, match=message):
        compared(compare, tmp_path, "--figures", "clover")
    assert len(compare.commands) == 1
