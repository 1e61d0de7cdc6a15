"""`clover`: finding and parsing subcommands without torch, missing extras, and the wrappers in scripts/."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

import clover_command
from clover_peft import __version__
from clover_peft.cli import command, parsers
from clover_peft.experiments.commonsense import sources
from clover_peft.io import text_windows
from clover_peft.io.extras import missing
from clover_peft.pruning.rule import SPREADS
from tests.support.tiny import build

ROOT = Path(__file__).parents[2]
COMMANDS = [*command.COMMANDS]
# Prints the modules that a command line has imported by the time it ends.
RUN = "import clover_command, sys\ntry: clover_command.main()\nfinally: print(*sys.modules, file=sys.stderr)"


def start(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_answers_without_importing_torch(arguments):
    done = start(*arguments)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: clover")
    imported = set(done.stderr.split())
    assert "clover_peft" in imported
    assert not imported & {"torch", "peft", "transformers", "numpy"}


def test_help_lists_every_command():
    shown = start("--help").stdout
    for name, each in command.COMMANDS.items():
        assert f"  {name} " in shown
        assert each.help in shown
    assert [*parsers.PARSERS] == COMMANDS


def test_wrong_command_lines_are_refused_without_importing_torch():
    for arguments, message in (
        (["prunee"], "invalid choice: 'prunee'"),
        ([], "required: COMMAND"),
        (["plan"], "one of the arguments --model is required"),
    ):
        done = start(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert "torch" not in done.stderr.split()
    assert start("--version").stdout.strip() == __version__


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "run"])
def test_a_script_is_its_subcommand(name):
    script = ROOT / "scripts" / f"{name.replace('-', '_')}.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: clover {name} ")


def test_what_parsers_repeat_is_what_the_package_has():
    assert set(parsers.SPREADS) == set(SPREADS)
    help_text = start("prune", "--help").stdout
    for number, text in (
        (text_windows.DEFAULT_ROWS, "windows of calibration text, at most; {} by default"),
        (text_windows.DEFAULT_LENGTH, "tokens of a window; by default {}"),
        (text_windows.DEFAULT_BATCH, "windows at a time, {} by default"),
    ):
        assert text.format(number) in " ".join(help_text.split())


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("trl", ["sft", "--config", "clover_full"]),
        ("datasets", ["sft", "--config", "clover_full"]),
        ("trl", ["ablate", "--config", "smollm2", "--out", "out"]),
    ],
)
def test_a_missing_extra_is_named_in_one_sentence(module, arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert clover_command.main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: clover {arguments[0]}: expected the package {module}, found none; "
        f'run pip install -c constraints.txt -e ".[train]" in {ROOT}'
    )


def test_an_extra_that_only_an_option_needs_is_named_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    assert clover_command.main(["prepare-data", str(tmp_path / "out"), "--source", "hub"]) == 2
    assert f"error: {missing('datasets')}\n" in capsys.readouterr().err


def test_other_commands_need_no_extra(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    lines = [
        ["prune", str(tmp_path / "model"), "--ratio", "vo=0.5", "--no-pictures", "--out", str(tmp_path / "out")],
        ["spectra", str(tmp_path / "model")],
        ["plan", "--model", str(tmp_path / "model")],
    ]
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['trl', 'datasets', 'gguf', 'matplotlib', 'bitsandbytes']))\n"
        f"import clover_command; sys.exit(max(map(clover_command.main, {lines!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "pruning.json").is_file()


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "clover_peft", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == __version__


# Prints OMP_WAIT_POLICY as it was when torch began to be imported.
_WATCH = """
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print("policy at torch:", os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Watch())
"""


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (
            ["-c", "import sys, clover_command; sys.exit(clover_command.main())", "run", "-m", "json.tool", "-h"],
            "passive",
        ),
        (["-m", "clover_peft", "run", "-m", "json.tool", "-h"], "passive"),
        (["-mclover_peft", "--version"], "passive"),
        (["-c", "import clover_peft", "-m", "clover_peft"], "None"),
        (["-m", "program", "clover_peft"], "None"),
    ],
    ids=["clover", "python -m", "python -m without a space", "import", "import by another module"],
)
def test_the_command_alone_lets_threads_sleep_before_torch_is_imported(arguments, found, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(_WATCH)
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__init__.py").write_text("import clover_peft")
    (tmp_path / "program" / "__main__.py").write_text("")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])

    def policy(**more):
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=environment | more, check=True
        )
        return next(line.split()[-1] for line in done.stdout.splitlines() if line.startswith("policy at torch:"))

    assert policy() == found
    if arguments[0] == "-mclover_peft":
        assert policy(OMP_WAIT_POLICY="active") == "active"


@pytest.mark.parametrize(("name", "shown"), [("export", 0), ("run", 1)])
def test_commands_hide_that_peft_uses_an_old_name_and_nothing_else(name, shown, monkeypatch):
    def run(given):
        warnings.warn(
            "`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1
        )
        warnings.warn("`is_something_else` is deprecated", FutureWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(importlib, "import_module", lambda *_: SimpleNamespace(run=run))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert command.run(name, argparse.Namespace()) == 0
    assert len(said) == 1 + shown
