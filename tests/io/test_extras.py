"""How to install an extra: in a checkout, and from a wheel."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from clover_peft.io import extras

ROOT = Path(__file__).parents[2]


def test_in_a_checkout_the_command_installs_the_checkout():
    text = extras.how_to_install("train")
    command = shlex.split(text.removeprefix("run ").partition(" in ")[0])
    assert command == ["pip", "install", "-c", "constraints.txt", "-e", ".[train]"]
    folder = Path(text.partition(" in ")[2])
    assert folder == ROOT
    assert (folder / "constraints.txt").is_file()


def test_from_a_wheel_it_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "_FOLDER", tmp_path)
    assert extras.missing("matplotlib").endswith(
        'expected the package matplotlib, found none; pip install "clover-peft[plots]"'
    )


def test_every_package_is_in_its_extra():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in extras.EXTRAS.items():
        if package != "pyarrow":  # a dependency of datasets
            assert any(line.startswith(package) for line in declared[extra])
