"""The release check reports every step, goes on with the next model after a failure, and then exits with 1."""

from __future__ import annotations

import sys

import pytest

from tests.support.tiny import load_script


@pytest.fixture
def odyssey():
    return load_script("odyssey")


def python(code: str) -> list:
    return [sys.executable, "-c", code]


def test_a_failed_step_ends_one_model_and_fails_the_whole(odyssey, tmp_path, monkeypatch, capsys):
    def travel(trip, kind, model):
        trip.step(kind, "first", python("print('heard')" if kind == "encoder" else "raise SystemExit('broken')"))
        trip.note(kind, "second", kind == "encoder")

    monkeypatch.setattr(odyssey, "travel", travel)
    monkeypatch.setattr(sys, "argv", ["odyssey", str(tmp_path / "out"), "--kinds", "whisper", "encoder"])
    with pytest.raises(SystemExit, match=r"^failed: Whisper tiny\.en: first$"):  # a text makes the status 1
        odyssey.main()
    table = [line.split(" | ")[:3] for line in (tmp_path / "out" / "log.md").read_text().splitlines()[4:]]
    assert table == [
        ["| first", "Whisper tiny.en", "FAILED"],
        ["| first", "MiniLM-L6", "passed"],
        ["| second", "MiniLM-L6", "passed"],
    ]
    assert "broken" in capsys.readouterr().err
    assert "heard" in (tmp_path / "out" / "01-encoder.log").read_text()


def test_to_end_before_the_kill_is_to_fail(odyssey, tmp_path):
    trip, file = odyssey.Odyssey(tmp_path / "out"), tmp_path / "file"
    trip.step("encoder", "killed", python(f"open({str(file)!r}, 'w'); import time; time.sleep(60)"), kill_after=file)
    with pytest.raises(odyssey.Failed, match=r"^ended$"):
        trip.step("encoder", "ended", python("pass"), kill_after=tmp_path / "never")
    assert ["passed" in line for line in trip.lines] == [True, False]
