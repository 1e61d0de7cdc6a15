"""Resuming interrupted runs: what a run writes down for it, and which checkpoint it continues from."""

from __future__ import annotations

import contextlib
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback

from ...io import run_record as records
from ...io.atomic import write_json
from ...io.hub_models import ModelSource, find_model, weights_digest
from ..settings import join_rates
from .arguments import LOCAL, Settings

ENDING_SECONDS = 10.0  # how long a process that was killed may still hold its lock
_SETTINGS = "settings.json"
_BEFORE = "before.json"
_ROWS, _WEIGHTS = "fingerprint of the rows", "sha256 of the weights"  # keys of the settings file
_TEACHER = "sha256 of the teacher's weights"
_INPUTS = (_ROWS, _WEIGHTS, _TEACHER)
_SPENT = "seconds_so_far"  # a key of the log


def find_checkpoint(out: Path, settings: Settings) -> str | None:
    """Return the newest whole checkpoint to continue from, or None to start from the beginning.

    Raises:
        ValueError: `out` has files and the run is not to be resumed; or it holds a finished run, or one with other
            settings.
    """
    if not settings.job.resume:
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(
                f"output_dir={out}: expected a new or empty folder, found files; continue an unfinished run with "
                "resume=true, or choose another output_dir=..."
            )
        return None
    if (out / "record.json").exists():
        raise ValueError(f"output_dir={out}: expected an unfinished run to resume, found a finished one")
    saved_file = out / _SETTINGS
    if saved_file.is_file():
        remedy = "delete it, to resume with the settings given now without comparing, or choose another output_dir=..."
        saved = records.read_json(saved_file, remedy)
        join_rates(saved)  # earlier versions kept both
        known = {key: value for key, value in saved.items() if key not in (*LOCAL, *_INPUTS)}
        repeat = "repeat its settings, or choose another output_dir=..."
        records.check_same(known, _repeatable(settings), "the run to resume", repeat)
    say = settings.sft.distributed_state.print
    found = {int(folder.name[11:]): folder for folder in out.glob("checkpoint-*") if folder.name[11:].isdecimal()}
    for _, folder in sorted(found.items(), reverse=True):
        damaged = _damaged(folder)
        if damaged is None:
            return str(folder)
        say(f"{folder} is passed over: {damaged} is missing or was cut short")
    say(f"no whole checkpoint in {out}, starting from the beginning")
    return None


@contextlib.contextmanager
def alone(lock: Path, what: str) -> Iterator[None]:
    """Keep other processes from making the same result; wait a little for one that was killed and is still ending.

    Args:
        lock: a file for the lock; missing folders are made.
        what: the name of the result in the error.

    Raises:
        ValueError: another process is making it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock, timeout=ENDING_SECONDS)
    try:
        held.acquire()
    except Timeout as error:
        raise ValueError(
            f"{what}: expected no other process to make it, found one; wait for it, or kill it"
        ) from error
    try:
        yield
    finally:
        held.release()


def identify(fingerprint: str, source: ModelSource, teacher: str | None) -> dict[str, str]:
    """Return what tells a run's inputs from others of the same name; of weights, only those in a folder.

    Args:
        fingerprint: of the rows.
        source: the model.
        teacher: its name or folder, if there is one.
    """
    found = {_ROWS: fingerprint, _WEIGHTS: weights_digest(source.path)}
    if teacher is not None:
        found[_TEACHER] = weights_digest(find_model(teacher).path)
    return {key: value for key, value in found.items() if value is not None}


def keep_settings(out: Path, settings: Settings, inputs: dict[str, str]) -> None:
    """Write down what a resumed run must repeat: the settings, and its inputs from `identify`."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _SETTINGS, {**_repeatable(settings), **inputs})


def check_inputs(out: Path, inputs: dict[str, str]) -> None:
    """Check that a resumed run has the rows and the weights it began with.

    Raises:
        ValueError: they differ; the message has both fingerprints.
    """
    saved = records.read_json(out / _SETTINGS, "choose another output_dir=...") if (out / _SETTINGS).is_file() else {}
    known = inputs.keys() & saved.keys()  # Earlier versions wrote fewer.
    before, now = ({key: values[key] for key in known} for values in (saved, inputs))
    records.check_same(before, now, "the run to resume", "give it the same again, or choose another output_dir=...")


def _damaged(checkpoint: Path) -> str | None:
    """Return the name of a file that a kill or a full disk left out or cut short; None for a whole checkpoint."""
    last = checkpoint / "trainer_state.json"
    for file in (last, *sorted(path for path in checkpoint.rglob("*") if path.is_file())):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            elif file.suffix in {".pt", ".pth", ".bin"} and not zipfile.is_zipfile(file):  # A pickle is not read.
                return file.name
        except (OSError, ValueError, SafetensorError):
            return file.name
    return None


def _repeatable(settings: Settings) -> dict[str, Any]:
    """Return the settings that a resumed run must repeat, converted to JSON and back.

    The path of the data is not among them: `check_inputs` compares the rows.
    """
    values = {key: value for key, value in settings.values.items() if key not in LOCAL}
    return dict(json.loads(json.dumps(values, default=str)))


class Clock(TrainerCallback):
    """Adds up the seconds of a training that is resumed, in an entry of the log, which each checkpoint contains.

    Attributes:
        earlier: the seconds up to the checkpoint that the run resumes from.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        entry = next((entry for entry in state.log_history if _SPENT in entry), None)
        if entry is None:
            # Checkpoints of earlier versions lack the entry; the last logged time is used instead.
            logged = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
            state.log_history.append(entry := {_SPENT: logged[-1] if logged else 0.0})
        self.entry, self.earlier, self.started = entry, entry[_SPENT], time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.entry[_SPENT] = self.earlier + time.perf_counter() - self.started


class Before(TrainerCallback):
    """Measures the model at the start of training, and writes the result down for a run that is resumed.

    An evaluation before `train()` would break training in several processes: accelerate takes an evaluated model for a
    prepared one, neither shards it nor averages its gradients, and every process trains alone.
    """

    def __init__(self, out: Path, measure: Callable[[], dict[str, Any]], resuming: bool) -> None:
        self.path, self.measure = out / _BEFORE, measure
        remedy = f"choose another output_dir than {out}"
        self.measured: dict[str, Any] = records.read_json(self.path, remedy) if resuming else {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.measured:
            return
        self.measured = self.measure()  # All processes measure: a sharded model runs in all of them or in none.
        if state.is_world_process_zero:
            write_json(self.path, self.measured)


@contextlib.contextmanager
def bases_saved(model: Any) -> Iterator[None]:
    """Save checkpoints with their bases, also of an adapter to be saved folded, which is not resumed from."""
    config: Any = getattr(model, "active_peft_config", None)
    folded = getattr(config, "save_bases", None) == "folded"
    if folded:
        config.save_bases = True
    try:
        yield
    finally:
        if folded:
            config.save_bases = "folded"
