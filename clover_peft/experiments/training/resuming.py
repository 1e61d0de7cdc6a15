"""What a run leaves behind so that it can go on where it was cut off, and what of it can be gone on with."""

from __future__ import annotations

import contextlib
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback

from ...io import run_record as records
from ...io.atomic import write_json
from .arguments import LOCAL, Settings

_SETTINGS = "settings.json"
_BEFORE = "before.json"
_ROWS = "fingerprint of the rows"  # in the settings
_SPENT = "seconds_so_far"  # in the log


def find_checkpoint(out: Path, settings: Settings) -> str | None:
    """Returns the newest whole checkpoint to continue from, None to start from the beginning.

    Raises:
        ValueError: `out` has files and is not to be resumed, or holds a run of other settings, or a finished one.
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
        known = {key: value for key, value in saved.items() if key not in (*LOCAL, _ROWS)}
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


def keep_settings(out: Path, settings: Settings, fingerprint: str) -> None:
    """Writes down what a resumed run must repeat: its settings, and its rows by their fingerprint."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _SETTINGS, {**_repeatable(settings), _ROWS: fingerprint})


def check_rows(out: Path, fingerprint: str) -> None:
    """Refuses to resume with other rows than those the run has begun with.

    Raises:
        ValueError: naming both.
    """
    saved = records.read_json(out / _SETTINGS, "choose another output_dir=...") if (out / _SETTINGS).is_file() else {}
    if _ROWS in saved:  # earlier versions did not write it
        remedy = "give it the same rows, or choose another output_dir=..."
        records.check_same({_ROWS: saved[_ROWS]}, {_ROWS: fingerprint}, "the run to resume", remedy)


def _damaged(checkpoint: Path) -> str | None:
    """Which file of a checkpoint a kill, or a full disk, left out or cut short; None where all were written."""
    last = checkpoint / "trainer_state.json"
    for file in (last, *sorted(path for path in checkpoint.rglob("*") if path.is_file())):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            elif file.suffix in {".pt", ".pth", ".bin"} and not zipfile.is_zipfile(file):  # a pickle is not read
                return file.name
        except (OSError, ValueError, SafetensorError):
            return file.name
    return None


def _repeatable(settings: Settings) -> dict[str, Any]:
    """The settings that a resumed run must share with the one it continues, as JSON gives them back.

    Of the data the rows are compared, wherever they lie (see `check_rows`).
    """
    values = {key: value for key, value in settings.values.items() if key not in LOCAL}
    return dict(json.loads(json.dumps(values, default=str)))


class Clock(TrainerCallback):
    """Adds up the seconds of training over a run that is resumed, in an entry of the log: each checkpoint holds that.

    Attributes:
        earlier: seconds up to the checkpoint that was resumed from.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        entry = next((entry for entry in state.log_history if _SPENT in entry), None)
        if entry is None:
            # a checkpoint from before there was such an entry: the last time that was logged
            logged = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
            state.log_history.append(entry := {_SPENT: logged[-1] if logged else 0.0})
        self.entry, self.earlier, self.started = entry, entry[_SPENT], time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.entry[_SPENT] = self.earlier + time.perf_counter() - self.started


class Before(TrainerCallback):
    """Measures the model at the start, and writes that down for a run that is resumed.

    Not before training starts: accelerate then holds a model that was evaluated for prepared, neither shards it nor
    averages its gradients, and every process trains alone.
    """

    def __init__(self, out: Path, measure: Callable[[], dict[str, Any]], resuming: bool) -> None:
        self.path, self.measure = out / _BEFORE, measure
        remedy = f"choose another output_dir than {out}"
        self.measured: dict[str, Any] = records.read_json(self.path, remedy) if resuming else {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.measured:
            return
        self.measured = self.measure()  # in all processes: a sharded model runs in all of them or in none
        if state.is_world_process_zero:
            write_json(self.path, self.measured)


@contextlib.contextmanager
def bases_saved(model: Any) -> Iterator[None]:
    """Checkpoints are saved with their bases: a folded adapter, which the run may have to leave, cannot be trained."""
    config: Any = getattr(model, "active_peft_config", None)
    folded = getattr(config, "save_bases", None) == "folded"
    if folded:
        config.save_bases = True
    try:
        yield
    finally:
        if folded:
            config.save_bases = "folded"
