"""The project's pages, their snippets and their command lines."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# A snippet under this comment is not run, or its command lines are not parsed, for the reason that it gives.
SKIPPED = re.compile(r"<!-- not (?:run|parsed): [^>]+ -->\n$")
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.S | re.M)


class Snippet(NamedTuple):
    """A fenced block of a page.

    Attributes:
        language: as the fence names it.
        code: its text.
        line: of the page, where the code starts.
        skipped: a comment before it says why it does not run.
    """

    language: str
    code: str
    line: int
    skipped: bool


def pages() -> list[Path]:
    """Every page, as a path below the repository."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [path.relative_to(ROOT) for path in [*top, *sorted(DOCS.rglob("*.md"))]]


def guides() -> list[Path]:
    """The pages whose Python runs: README, tutorials and how-to pages."""
    return [page for page in pages() if page.name == "README.md" or page.parts[1:2] in (("tutorials",), ("how_to",))]


def read(page: Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def snippets(page: Path, language: str) -> list[Snippet]:
    """The blocks of one language, in order."""
    text = read(page)
    return [
        Snippet(match[1], match[2], text[: match.start()].count("\n") + 2, bool(SKIPPED.search(text[: match.start()])))
        for match in _FENCE.finditer(text)
        if match[1] == language
    ]


def command_lines(page: Path) -> list[list[str]]:
    """Arguments of `clover` in every command line of a page: in blocks of bash and in code within a line."""
    text = _FENCE.sub("", read(page))
    lines = [line for block in snippets(page, "bash") if not block.skipped for line in block.code.splitlines()]
    lines += re.findall(r"`(clover [a-z-]+ [^`]+)`", text)
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["clover"]:
            found.append(words[1:])
        elif "clover_peft" in words:  # python -m clover_peft, accelerate launch --module clover_peft
            found.append(words[words.index("clover_peft") + 1 :])
        elif any(word.endswith("scripts/sft.py") for word in words):
            start = next(i for i, word in enumerate(words) if word.endswith("scripts/sft.py"))
            found.append(["sft", *words[start + 1 :]])
    return found
