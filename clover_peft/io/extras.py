"""The packages that belong to extras, and how to install those. Without torch, for the checks of a command line."""

from __future__ import annotations

from pathlib import Path

# Package -> the extra that installs it.
EXTRAS = {
    **dict.fromkeys(("trl", "datasets", "pyarrow", "gguf"), "train"),
    "matplotlib": "plots",
    "bitsandbytes": "quant",
}
_FOLDER = Path(__file__).parents[2]


def how_to_install(extra: str) -> str:
    """The command that installs an extra: in a checkout, for the checkout and at the tested versions."""
    if (_FOLDER / "pyproject.toml").is_file() and (_FOLDER / "constraints.txt").is_file():
        return f'run pip install -c constraints.txt -e ".[{extra}]" in {_FOLDER}'
    return f'pip install "clover-peft[{extra}]"'


def missing(package: str) -> str:
    """The sentence that names a package which is not installed, and how to install the extra that it belongs to."""
    return f"expected the package {package}, found none; {how_to_install(EXTRAS[package])}"
