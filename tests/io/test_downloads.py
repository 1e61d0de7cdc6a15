"""Whether the hub is asked, and downloads that fail. No network."""

from __future__ import annotations

import hashlib
import os
import time
from types import SimpleNamespace

import pytest

from clover_peft.io import downloads


@pytest.fixture
def fresh_hub(monkeypatch):
    downloads.hub_reachable.cache_clear()
    monkeypatch.setattr(downloads.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield monkeypatch
    downloads.hub_reachable.cache_clear()


def test_a_silent_hub_is_given_up_in_time_and_asked_once(fresh_hub):
    asked = []

    def head(url, timeout):
        asked.append(url)
        time.sleep(30)

    fresh_hub.setattr(downloads, "HUB_SECONDS", 0.2)
    fresh_hub.setattr(downloads.huggingface_hub, "get_session", lambda: SimpleNamespace(head=head))
    started = time.perf_counter()
    assert not downloads.hub_reachable()
    assert not downloads.hub_reachable()
    assert time.perf_counter() - started < 2
    assert len(asked) == 1
    assert downloads.constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (403, False)])
def test_hub_answers(fresh_hub, status, reachable):
    session = SimpleNamespace(head=lambda url, timeout: SimpleNamespace(status_code=status))
    fresh_hub.setattr(downloads.huggingface_hub, "get_session", lambda: session)
    assert downloads.hub_reachable() is reachable


def test_hub_offline_is_respected(fresh_hub):
    fresh_hub.setattr(downloads.constants, "HF_HUB_OFFLINE", True)
    fresh_hub.setattr(downloads.huggingface_hub, "get_session", lambda: pytest.fail("asked the hub"))
    assert not downloads.hub_reachable()
    assert downloads.HUB_SECONDS <= 5


def test_a_failed_download_says_why(monkeypatch, tmp_path):
    failed = SimpleNamespace(returncode=1, stdout="", stderr="trace\nNo module named pip\n")
    monkeypatch.setattr(downloads.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ConnectionError, match="found: No module named pip"):
        downloads.download_wheel(downloads.Wheel("x", "1", "0", 1), tmp_path)


def test_archives_are_checked(tmp_path):
    source, into = tmp_path / "a.tgz", tmp_path / "into"
    into.mkdir()
    source.write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    assert downloads.download_archive(downloads.Archive(source.as_uri(), digest, 1), into).read_bytes() == b"content"
    with pytest.raises(ConnectionError, match=f"expected sha256 0, found {digest}"):
        downloads.download_archive(downloads.Archive(source.as_uri(), "0", 1), into)
    with pytest.raises(ConnectionError, match="expected to download it, found"):
        downloads.download_archive(downloads.Archive((tmp_path / "none.tgz").as_uri(), digest, 1), into)
