"""The wheel is complete, and in an empty environment it does what each extra promises."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.tiny import build
from tests.support.tiny_chat import rows, save_chat_model

ROOT = Path(__file__).parents[2]
SOURCES = ("clover_peft", "clover_command.py", "configs", "pyproject.toml", "setup.cfg", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the source distribution, as an index serves both."""
    pytest.importorskip("setuptools", minversion="77", reason="builds as pyproject.toml asks for")
    folder = tmp_path_factory.mktemp("build")
    (folder / "checkout").mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / "checkout" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(source, folder / "checkout")

    def make(what: str, place: Path) -> Path:
        code = f"import sys; from setuptools.build_meta import build_{what}; build_{what}(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, str(folder)], cwd=place, check=True, capture_output=True)
        return next(folder.glob("*.tar.gz" if what == "sdist" else "*.whl"))

    with tarfile.open(make("sdist", folder / "checkout")) as archive:
        archive.extractall(folder / "sdist", filter="data")
    return make("wheel", next((folder / "sdist").iterdir()))


def test_the_wheel_has_every_file_and_nothing_else(wheel):
    expected = {"clover_command.py"} | {
        f"clover_peft/{path.relative_to(ROOT / 'clover_peft').as_posix()}"
        for path in (ROOT / "clover_peft").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    expected |= {f"clover_peft/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        [entry_points] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        declared = archive.read(entry_points).decode()
        assert "clover = clover_command:main" in declared
        assert "[peft.tuners]\nclover = clover_peft\n" in declared  # see docs/proposals/peft_entry_points.md
    assert found == expected


CORE = """\
import sys
from transformers import AutoModelForCausalLM
from peft import AutoPeftModelForCausalLM, get_peft_model
import clover_peft
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
get_peft_model(model, clover_peft.CloverConfig(task_type="CAUSAL_LM")).save_pretrained(sys.argv[2])
AutoPeftModelForCausalLM.from_pretrained(sys.argv[2])
print(clover_peft.prune(AutoModelForCausalLM.from_pretrained(sys.argv[1]), 0.5).summary())
"""
QUANT = """\
import sys, torch, clover_peft
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=four)
model = get_peft_model(model, clover_peft.CloverConfig())
assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
"""


@pytest.mark.slow
class TestInAnEmptyEnvironment:
    """Nothing is shared with the environment of the tests but the models and rows, which are written by it."""

    @pytest.fixture(scope="class")
    def base(self, wheel, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("environment") / "base"
        venv.create(folder, with_pip=True)
        self.pip(folder, str(wheel))
        return folder

    @pytest.fixture
    def extra(self, base, wheel, tmp_path) -> Callable[..., Path]:
        """An environment with some extras: a copy of the one without, whose files it links to."""

        def make(*names: str) -> Path:
            shutil.copytree(base, tmp_path / "environment", copy_function=os.link, symlinks=True)
            self.pip(tmp_path / "environment", f"{wheel}[{','.join(names)}]")
            return tmp_path / "environment"

        return make

    def pip(self, folder: Path, what: str) -> None:
        """Installs a requirement at the versions of constraints.txt."""
        constraints = str(ROOT / "constraints.txt")
        self.run(folder, "-m", "pip", "install", "--quiet", "-c", constraints, "torch", what)

    def run(self, folder: Path, *arguments: str, status: int = 0) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [str(folder / "bin" / "python"), *arguments], capture_output=True, text=True, cwd=folder, env=environment
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def clover(self, folder: Path, *arguments: object, status: int = 0) -> subprocess.CompletedProcess:
        return self.run(folder, "-m", "clover_peft", *map(str, arguments), status=status)

    @pytest.fixture
    def model(self, tmp_path) -> Path:
        build("llama").save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_without_extras(self, base, model, tmp_path):
        packages = json.loads(self.run(base, "-m", "pip", "list", "--format=json").stdout)
        assert not {"trl", "datasets", "matplotlib", "bitsandbytes"} & {one["name"] for one in packages}
        self.run(base, "-c", CORE, str(model), str(tmp_path / "adapter"))
        shown = subprocess.run([str(base / "bin" / "clover"), "--help"], capture_output=True, text=True, check=True)
        assert "commands:" in shown.stdout
        self.clover(base, "plan", "--model", model)
        self.clover(base, "prune", model, "--ratio", "vo=0.5", "--no-pictures", "--out", tmp_path / "narrow")
        self.clover(base, "spectra", model, "--no-pictures", "--out", tmp_path / "spectra")
        self.clover(base, "export", tmp_path / "adapter", tmp_path / "exported", "--lora-rank", "4")
        (tmp_path / "program.py").write_text("import sys; print('clover_peft' in sys.modules)")
        assert self.clover(base, "run", tmp_path / "program.py").stdout == "True\n"
        for arguments, extra in (
            (["sft", "--config", "clover_full"], "train"),
            (["ablate", "--config", "smollm2", "--out", tmp_path / "grid"], "train"),
            (["prune", model, "--ratio", "vo=0.5", "--out", tmp_path / "pictured"], "plots"),
        ):
            [line] = self.clover(base, *arguments, status=2).stderr.splitlines()[-1:]
            assert re.search(rf'expected .*, found none; .*pip install "clover-peft\[{extra}\]"$', line)

    def test_with_plots(self, extra, model, tmp_path):
        environment = extra("plots")
        self.clover(environment, "prune", model, "--ratio", "vo=0.5", "--out", tmp_path / "narrow")
        assert (tmp_path / "narrow" / "pruning.png").is_file()
        self.clover(environment, "spectra", model, "--out", tmp_path / "spectra")
        assert (tmp_path / "spectra" / "spectra_vo.png").is_file()

    def test_with_train(self, extra, tmp_path):
        environment = extra("train")
        save_chat_model(tmp_path / "chat")
        lines = (json.dumps(row) for row in rows(24))
        (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
        self.clover(
            environment, "sft", "--config", "clover_full", f"model={tmp_path / 'chat'}",
            f"data={tmp_path / 'rows.jsonl'}", f"output_dir={tmp_path / 'run'}",
            "held_out_rows=4", "rows=16", "max_steps=2", "use_cpu=true",
        )  # fmt: skip
        adapter = tmp_path / "run" / "adapter"
        self.clover(environment, "export", adapter, tmp_path / "merged")
        self.clover(environment, "analyze", "--adapter", adapter, "--no-pictures", "--out", tmp_path / "analysis")
        table = self.clover(environment, "ablate", "--table", ROOT / "benchmarks/results/commonsense/smollm2_cpu")
        assert "| clover |" in table.stdout

    def test_with_quant(self, extra, tmp_path):
        widths = dict(hidden_size=128, intermediate_size=128, head_dim=32)  # that NF4's kernels can cut
        build("llama", **widths).save_pretrained(tmp_path / "wide")
        self.run(extra("quant"), "-c", QUANT, str(tmp_path / "wide"))

    def test_with_bench(self, extra):
        self.run(extra("bench"), "-c", "import jiwer")
