"""The page of tested versions says what pyproject.toml, the constraints and the check at the import say."""

from __future__ import annotations

import re

from packaging.requirements import Requirement
from packaging.version import Version

from clover_peft.runtime.tested_versions import NEWEST
from tests.support.pages import DOCS, ROOT, read

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (DOCS / "reference" / "versions.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \w+ \| \d", line)
]
OLDEST, PINNED, NEW = ({row[0]: Version(row[i]) for row in ROWS} for i in (1, 2, 3))


def pins(name: str) -> dict[str, Version]:
    lines = (Requirement(line) for line in read(ROOT / name).splitlines() if line and not line.startswith("#"))
    return {line.name: Version(str(line.specifier).removeprefix("==")) for line in lines}


def test_the_table_has_the_packages_that_oldest_pins():
    assert pins("constraints-oldest.txt") == OLDEST


def test_the_oldest_are_the_bounds_of_pyproject():
    found = re.findall(r'"([\w-]+)>=([\d.]+)"', read(ROOT / "pyproject.toml"))
    bounds = {name: Version(bound) for name, bound in found if name in OLDEST}
    assert bounds == OLDEST


def test_the_middle_column_is_that_of_the_constraints():
    pinned = pins("constraints.txt")
    assert {name: pinned[name] for name in PINNED} == PINNED


def test_the_newest_are_what_the_check_at_the_import_knows():
    assert {name: NEW[name].release[: len(newest)] for name, newest in NEWEST.items()} == NEWEST
    assert all(OLDEST[name] <= PINNED[name] <= NEW[name] for name in OLDEST)
