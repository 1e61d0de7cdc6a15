"""Finds models, adapters and rows that a command line names, or says at once that there are none. Without torch."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from .downloads import hub_reachable
from .rows import is_rows_file, is_text_file

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def check_model(model: str | Path | None, option: str = "model=") -> None:
    """Check that a name is that of a model: a folder, a model on the hub or in its cache, or the default one.

    Raises:
        ValueError: it is not.
    """
    name = str(model or DEFAULT_MODEL)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{option}{name}: expected a folder with a config.json, found none in it")
    elif name != DEFAULT_MODEL and (problem := _absent(name, "config.json", "model")):
        raise ValueError(
            f"{option}{name}: expected a folder or a model on the hub, found no such folder, and {problem}; pass the "
            f"path of a model folder, or {DEFAULT_MODEL}, which can be had without the hub"
        )


def check_adapter(adapter: str | Path, option: str = "") -> None:
    """Check that a name is that of an adapter: a folder, or an adapter on the hub or in its cache.

    Raises:
        ValueError: it is not.
    """
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        if not (folder / "adapter_config.json").is_file():
            inside = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
            hint = f"; did you mean {inside[0]}?" if inside else ""
            found = "a whole model" if (folder / "config.json").is_file() else "none in it"
            raise ValueError(f"{option}{adapter}: expected a folder with an adapter_config.json, found {found}{hint}")
    elif problem := _absent(str(adapter), "adapter_config.json", "adapter"):
        raise ValueError(
            f"{option}{adapter}: expected the folder of an adapter, found none, and {problem}; check the path, such "
            "as runs/clover_full/adapter"
        )


def find_rows(data: str | Path | None) -> Path | None:
    """The local file of rows or text that `data` names; None for none, and for a data set on the hub.

    Raises:
        ValueError: a folder has no one file of training rows, a file is of another kind, or there is no such file and
            no such data set.
    """
    if not data:
        return None
    path = Path(data).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.name.startswith("train") and is_rows_file(file))
        if len(found) != 1:
            raise ValueError(
                f"data={data}: expected one train*.jsonl or train*.jsonl.gz in the folder, found "
                f"{[file.name for file in found] or 'none'}; pass the file itself"
            )
        path = found[0]
    is_readable = is_rows_file(path) or is_text_file(path)
    if path.is_file():
        if not is_readable:
            raise ValueError(f"data={data}: expected a .jsonl or .txt file, with .gz or without, found {path.name}")
        return path
    is_local = is_readable or _is_path(str(data))
    if is_local or not hub_reachable():
        why = "" if is_local else ", and the hub cannot be reached"
        raise ValueError(
            f"data={data}: expected a folder, a .jsonl[.gz] or .txt[.gz] file or a data set on the hub, found no such "
            f"path{why}; check the path, or leave data out for commonsense-170k"
        )
    return None


def in_cache(name: str, file: str) -> bool:
    """Whether the hub's cache has a file; the name may be one that the hub does not allow."""
    try:
        return isinstance(huggingface_hub.try_to_load_from_cache(name, file), str)
    except HFValidationError:
        return False


def _is_path(name: str) -> bool:
    """Whether a name can only be meant as a path: the hub's have one slash at most, inside."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name


def _absent(name: str, file: str, kind: str) -> str | None:
    """Why the hub does not have a file, where that is certain; None where it has it, or a download has to tell."""
    if in_cache(name, file):
        return None
    if _is_path(name):
        return "the hub has no such names"
    if not hub_reachable():
        return "the hub cannot be reached"
    try:
        is_there = huggingface_hub.file_exists(name, file)
    except HFValidationError:
        is_there = False
    except Exception:  # gated, or the hub answers otherwise: loading it says what is wrong
        return None
    return None if is_there else f"no such {kind} is on the hub, or it needs a token"
