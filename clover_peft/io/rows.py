"""Rows of data in JSON Lines files: one JSON value a line, compressed with gzip where the name ends in `.gz`."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Located = tuple[str, Any, str | None]  # "file:line", the row, and why there is none


def is_rows_file(path: Path) -> bool:
    """Whether a file's name is that of JSON Lines."""
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def is_text_file(path: Path) -> bool:
    """Whether a file's name is that of plain text."""
    return path.name.endswith((".txt", ".txt.gz"))


def find_text(source: str) -> tuple[Path, str | None]:
    """A text's file and its kind, ".txt" or ".jsonl"; no kind stands for the name of a data set on the hub.

    Raises:
        ValueError: the file does not exist, or is of another kind.
    """
    path = Path(source).expanduser()
    kind = next((k for k in (".txt", ".jsonl") if path.name.endswith((k, f"{k}.gz"))), None)
    if (kind is None and path.exists()) or (kind is not None and not path.is_file()):
        raise ValueError(
            f"{source}: expected a .txt or .jsonl file, with .gz or without, or the name of a data set on the hub, "
            f"found {'no such file' if not path.exists() else 'a folder' if path.is_dir() else 'another file'}"
        )
    return path, kind


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file of text, uncompressed, each with its newline.

    Raises:
        ValueError: the file cannot be read, or its gzip data are damaged; the message has the line.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as lines:
            for line in lines:
                number += 1
                yield line
    except (OSError, EOFError, zlib.error) as error:
        kind = ("gzip'd " * (path.suffix == ".gz") + "JSON lines") if is_rows_file(path) else "text in UTF-8"
        raise ValueError(f"{path.name}: expected {kind}, found damage after {number} lines: {error}") from error


def parse_row(line: bytes) -> tuple[Any, str | None]:
    """Parse one line.

    Returns:
        The row and None, or None and what is wrong with the line.
    """
    try:
        return json.loads(line.rstrip(b"\r\n").decode("utf-8-sig")), None
    except UnicodeDecodeError as error:
        return None, f"expected UTF-8, found byte 0x{line[error.start]:02x} at column {error.start + 1}"
    except json.JSONDecodeError as error:
        return None, f"expected one JSON object, found {error.msg} at column {error.colno}"


def read_rows(path: Path) -> Iterator[Located]:
    """Yield `("file:line", row, None)`, or `("file:line", None, problem)`, for each line that is not blank.

    Raises:
        ValueError: see `read_lines`.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            yield f"{path.name}:{number}", *parse_row(line)


def write_rows(path: Path, rows: Iterable[Row]) -> str:
    """Write rows; the same rows give the same bytes, since gzip's header is left without a time and a name.

    Returns:
        sha256 of the text, uncompressed.
    """
    digest = hashlib.sha256()
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("wb"))
        if path.suffix == ".gz":
            file = stack.enter_context(gzip.GzipFile(fileobj=file, mode="wb", mtime=0, filename=""))
        for row in rows:
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            digest.update(line)
            file.write(line)
    return digest.hexdigest()
