"""Run records: a result with the machine, the software and the revision it was made with, in JSON files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from . import atomic

_LIST_OF_NUMBERS = re.compile(r"\[\n\s+[-+.\deE]+(,\n\s+[-+.\deE]+)*\n\s+\]")  # json writes a line for each
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes")


def environment() -> dict[str, Any]:
    """Describe the machine and the software a result depends on.

    Returns:
        JSON-ready: `python`, `platform`, `cpu`, `cores`, `torch_threads`, `cuda` (device name or None), `versions`
        (of the packages that are installed, read without importing them; torch's also names its build, as in
        "2.14.1+cu130"), `clover_peft` (its version), `git_revision`
        and `git_dirty` (of the checkout that this package is run from; None outside one).
    """
    revision, dirty = _git_state(Path(__file__).resolve())
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None}
        | {"torch": str(torch.__version__)},
        "clover_peft": __version__,
        "git_revision": revision,
        "git_dirty": dirty,
    }


def write(path: str | os.PathLike[str], record: dict[str, Any]) -> Path:
    """Write a record as JSON, complete or not at all, and never over an existing one.

    Args:
        path: the wanted file; missing folders are made. If `run.json` exists, `run-2.json`, `run-3.json`, ... is used.
        record: values that JSON does not know (paths, dtypes, NaN) are written as text.

    Returns:
        The path that was written.
    """
    # Python's json writes and reads NaN, other readers do not.
    plain = json.loads(json.dumps(record, default=str), parse_constant=str)
    text = json.dumps(plain, indent=2, allow_nan=False) + "\n"
    text = _LIST_OF_NUMBERS.sub(lambda found: f"[{' '.join(found[0].strip('[]').split())}]", text)
    return atomic.write_new(Path(path), text)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file with one object.

    Raises:
        ValueError: the file is missing or damaged; the message ends with the remedy.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a JSON object, found it missing or cut short ({error}); {remedy}"
        ) from error


def check_same(before: dict[str, Any], now: dict[str, Any], where: str, remedy: str, prefix: str = "") -> None:
    """Check that earlier work was done with the present settings.

    Args:
        before: the settings of the earlier work, as read from JSON.
        now: the present settings; values that JSON does not know are compared as text.
        where: where `before` was found, for the message.
        remedy: what the user can do if they differ.
        prefix: stands before the key in the message.

    Raises:
        ValueError: a setting differs; the message names the first one, with the blocks it is in.
    """
    now = json.loads(json.dumps(now, default=str))
    for key in sorted(before.keys() | now.keys()):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            check_same(one, other, where, remedy, f"{prefix}{key}.")
        elif one != other:
            raise ValueError(f"{prefix}{key}: expected {one!r} as in {where}, found {other!r}; {remedy}")


def digest(files: Iterable[Path]) -> str:
    """Return the sha256 of the joined contents of files."""
    result = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while part := file.read(2**24):
                result.update(part)
    return result.hexdigest()


def peak_gpu_bytes() -> int | None:
    """Return the most memory that torch has allocated on the CUDA device; None where it has not used one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_state(file: Path) -> tuple[str | None, bool | None]:
    """Return revision and dirty flag of the checkout that tracks `file`; a copy that git does not track has none."""
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        revision = _git(file.parent, "rev-parse", "HEAD")
        # Untracked files do not count: a benchmark's fresh record must not make the next one look dirty.
        return revision, _git(file.parent, "status", "--porcelain", "--untracked-files=no") != ""
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git(folder: Path, *arguments: str) -> str:
    # Without the option `status` writes the index, and leaves a lock behind where the process is killed.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def peak_memory_bytes() -> int:
    """Return the peak of this process's resident set: the most memory of the host that it has held."""
    status = Path("/proc/self/status")
    if status.exists():  # On Linux, getrusage's figure survives exec and would start at the parent's.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
