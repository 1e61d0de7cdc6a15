"""The newest versions of other packages that the tests have run with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

# Package -> newest version tested, as far as a difference matters: torch changes little between major versions.
NEWEST = {"torch": (2,), "peft": (0, 21), "transformers": (5, 24)}


def untested() -> str | None:
    """Names the installed packages that are newer than the tests know, in a sentence; None if there are none."""
    newer = []
    for name, newest in NEWEST.items():
        try:
            found = version(name)
        except PackageNotFoundError:  # not installed as a package, as a checkout on the path
            continue
        if Version(found).release[: len(newest)] > newest:
            newer.append(f"{name} {found} (newest tested: {'.'.join(map(str, newest))})")
    if not newer:
        return None
    return (
        f"clover_peft has not been tested with {', '.join(newer)}; if something fails, try the versions of "
        "docs/reference/versions.md"
    )
