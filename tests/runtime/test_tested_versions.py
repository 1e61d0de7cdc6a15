"""A version that is newer than the tests know is named once, at the import; a tested one is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from clover_peft.runtime import tested_versions

INSTALLED = {"torch": "2.13.0+cpu", "peft": "0.21.2", "transformers": "5.24.0"}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({}, []),
        ({"torch": "2.99.1", "peft": "0.21.9", "transformers": "5.24.7"}, []),
        ({"torch": "1.13.1", "peft": "0.20.0", "transformers": "4.57.0"}, []),
        ({"transformers": "5.25.0.dev0"}, ["transformers 5.25.0.dev0 (newest tested: 5.24)"]),
        ({"peft": "0.22.0rc1"}, ["peft 0.22.0rc1 (newest tested: 0.21)"]),
        ({"torch": "3.0.0a0+git1"}, ["torch 3.0.0a0+git1 (newest tested: 2)"]),
        ({"torch": "3.1", "peft": "1.0.0"}, ["torch 3.1 ", "peft 1.0.0 "]),
    ],
)
def test_newer_packages_are_named(changed, named, monkeypatch):
    monkeypatch.setattr(tested_versions, "version", (INSTALLED | changed).__getitem__)
    found = tested_versions.untested() or ""
    assert found.count("newest tested") == len(named)
    assert all(name in found for name in named)


def test_a_package_without_metadata_is_passed_over(monkeypatch):
    def version(name):
        raise tested_versions.PackageNotFoundError(name)

    monkeypatch.setattr(tested_versions, "version", version)
    assert tested_versions.untested() is None


def test_the_import_warns_once_at_the_user_s_line(tmp_path: Path):
    script = tmp_path / "user.py"
    script.write_text(
        "import importlib.metadata as metadata\n"
        "import torch, peft, transformers\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '99.0' if name == 'peft' else real(name)\n"
        "import clover_peft\n"
        "import clover_peft\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, "-W", "always", str(script)], capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "has not been tested with" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"{script}:5: UserWarning: ")
    assert "peft 99.0 (newest tested: 0.21)" in lines[0]
