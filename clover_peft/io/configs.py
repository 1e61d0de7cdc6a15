"""The configuration files that the package ships, by name."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "configs"  # in a checkout, a link to the folder at its top


def config_names() -> list[str]:
    """Names of all shipped files: their paths below `configs/`, without `.yaml`."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """Finds a configuration file.

    Args:
        name: the path of a file; or the name of a shipped one, such as `models/llama2_7b`, whose folders may be left
            out (`llama2_7b`) where that is unambiguous.

    Raises:
        ValueError: there is no such file, or several shipped ones have the name.
    """
    if (path := Path(name)).is_file():
        return path
    wanted, known = path.as_posix().removesuffix(".yaml"), config_names()
    found = [wanted] if wanted in known else [one for one in known if one.endswith(f"/{wanted}")]
    if len(found) == 1:
        return FOLDER / f"{found[0]}.yaml"
    if found:
        raise ValueError(f"--config {name}: expected one configuration, found {', '.join(found)}; name the folder too")
    raise ValueError(
        f"--config {name}: expected a YAML file, found none; the names of shipped ones are {', '.join(known)}"
    )
