"""Files and folders that appear complete or not at all, also where a run is killed or two runs write at once."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a text file; the file that was there stays until all is written."""
    write_by(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_by(path: Path, write: Callable[[Path], object]) -> None:
    """Let a function write a file under another name, which then replaces the file that was there."""
    with _partial(path) as partial:
        write(partial)
        os.replace(partial, path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, as `write_text` does; values that JSON does not know are written as text."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_new(path: Path, text: str) -> Path:
    """Write a text file under the first free name of `run.json`, `run-2.json`, `run-3.json`, ...

    Args:
        path: the wanted file; missing folders are made.
        text: its content.

    Returns:
        The path that was written. No existing file is replaced, also where several processes write at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _partial(path) as partial:
        partial.write_text(text, encoding="utf-8")
        for number in itertools.count(1):
            candidate = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
            try:
                os.link(partial, candidate)
            except FileExistsError:
                continue
            except OSError:  # This file system has no links: the file is empty for a moment.
                try:
                    candidate.touch(exist_ok=False)
                except FileExistsError:
                    continue
                try:
                    os.replace(partial, candidate)
                except OSError:
                    candidate.unlink()
                    raise
            return candidate
    raise AssertionError


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, filled by `build` if it does not exist yet.

    The content is built in a folder beside it, which is then renamed: a killed or concurrent run never leaves half a
    folder.

    Args:
        folder: the final place.
        build: fills the empty folder it is given.

    Returns:
        `folder`.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        content = Path(temporary) / "content"
        content.mkdir()
        build(content)
        try:
            content.rename(folder)
        except OSError:
            if not folder.is_dir():  # If it is there, another process was faster, and its content is as good.
                raise
    return folder


def check_new_folder(folder: Path, where: str = "") -> None:
    """Check that a folder is free to be written.

    Args:
        folder: the folder.
        where: what the error says before its name, such as an option.

    Raises:
        ValueError: if there are files in it, or in its place.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{where}{folder}: expected a new or empty folder, found files; choose another")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, which is renamed to it when the context ends without an error.

    Args:
        folder: the final place, which must be free or an empty folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        content = Path(temporary) / folder.name  # cards and pictures may have the folder's name
        content.mkdir()
        yield content
        if folder.is_dir():
            folder.rmdir()  # which refuses a folder that is not empty
        content.rename(folder)


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` that no other process uses; a file left under it is deleted."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
