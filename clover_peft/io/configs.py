"""The configuration files that the package ships, by name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

FOLDER = Path(__file__).parents[1] / "configs"  # in a checkout, a link to the folder at its top
Kind = Literal["run", "grid"]


def config_names(kind: Kind | None = None) -> list[str]:
    """Names of shipped files: their paths below `configs/`, without `.yaml`.

    Args:
        kind: "run" for those of `clover sft`, "grid" for those of `clover ablate`, None for all.
    """
    names = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))
    if kind == "grid":
        return [name for name in names if name.startswith("ablations/")]
    return [name for name in names if kind is None or not name.startswith(("ablations/", "accelerate/"))]


def find_config(name: str | Path, kind: Kind | None = None) -> Path:
    """Finds a configuration file.

    Args:
        name: the path of a file; or the name of a shipped one, such as `models/llama2_7b`, whose folders may be left
            out (`llama2_7b`) where that is unambiguous.
        kind: see `config_names`; shipped files of another kind are not found.

    Raises:
        ValueError: there is no such file, or several shipped ones have the name.
    """
    if (path := Path(name)).is_file():
        return path
    wanted, known = path.as_posix().removesuffix(".yaml"), config_names(kind)
    found = [wanted] if wanted in known else [one for one in known if one.endswith(f"/{wanted}")]
    if len(found) == 1:
        return FOLDER / f"{found[0]}.yaml"
    if found:
        raise ValueError(f"--config {name}: expected one configuration, found {', '.join(found)}; name the folder too")
    spellings = {spelling: one for one in known for spelling in (one.rpartition("/")[2], one)}
    near = difflib.get_close_matches(wanted, spellings, n=1)
    hint = f"did you mean {spellings[near[0]]}? " if near else ""
    raise ValueError(f"--config {name}: expected a YAML file, found none; {hint}shipped are {', '.join(known)}")
