"""Text domains: documents of one kind of text, split into training, validation and test by their hashes."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...io import atomic
from ...io import run_record as records
from ...io.downloads import cache_root, hub_reachable
from ...io.rows import read_lines
from .troff import plain_text

SPLITS = {"train": 6, "validation": 2, "test": 2}  # of ten documents
SHORTEST = 500  # characters of a document
LONGEST = 8_000_000  # characters of a domain
_PIECE = 4_000  # characters of a document that is cut from one text
_TITLE = re.compile(r"^ = [^=].* = $")
# Tables, generated data and tests are no prose of a programmer.
_NOT_SOURCE = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "__pycache__",
}
_TRANSLATORS = "TRADUCTION"  # the last section of every French page, alike in all


@dataclass(frozen=True)
class Document:
    """A text and where it was found."""

    name: str
    text: str

    @cached_property
    def key(self) -> str:
        """Its hash, by which it is split and known in records."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def split(self) -> str:
        """The split that it belongs to, whatever other documents there are."""
        place = int(self.key[:8], 16) % sum(SPLITS.values())
        return next(split for split in SPLITS if (place := place - SPLITS[split]) < 0)


@dataclass(frozen=True)
class Domain:
    """A kind of text.

    Attributes:
        name: as the experiment calls it.
        origin: what a record says of its source.
        documents: in the order of their keys, without repeats.
    """

    name: str
    origin: dict[str, Any]
    documents: list[Document]

    def of(self, split: str) -> list[Document]:
        """The documents of a split."""
        return [document for document in self.documents if document.split == split]

    def describe(self) -> dict[str, Any]:
        """What a record says of it."""
        keys = hashlib.sha256("".join(document.key for document in self.documents).encode()).hexdigest()
        counts = {split: len(self.of(split)) for split in SPLITS}
        return {**self.origin, "documents": counts, "sha256": keys}


def read_domain(name: str, source: str) -> Domain:
    """Reads a domain.

    Args:
        name: as the experiment calls it.
        source: "wikitext2" (the folder that CLOVER_DATA names, else the hub), "manpages-fr" (Debian's package, by
            apt), "manpages-fr:<folder>" (its manual pages), "python" (the standard library of this interpreter),
            "python:<package>" (one package of it), or "text:<path>" (a `.txt` file, with `.gz` or without, or a folder
            of them).

    Raises:
        ValueError: there is no such source, it cannot be had, or it has no documents of a split.
    """
    kind, _, where = source.partition(":")
    if kind not in _READERS:
        raise ValueError(f"domains.{name}: expected one of {', '.join(_READERS)}, found {source!r}")
    origin, found = _READERS[kind](where)
    documents: dict[str, Document] = {}
    for document in found:
        if len(document.text) >= SHORTEST:
            documents.setdefault(document.key, document)
    kept, characters = [], 0
    for key in sorted(documents):
        if characters < LONGEST:
            kept.append(documents[key])
            characters += len(documents[key].text)
    domain = Domain(name, {"source": kind, **origin, "characters": characters}, kept)
    if empty := [split for split in SPLITS if not domain.of(split)]:
        raise ValueError(
            f"domains.{name}: expected documents of at least {SHORTEST} characters in every split, found none for "
            f"{empty[0]} among {len(kept)}; give it more text"
        )
    return domain


def _wikitext2(where: str) -> tuple[dict[str, Any], Iterator[Document]]:
    root = os.environ.get("CLOVER_DATA")
    folder = Path(root or "") / "wikitext2"
    if root and folder.is_dir():
        files = [folder / f"{split}.txt.gz" for split in ("train", "validation", "test")]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise ValueError(f"CLOVER_DATA: expected {missing[0]}, found none")
        lines = (line for file in files for line in _read(file).splitlines(keepends=True))
        return {"from": "CLOVER_DATA", "files_sha256": records.digest(files)}, _articles(lines)
    if not hub_reachable():
        raise ValueError("wikitext2: expected CLOVER_DATA to name a folder with wikitext2/, found none, and no hub")
    import datasets

    sets = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
    rows = (row["text"] for split in ("train", "validation", "test") for row in sets[split])
    return {"from": "hub: Salesforce/wikitext"}, _articles(rows)


def _articles(lines: Iterable[str]) -> Iterator[Document]:
    """Articles begin with a title between single equals signs."""
    title, text = "", list[str]()
    for line in lines:
        if _TITLE.match(line.rstrip("\n")):
            yield Document(title, "".join(text))
            title, text = line.strip(" =\n"), []
        text.append(line)
    yield Document(title, "".join(text))


def _manual_pages(where: str) -> tuple[dict[str, Any], Iterator[Document]]:
    if where:
        folder, origin = Path(where).expanduser(), {"from": "a folder"}
    else:
        folder = atomic.build_once(cache_root() / "text" / "manpages-fr", _fetch_manual_pages)
        origin = records.read_json(folder / "origin.json", f"delete {folder}")
    pages = sorted(folder.rglob("man[1-8]/*.[1-8]*"))
    if not pages:
        raise ValueError(f"manpages-fr: expected a folder with man1/, man5/ and so on, found none in {folder}")
    return origin, (Document(page.name, plain_text(_read(page), _TRANSLATORS)) for page in pages)


def _fetch_manual_pages(folder: Path) -> None:
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise ValueError(
            f"manpages-fr: expected {missing[0]}, which fetches Debian's package, found none; unpack the package "
            "elsewhere and name its folder: manpages-fr:<folder>"
        )
    with tempfile.TemporaryDirectory() as temporary:
        done = subprocess.run(["apt-get", "download", "manpages-fr"], cwd=temporary, capture_output=True, text=True)
        files = list(Path(temporary).glob("*.deb"))
        if done.returncode or len(files) != 1:
            reason = (done.stderr.strip() or "no output").splitlines()[-1]
            raise ValueError(
                f"manpages-fr: expected apt-get to download one package, found: {reason}; run apt-get update, or name "
                "a folder with the pages: manpages-fr:<folder>"
            )
        show = ["dpkg-deb", "--field", str(files[0]), "Version"]
        version = subprocess.run(show, check=True, capture_output=True, text=True).stdout.strip()
        subprocess.run(["dpkg-deb", "--extract", str(files[0]), str(folder)], check=True)
        records.write(folder / "origin.json", {"from": f"Debian, {version}", "package_sha256": records.digest(files)})


def _python(where: str) -> tuple[dict[str, Any], Iterator[Document]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    root = library / where
    if not root.is_dir():
        raise ValueError(f"python:{where}: expected a package of the standard library, found none in {library}")
    files = sorted(f for f in root.rglob("*.py") if not _NOT_SOURCE & set(f.relative_to(library).parts))
    documents = (Document(str(file.relative_to(library)), _read(file)) for file in files)
    return {"from": f"Python {platform.python_version()}" + (f", {where}" if where else "")}, documents


def _text(where: str) -> tuple[dict[str, Any], Iterator[Document]]:
    path = Path(where).expanduser()
    files = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".gz")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"text:{where}: expected a .txt file or a folder of them, found none")
    documents = (document for file in files for document in _pieces(file.name, _read(file)))
    return {"from": path.name, "files_sha256": records.digest(files)}, documents


def _pieces(name: str, text: str) -> Iterator[Document]:
    """Runs of paragraphs of some thousand characters."""
    held: list[str] = []
    for paragraph in text.split("\n\n"):
        held.append(paragraph)
        if sum(map(len, held)) >= _PIECE:
            yield Document(name, "\n\n".join(held))
            held = []
    yield Document(name, "\n\n".join(held))


def _read(file: Path) -> str:
    """A file's text, with `\n` at the end of each line."""
    return b"".join(read_lines(file)).decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\r", "\n")


_READERS: dict[str, Callable[[str], tuple[dict[str, Any], Iterator[Document]]]] = {
    "wikitext2": _wikitext2,
    "manpages-fr": _manual_pages,
    "python": _python,
    "text": _text,
}
