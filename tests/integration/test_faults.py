"""Faults while this package writes a file, and files that are damaged afterwards: nothing is lost or half-written.

A limit on the size of files makes each write fail half-way, in Python as in the libraries beneath it. The system then
either kills the process, or lets the write fail as on a full disk.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from torch import nn

from clover_peft import CloverConfig
from clover_peft.cli import export, prune
from clover_peft.experiments.adaptation.trial import _State
from clover_peft.io import run_record
from clover_peft.pruning.report import PruningReport
from clover_peft.tuner.config import CloverConfig as Config
from tests.support.saved_adapters import trained_model
from tests.support.tiny import build

resource = pytest.importorskip("resource", reason="this system has no limits on the size of files")
pytestmark = pytest.mark.usefixtures("one_thread")


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        write: writes it into a folder; `size` makes one version differ from another.
        read: reads it from there.
        limit: bytes at which writing fails: fewer than the largest file has.
        is_whole: it is there whole or not at all, whatever the versions. Older safetensors write in place, and what
            they leave is refused.
    """

    write: Callable[[Path, int], object]
    read: Callable[[Path], object]
    limit: int
    is_whole: bool = True


def _checkpoint(folder: Path) -> _State:
    state: Any = _State.__new__(_State)
    parameter = nn.Parameter(torch.ones(5000))
    state.file, state.settings, state.copies, state.trained = folder / "trial.pt", {}, {}, {"p": parameter}
    state.optimizer = torch.optim.AdamW([parameter])
    state.scheduler = hf.get_constant_schedule(state.optimizer)
    state.step, state.seconds, state.losses = 0, 0.0, []
    return state


def _read_checkpoint(folder: Path) -> int:
    state = _checkpoint(folder)
    state._load()
    return state.step


def _write_checkpoint(folder: Path, size: int) -> None:
    state = _checkpoint(folder)
    state.step = size
    state.save()


def _report(folder: Path, size: int) -> None:
    report = PruningReport("clover", {"ranks": "x" * 5000}, False, False, {}, {}, (size, size), (0, 0), 0.0)
    report.save(folder / "pruning.json")


def _adapter(folder: Path, size: int) -> None:
    trained_model(build("llama"), r=size).save_pretrained(folder)


def _load_adapter(folder: Path) -> int:
    return PeftModel.from_pretrained(build("llama"), folder).peft_config["default"].r


def _config(folder: Path, size: int) -> None:
    Config(r=size, target_modules=["name" * 2000]).save_pretrained(str(folder))


def _command(name: str, folder: Path, base: Path) -> None:
    if name == "prune":
        options = ["--ratio", f"vo={0.25}", "--no-pictures", "--out", str(folder / "out")]
        assert prune.main([str(base), *options]) == 0
    else:
        assert export.main([str(base / "adapter"), str(folder / "out"), "--base", str(base)]) == 0


def _loads(folder: Path) -> int:
    if not (folder / "out").exists():
        raise FileNotFoundError
    hf.AutoModelForCausalLM.from_pretrained(folder / "out")
    return 4


def _record(folder: Path, size: int) -> None:
    run_record.write(folder / "record.json", {"size": size, "text": "x" * 5000})


def _read_record(folder: Path) -> int:
    return max(run_record.read_json(path, "delete it")["size"] for path in folder.glob("record*.json"))


KINDS = {
    "adapter": Kind(_adapter, _load_adapter, 8000, is_whole=False),
    "adapter's config": Kind(_config, lambda folder: Config.from_pretrained(str(folder)).r, 2000),
    "record": Kind(_record, _read_record, 2000),
    "report": Kind(_report, lambda folder: run_record.read_json(folder / "pruning.json", "")["parameters"][0], 2000),
    "checkpoint": Kind(_write_checkpoint, _read_checkpoint, 10_000),
}
COMMANDS = ("prune", "export")


def _limited(write: Callable[[], object], limit: int, killed: bool) -> int:
    """Run in a process whose files cannot grow beyond a limit; 0, 3 after an error, or minus the signal."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if killed else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            write()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _outcome(kind: Kind, folder: Path) -> object:
    try:
        return kind.read(folder)
    except ValueError as error:
        return error


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "full disk"])
@pytest.mark.parametrize("name", KINDS)
def test_a_write_that_fails_half_way_loses_nothing(name: str, killed: bool, tmp_path: Path) -> None:
    kind = KINDS[name]
    kind.write(tmp_path, 3)
    assert kind.read(tmp_path) == 3
    code = _limited(lambda: kind.write(tmp_path, 4), kind.limit, killed)
    assert code == (-signal.SIGXFSZ if killed else 3)
    found = _outcome(kind, tmp_path)
    assert found == 3 or (not kind.is_whole and "expected a whole safetensors file" in str(found))
    parts = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(parts) <= killed  # only a killed process leaves its part, under a hidden name
    kind.write(tmp_path, 4)
    assert kind.read(tmp_path) == 4


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    build("llama").save_pretrained(folder)
    model = get_peft_model(hf.AutoModelForCausalLM.from_pretrained(folder), CloverConfig())
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "full disk"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_writes_a_whole_folder_or_none(name: str, killed: bool, base: Path, tmp_path: Path) -> None:
    code = _limited(lambda: _command(name, tmp_path, base), 20_000, killed)
    assert code == (-signal.SIGXFSZ if killed else 3)
    assert not (tmp_path / "out").exists()
    _command(name, tmp_path, base)  # the same command again
    assert _loads(tmp_path) == 4


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_was_cut_short_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    """At ten places each. Where peft or transformers reads a config, the message is theirs."""
    kind = KINDS[name]
    kind.write(tmp_path, 3)
    path = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
    whole = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(whole[: len(whole) * tenth // 10])
        message = "" if name == "adapter's config" else f"^{re.escape(str(path))}: expected .*found .*; "
        with pytest.raises(ValueError, match=f"(?s){message}"):
            kind.read(tmp_path)
    path.write_bytes(whole)
    assert kind.read(tmp_path) == 3


def test_a_flipped_bit_in_an_adapters_header_never_changes_its_numbers(tmp_path: Path) -> None:
    """The format has no checksum: a flipped bit among the numbers is found only where one becomes infinite."""
    _adapter(tmp_path, 3)
    path = tmp_path / "adapter_model.safetensors"
    whole = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    before = PeftModel.from_pretrained(build("llama"), tmp_path).state_dict()
    generator, refused = torch.Generator().manual_seed(0), 0
    for position in torch.randint(header, (40,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            after = PeftModel.from_pretrained(build("llama"), tmp_path).state_dict()
        except ValueError:
            refused += 1
        else:
            assert all(torch.equal(before[key], after[key]) for key in before), position
    assert refused >= 30


READ_ONLY = Path("/sys") if os.name == "posix" and os.geteuid() == 0 else None  # chmod does not stop root


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_that_cannot_be_written_is_named(name: str, tmp_path: Path) -> None:
    folder = READ_ONLY or tmp_path / "locked"
    if READ_ONLY is None:
        folder.mkdir(mode=0o500)
    with pytest.raises(OSError, match=str(folder)):
        KINDS[name].write(folder, 3)
