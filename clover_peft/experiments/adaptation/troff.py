"""Manual pages in troff's man macros, as plain text."""

from __future__ import annotations

import re
import shlex

_SPACED = {"B", "I", "R", "SM", "SB"}  # arguments with spaces between
_JOINED = {"BR", "RB", "BI", "IB", "RI", "IR"}  # arguments of alternating fonts, in one piece
_BREAKS = {"PP", "LP", "P", "sp", "TP", "TQ", "HP", "br", "SH", "SS", "RS", "RE", "IP"}
_MDOC = re.compile(r"^\.(Dd|Sh) ", re.MULTILINE)
# ruff: noqa: RUF001
_CHARACTERS = {
    "aq": "'",
    "dq": '"',
    "lq": "“",
    "rq": "”",
    "oq": "‘",
    "cq": "’",
    "Fo": "«",
    "Fc": "»",
    "Bq": "„",
    "em": "—",
    "en": "–",
    "bu": "•",
    "co": "©",
    "rs": "\\",
    "ha": "^",
    "ti": "~",
    "ga": "`",
    "mu": "×",
    "<=": "≤",
    ">=": "≥",
    "->": "→",
    "+-": "±",
    "de": "°",
    "mc": "µ",
    "Eu": "€",
    "tm": "™",
    "rg": "®",
}
_ESCAPE = re.compile(
    r"""\\(?:
        (?P<comment>["\#].*)
      | f(?:\[[^]]*\]|\(..|.)                        # fonts
      | s(?:\[[^]]*\]|[-+]?\d+)                      # sizes
      | [hvwlLDbo]'[^']*'                            # motions and widths
      | [nmkMF](?:\[[^]]*\]|\(..|.)                  # registers and colours
      | \*(?:\[(?P<string_long>[^]]*)\]|\((?P<string>..)|.)
      | \[u(?P<code>[0-9A-F]{4,6})\]
      | \[(?P<long>[^]]*)\]
      | \((?P<short>..)
      | (?P<literal>[-'`e.\ ~0])
      | .
    )""",
    re.VERBOSE,
)
_LITERALS = {"e": "\\", "~": " ", "0": " "}


def plain_text(source: str, last_section: str | None = None) -> str:
    """The text of a page: headings, paragraphs and examples, without fonts, tables, comments and definitions.

    Args:
        source: the page.
        last_section: heading of a section at which the page is cut off, such as that of its translators.

    Returns:
        Its text; nothing for a page in the mdoc macros, or one that only refers to another.
    """
    if _MDOC.search(source):
        return ""
    lines: list[str] = []
    paragraph: list[str] = []
    skipped_until: str | None = None
    fills, heading, depth = True, False, 0

    def flush() -> None:
        if paragraph:
            lines.append(" ".join(" ".join(paragraph).split()))
            paragraph.clear()

    for raw in source.splitlines():
        if skipped_until is not None:
            skipped_until = None if raw.startswith(skipped_until) else skipped_until
            continue
        depth_before, depth = depth, max(0, depth + raw.count("\\{") - raw.count("\\}"))
        if depth_before or depth:  # a conditional block, for some devices only
            continue
        if not raw.startswith((".", "'")):
            text = unescape(raw)
            if heading and text.strip() == last_section:
                break
            if fills:
                paragraph.append(text)
                if heading or not text.strip():
                    flush()
            else:
                lines.append(text.rstrip())
            heading = False
            continue
        name, arguments = _request(raw)
        if name in ("de", "de1", "am", "ig"):
            skipped_until = ".."
        elif name == "TS":
            skipped_until = ".TE"
        elif name in _SPACED or name in _JOINED:
            piece = (" " if name in _SPACED else "").join(arguments)
            paragraph.append(piece) if fills else lines.append(piece)
        elif name in ("UR", "MT"):
            paragraph.extend(arguments[:1])
        elif name in ("URL", "MTO") and arguments:  # of asciidoctor: address, text, what follows
            paragraph.append("".join([next(filter(None, arguments[1::-1]), ""), *arguments[2:3]]))
        elif name in ("UE", "ME") and paragraph and arguments:
            paragraph[-1] += arguments[0]
        elif name in _BREAKS:
            flush()
            if name in ("SH", "SS"):
                if " ".join(arguments) == last_section:
                    break
                lines.extend(["", " ".join(arguments)] if arguments else [""])
                heading = not arguments
            elif name == "IP" and arguments:
                paragraph.append(arguments[0])
        if name in ("nf", "EX", "fi", "EE"):
            flush()
            fills = name in ("fi", "EE")
    flush()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def unescape(text: str) -> str:
    """Text with troff's escapes replaced by what they print."""
    return _ESCAPE.sub(_replace, text)


def _replace(found: re.Match[str]) -> str:
    if found["literal"] is not None:
        return _LITERALS.get(found["literal"], found["literal"])
    if found["code"] is not None:
        return chr(int(found["code"], 16))
    name = next((found[key] for key in ("short", "long", "string", "string_long") if found[key] is not None), None)
    return "" if name is None else _CHARACTERS.get(name, "")


def _request(line: str) -> tuple[str, list[str]]:
    """A request's name and its arguments, unescaped."""
    name, _, rest = line[1:].strip().partition(" ")
    rest = rest.replace("\\ ", "\\~")  # no end of an argument
    reader = shlex.shlex(rest, posix=True)
    reader.whitespace_split, reader.commenters, reader.quotes, reader.escape = True, "", '"', ""
    try:
        arguments = list(reader)
    except ValueError:  # a quotation mark that nothing closes
        arguments = rest.replace('"', "").split()
    return name, [unescape(argument) for argument in arguments]
