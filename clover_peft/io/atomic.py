"""Files and folders that appear complete or not at all, also where a run is killed or two runs write at once."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
    """Check that a folder can be written by `new_folder`.

    Args:
        folder: the folder.
        where: what the error says before its name, such as an option.

    Raises:
        ValueError: if there are files in it, or in its place, or no folder can be made there.
    """
    expected, final = f"{where}{folder}: expected a new or empty folder", _resolved(folder)
    if final.is_symlink():
        raise ValueError(f"{expected}, found a link that leads back to itself; choose another")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"{expected}, found files; choose another")
    place = _workplace(final)
    place = next(path for path in (place, *place.parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"{expected}, found the file {place} in its way; choose another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{expected}, found that {place} cannot be written to; choose another or change its rights")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, which is renamed to it when the context ends without an error.

    An empty folder that cannot be replaced, such as a mount point or the working directory, stays: what was written is
    moved into it, one rename each, at the end. A run that is killed before leaves only a hidden folder.

    Args:
        folder: the final place, which must be free or an empty folder, or a link to one.
    """
    final = _resolved(folder)
    place = _workplace(final)
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{final.name}-") as temporary:
        content = Path(temporary) / final.name  # cards and pictures may have the folder's name
        content.mkdir()
        yield content
        if final.is_dir() and place != final:
            with suppress(OSError):  # the system may not let it go, or there are files in it by now
                final.rmdir()
        if final.is_dir():
            _move_into(final, content)
        else:
            content.rename(final)


def _resolved(folder: Path) -> Path:
    """The absolute path without links; what a link that leads nowhere names is the new folder."""
    return Path(os.path.realpath(folder))


def _workplace(folder: Path) -> Path:
    """Where a folder is built: beside its place, or within it where it is there and cannot be replaced."""
    stays = folder.is_dir() and (
        os.path.ismount(folder) or os.path.samefile(folder, os.curdir) or not os.access(folder.parent, os.W_OK)
    )
    return folder if stays else folder.parent


def _move_into(folder: Path, content: Path) -> None:
    """Move what is in `content` into a folder that has nothing else; after an error it has nothing again."""
    if others := set(folder.iterdir()) - {content.parent}:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(min(others)))
    # A model or adapter without its configuration is not taken for a whole one.
    parts = sorted(content.iterdir(), key=lambda part: (part.name.endswith("config.json"), part.name))
    try:
        for part in parts:
            shutil.move(part, folder / part.name)  # which copies where a rename cannot go, as into a bind mount
    except BaseException:
        for part in parts:
            moved = folder / part.name
            if moved.is_dir():
                shutil.rmtree(moved, ignore_errors=True)
            else:
                moved.unlink(missing_ok=True)
        raise


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` that no other process uses; a file left under it is deleted."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
