"""Only the experiments that train need an extra: every other module is importable without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import clover_peft
from clover_peft.io.extras import missing

PACKAGE = Path(clover_peft.__file__).parent
EXTRAS = ("trl", "datasets", "gguf", "bitsandbytes", "matplotlib")
ROOMS = (
    "linalg",
    "runtime",
    "io",
    "base_model",
    "tuner",
    "pruning",
    "experiments/commonsense",
    "experiments/analysis",
)
CODE = f"""
import importlib, json, sys
for name in {EXTRAS}:
    sys.modules[name] = None  # an import of it fails from now on
failed = {{}}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
print(json.dumps(failed))
"""


def modules(room: str) -> list[str]:
    paths = (path.relative_to(PACKAGE.parent).with_suffix("") for path in (PACKAGE / room).rglob("*.py"))
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


def test_no_room_needs_an_extra_and_training_names_its_own():
    names = [name for room in ROOMS for name in modules(room)]
    assert {"clover_peft.io.hub_models", "clover_peft.pruning"} <= set(names)
    training = "clover_peft.experiments.training"
    command = [sys.executable, "-c", CODE, *names, training]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    failed = json.loads(done.stdout.splitlines()[-1])
    assert missing("trl") in failed.pop(training)
    assert failed == {}
