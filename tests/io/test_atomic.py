"""A folder that is built once is whole or not there."""

from __future__ import annotations

import pytest

from clover_peft.io import downloads


def test_build_once_is_atomic(tmp_path):
    target = tmp_path / "a" / "b"

    def fails(folder):
        (folder / "half").touch()
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        downloads.build_once(target, fails)
    assert not list(target.parent.iterdir())

    def slow(folder):  # another process finishes first
        (folder / "mine").touch()
        downloads.build_once(target, lambda other: (other / "theirs").touch())

    assert downloads.build_once(target, slow) == target
    assert [file.name for file in target.iterdir()] == ["theirs"]
    assert downloads.build_once(target, lambda folder: pytest.fail("built again")) == target
