"""Patches that the proposals offer to other projects do what their pages say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
from peft import get_peft_model

from clover_peft import CloverConfig
from tests.support.pages import DOCS, ROOT
from tests.support.tiny import build, perturb

_LOADS = """
import json, os, sys
import peft, torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_config
from transformers import AutoModelForCausalLM

base, adapter = sys.argv[1:]
ways = {
    "PeftConfig": lambda: PeftConfig.from_pretrained(adapter),
    "get_peft_config": lambda: get_peft_config(json.load(open(adapter + "/adapter_config.json"))),
    "PeftModel": lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    "AutoPeftModel": lambda: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "transformers": lambda: AutoModelForCausalLM.from_pretrained(adapter),
    "load_adapter": lambda: AutoModelForCausalLM.from_pretrained(base).load_adapter(adapter),
}
assert "clover_peft" not in sys.modules
assert "_ConfigMapping" in dir(peft.mapping), peft.__file__
torch.set_num_threads(1)
for name, load in ways.items():
    if (child := os.fork()) == 0:
        try:
            load()
            assert "clover_peft" in sys.modules
            print(name, flush=True)
        except BaseException as error:
            print(name, type(error).__name__, error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
WAYS = ["PeftConfig", "get_peft_config", "PeftModel", "AutoPeftModel", "transformers", "load_adapter"]


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the path, with the installed peft as the proposal changes it."""
    if version("peft") != "0.21.2":
        pytest.skip(f"the patch is one of peft 0.21.2, and peft {version('peft')} is installed")
    if shutil.which("git") is None:
        pytest.skip("git, which applies the patch, is not installed")
    folder = tmp_path_factory.mktemp("patched")
    shutil.copytree(Path(peft.__file__).parent, folder / "peft", ignore=shutil.ignore_patterns("__pycache__"))
    patch = DOCS / "proposals" / "peft_entry_points.patch"
    # Within a checkout git would take the paths for the checkout's.
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(["git", "apply", "-p2", str(patch)], cwd=folder, env=outside, check=True)
    return folder


def _load_all(patched: Path, tmp_path: Path) -> list[str]:
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, CloverConfig(task_type="CAUSAL_LM"))
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    path = os.pathsep.join([str(patched), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-c", _LOADS, str(tmp_path / "base"), str(tmp_path / "adapter")]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def _declare(folder: Path, group: str) -> None:
    """What pip leaves of `clover-peft` in the environment: its entry point, or none of this group."""
    about = folder / "clover_peft-0.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: clover-peft\nVersion: 0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\nclover = clover_peft\n")


def test_a_patched_peft_finds_the_package_in_every_way_of_loading(patched: Path, tmp_path: Path) -> None:
    _declare(patched, "peft.tuners")
    assert _load_all(patched, tmp_path) == WAYS


def test_a_patched_peft_says_what_it_looked_for(patched: Path, tmp_path: Path) -> None:
    _declare(patched, "another.group")
    lines = _load_all(patched, tmp_path)
    assert [line.split()[0] for line in lines] == WAYS
    assert all("KeyError" in line and "entry point 'clover' in the group 'peft.tuners'" in line for line in lines)
