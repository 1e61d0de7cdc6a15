"""`clover run`: programs that do not import clover_peft load CLOVER adapters, and run as Python would run them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from peft import get_peft_model

import clover_command
from clover_peft import CloverConfig
from tests.support.tiny import build

ROOT = Path(__file__).parents[2]
CLOVER = [sys.executable, "-c", "import clover_command, sys; sys.exit(clover_command.main())", "run"]
PROGRAM = """\
import json, sys
import helper  # beside the program
from peft import AutoPeftModelForCausalLM

if __name__ == "__main__":
    model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
    print(json.dumps([sys.argv[0], sys.argv[2:], sys.path[0], model.active_peft_config.peft_type, __file__]))
    sys.exit(int(helper.CODE))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A program with a module beside it, and a CLOVER adapter."""
    folder = tmp_path_factory.mktemp("run")
    build("llama").save_pretrained(folder / "base")
    model = build("llama")
    model.name_or_path = str(folder / "base")
    get_peft_model(model, CloverConfig(task_type="CAUSAL_LM")).save_pretrained(folder / "adapter")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "helper.py").write_text("CODE = 7\n")
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").write_text("")
    return folder


def start(*arguments: str, cwd: Path, command: list[str] = CLOVER) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=cwd, env=environment)


def expected(folder: Path, name: str) -> str:
    return json.dumps([name, ["--help", "--", "-m"], str(folder), "CLOVER", name])


def test_a_script_runs_as_python_runs_it(folder, tmp_path):
    script = str(folder / "program.py")
    done = start(script, str(folder / "adapter"), "--help", "--", "-m", cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines()[-1] == expected(folder, script)


def test_a_module_runs_as_python_runs_it(folder):
    done = start("-m", "program", str(folder / "adapter"), "--help", "--", "-m", cwd=folder)
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines()[-1] == expected(folder, str(folder / "program.py"))


def test_it_is_the_target_of_accelerate_launch(folder):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--module", "clover_peft", "run"]
    script = str(folder / "program.py")
    done = start(script, str(folder / "adapter"), "--help", "--", "-m", cwd=folder, command=launch)
    assert done.stdout.splitlines()[-1] == expected(folder, script), done.stderr
    assert done.returncode != 0  # as launch reports the program's 7


@pytest.fixture
def restored(folder, monkeypatch) -> None:
    """What a program changes in the process is restored."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))


def test_a_failing_program_keeps_its_traceback_and_code(folder, restored):
    (folder / "fails.py").write_text("raise ValueError('the program failed')\n")
    with pytest.raises(ValueError, match="the program failed"):
        clover_command.main(["run", "fails.py"])
    (folder / "exits.py").write_text("import sys\nsys.exit('a message')\n")
    with pytest.raises(SystemExit, match="a message"):
        clover_command.main(["run", "exits.py"])


NO_MODULE = (
    ": expected a module that can be run, found none; check the name, and that its package is installed in this "
    "environment"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.py"], "none.py: expected a script, found none; check the path, or pass -m to name a module"),
        (["-m", "none"], "none" + NO_MODULE),
        (["-m", "none.at.all"], "none.at.all" + NO_MODULE),
        (["-m", "package"], "package" + NO_MODULE),
    ],
)
def test_a_missing_program_is_named_in_one_sentence(arguments, message, restored, capsys):
    assert clover_command.main(["run", *arguments]) == 2
    assert capsys.readouterr().err == f"error: clover run {message}\n"


def test_ctrl_c_ends_it_without_a_traceback(tmp_path):
    (tmp_path / "waits.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [*CLOVER, "waits.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


def test_trl_runs(tmp_path):
    pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")
    done = start("-m", "trl.scripts.sft", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--model_name_or_path" in done.stdout
