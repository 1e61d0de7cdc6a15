"""The quickstart's commands are ones that the command line takes. Stand-ins for its programs record arguments."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="reads the fields of trl.SFTConfig: pip install clover-peft[train]")

from clover_peft.cli import checks, parsers
from clover_peft.experiments import settings

ROOT = Path(__file__).parents[2]
ENV = """say() { printf '\\n== %s\\n' "$*"; }
clover_env() { VENV_PYTHON="$PWD/bin/python"; }
"""


@pytest.mark.parametrize(("steps", "every"), [(None, 10), ("8", 1), ("200", 10)])
def test_the_quickstart_trains_checks_and_names_a_next_command(steps, every, tmp_path, monkeypatch):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "train.jsonl").write_text("{}")
    shutil.copy(ROOT / "scripts" / "quickstart.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "_env.sh").write_text(ENV)
    for name in ("clover", "python"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nfor argument in {name} "$@"; do echo "$argument" >> calls; done\n')
        program.chmod(0o755)
    environment = {**os.environ, "CLOVER_DATA": str(tmp_path / "my data"), "CLOVER_QUICKSTART_STEPS": steps or ""}
    done = subprocess.run(
        ["bash", str(tmp_path / "scripts" / "quickstart.sh"), "seed=1"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

    *said, activate, command = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    assert said[-1].startswith("Next, ")
    assert activate == "source .venv/bin/activate"
    trained, checked = (tmp_path / "calls").read_text().removeprefix("clover\n").split("\npython\n")
    assert checked.splitlines()[:3] == ["-m", "clover_peft.experiments.training.verify", "--loss-fell"]
    monkeypatch.chdir(tmp_path)
    for line, config in ((["clover", *trained.splitlines()], "clover_full"), (shlex.split(command), "lora")):
        assert line[:4] == ["clover", "sft", "--config", config]
        given = parsers.sft(line[2:])
        checks.sft(given)
        flat = settings.read(given.config, given.overrides).flat
        assert flat["logging_steps"] == every
        assert (flat["max_steps"], flat["rows"]) == (int(steps or 75), 4 * int(steps or 75))
        assert flat["seed"] == 1
        assert not list(Path(flat["output_dir"]).glob("*"))
