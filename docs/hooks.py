"""Pages link to files outside of `docs/`, such as records, by relative paths, so that the links work on a forge.
The built site gets a copy of those files, so that the same links work there; a link to a missing file fails the build.
A linked page, such as CONTRIBUTING.md, becomes a page of the site, and its links lead on.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

_LINK = re.compile(r"\]\(((?!/|[a-z]+:)[^)#\s]+)")
_FOLDER = "repository"  # in the built site


def on_files(files: Files, config: Any) -> Files:
    """Adds the linked files of the repository to those of the site."""
    docs = Path(config["docs_dir"])
    pages = list(files.documentation_pages())
    for page in pages:  # grows by the pages that are linked
        for link in _LINK.findall(page.content_string):
            path = _linked(page.src_uri, link, docs.name)
            source = docs.parent / path
            if (
                path.startswith((f"{docs.name}/", "../"))
                or not source.is_file()
                or f"{_FOLDER}/{path}" in files.src_uris
            ):
                continue
            copy = File.generated(
                config, f"{_FOLDER}/{path}", content=source.read_bytes(), inclusion=InclusionLevel.NOT_IN_NAV
            )
            files.append(copy)
            if copy.is_documentation_page():
                pages.append(copy)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Leads the links to the copies."""
    docs = Path(config["docs_dir"]).name
    folder = posixpath.dirname(page.file.src_uri) or "."

    def rewrite(match: re.Match[str]) -> str:
        path = _linked(page.file.src_uri, match[1], docs)
        inside = path.startswith(f"{docs}/")
        return f"]({posixpath.relpath(path.removeprefix(f'{docs}/') if inside else f'{_FOLDER}/{path}', folder)}"

    return _LINK.sub(rewrite, markdown)


def _linked(page: str, link: str, docs: str) -> str:
    """The path from the repository's root that a link of a page of the site means."""
    copied = page.startswith(f"{_FOLDER}/")
    source = page.removeprefix(f"{_FOLDER}/") if copied else f"{docs}/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
