"""What a command line names is found, or refused for a reason. The hub is a stand-in."""

from __future__ import annotations

import huggingface_hub
import pytest

from clover_peft.io import locate


@pytest.fixture
def hub(monkeypatch):
    """A hub that can be reached and holds some/model alone."""
    monkeypatch.setattr(locate, "hub_reachable", lambda: True)
    monkeypatch.setattr(locate, "in_cache", lambda name, file: False)
    monkeypatch.setattr(
        huggingface_hub, "file_exists", lambda name, file: (name, file) == ("some/model", "config.json")
    )


@pytest.mark.usefixtures("hub")
def test_names_that_the_hub_does_not_have_are_refused():
    locate.check_model("some/model")
    with pytest.raises(ValueError, match=r"model=nomodel: .* no such model is on the hub, or it needs a token; pass"):
        locate.check_model("nomodel")
    with pytest.raises(ValueError, match="no such adapter is on the hub"):
        locate.check_adapter("some/model")
    assert locate.find_rows("some/data") is None  # the hub's data sets are looked up when they are loaded


@pytest.mark.usefixtures("hub")
def test_a_hub_that_does_not_answer_plainly_decides_later(monkeypatch):
    def fails(name, file):
        raise ConnectionError("busy")

    monkeypatch.setattr(huggingface_hub, "file_exists", fails)
    locate.check_model("some/other")
    locate.check_adapter("some/other")


@pytest.mark.parametrize("name", ["./m", "/m", "~/m", "a/b/c", "m/", r"a\\b"])
@pytest.mark.usefixtures("hub")
def test_what_can_only_be_a_path_is_not_looked_up(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *_: pytest.fail("looked up"))
    with pytest.raises(ValueError, match="found no such folder, and the hub has no such names"):
        locate.check_model(name)
    with pytest.raises(ValueError, match="found no such path; check the path"):
        locate.find_rows(name)


def test_the_cache_and_the_default_model_need_no_hub(monkeypatch):
    monkeypatch.setattr(locate, "hub_reachable", lambda: False)
    monkeypatch.setattr(locate, "in_cache", lambda name, file: name == "some/cached")
    locate.check_model("some/cached")
    locate.check_adapter("some/cached")
    locate.check_model(None)
    locate.check_model(locate.DEFAULT_MODEL)
    with pytest.raises(ValueError, match="and the hub cannot be reached"):
        locate.check_model("some/model")


def test_rows_are_found_in_files_and_folders(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "notes.md").write_text("")
    assert locate.find_rows(None) is None
    assert locate.find_rows(tmp_path) == locate.find_rows(tmp_path / "train.jsonl") == tmp_path / "train.jsonl"
    with pytest.raises(ValueError, match=r"expected a \.jsonl or \.txt file, with \.gz or without, found notes\.md"):
        locate.find_rows(tmp_path / "notes.md")
    (tmp_path / "train-2.jsonl.gz").write_text("")
    with pytest.raises(ValueError, match=r"expected one train.* pass the file itself"):
        locate.find_rows(tmp_path)
