"""Pages link to files outside of `docs/`, such as records, by relative paths, so that the links work on a forge.
The built site gets a copy of those files, so that the same links work there; a link to a missing file fails the build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)")
_FOLDER = "repository"  # in the built site


def on_files(files: Files, config: Any) -> Files:
    """Adds the linked files of the repository to those of the site."""
    root = Path(config["docs_dir"]).parent
    for page in list(files.documentation_pages()):
        for link in _LINK.findall(page.content_string):
            path = _outside(page.src_uri, link)
            if path and (root / path).is_file() and f"{_FOLDER}/{path}" not in files.src_uris:
                content = (root / path).read_bytes()
                files.append(File.generated(config, f"{_FOLDER}/{path}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads the links to the copies."""

    def rewrite(match: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, match[1])
        if path is None:
            return match[0]
        return f"]({posixpath.relpath(f'{_FOLDER}/{path}', posixpath.dirname(page.file.src_uri) or '.')}"

    return _LINK.sub(rewrite, markdown)


def _outside(page: str, link: str) -> str | None:
    """The path from the repository's root that a link of a page means; None for a page of the documentation."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return target.removeprefix("../") if target.startswith("../") else None
