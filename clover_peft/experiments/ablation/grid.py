"""The file of a grid: (method x learning rate x seed) over one base configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...io.configs import config_names, find_config
from ...io.overrides import apply_override, load_yaml
from ..commonsense import prepare
from ..settings import check_value, fill
from ..training.arguments import parse

BASE = "base"  # the model that is not fine-tuned
_MODES = ("score", "generate")
# The grid sets these keys of a run itself: it refuses them, since it would ignore them.
_SET_ELSEWHERE = {
    "data": "set data.source",
    "rows": "set data.rows",
    "held_out_rows": "set data.validation",
    "seed": "set seeds",
    "learning_rate": "set the learning rates of its method",
    "method": "set methods",
    "questions": "set evaluation.rows",
    "output_dir": "set --out",
    "resume": "the runs of a grid always resume",
    "peft.learning_rate": "set the learning rates of its method",
}
# Methods that differ in these do not compare with each other, nor with the base model, which is read in their way.
_SHARED = {"model", "prompt", "chat_template_path", "model_init_kwargs", "trust_remote_code"}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: the name in the table.
        method: the name of a block in `methods` of the base configuration.
        learning_rates: the rates to choose from.
        settings: changes to the run, such as `peft.bias`.
    """

    name: str
    method: str
    learning_rates: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One run of the grid."""

    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-lr{self.learning_rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Evaluation:
    """How runs are evaluated.

    Attributes:
        mode: "score" or "generate".
        rows: test questions per task, drawn with seed 0; None = all.
        batch_size: questions in a batch.
        test: whether test questions are asked; without them, as in a search, methods compare on validation questions.
    """

    mode: str = "score"
    rows: int | None = None
    batch_size: int = 32
    test: bool = True


@dataclass(frozen=True)
class Grid:
    """The content of a grid's file.

    Attributes:
        base: configuration files of the runs; one of them has `methods`.
        settings: changes to `base`, for all methods.
        data: how the rows are prepared.
        methods: the rows of the table.
        seeds: seeds of the training; learning rates are chosen at the first.
        evaluation: how validation and test questions are asked.
    """

    base: list[Path]
    settings: dict[str, Any]
    data: prepare.Options
    methods: list[Method]
    seeds: list[int]
    evaluation: Evaluation


def read_grid(path: Path, overrides: Sequence[str] = ()) -> Grid:
    """Read and check a grid's file.

    Args:
        path: a YAML file or the name of a shipped one; its `base` is looked for beside it, one folder up, and among
            the shipped files.
        overrides: `key=value`, with dots into blocks.

    Raises:
        ValueError: a key or a value makes no sense; the message names the key, what was expected and what was found.
    """
    path = find_config(path, "grid")
    values = load_yaml(path.read_text(encoding="utf-8"), str(path))
    keys = [part.name for part in fields(Grid)]
    if isinstance(values, dict):
        for change in overrides:
            apply_override(values, change)
    if not isinstance(values, dict) or set(values) != set(keys):
        found = ", ".join(map(str, values)) if isinstance(values, dict) else repr(values)
        raise ValueError(f"{path}: expected the keys {', '.join(keys)}, found {found}")
    base, given, seeds = values["base"], values["methods"], values["seeds"]
    files = isinstance(base, list) and base and all(isinstance(name, str) for name in base)
    check_value(bool(files), "base", "a list of files", base)
    check_value(isinstance(values["settings"] or {}, dict), "settings", "a block of settings", values["settings"])
    check_value(isinstance(given, dict), "methods", "a block of learning rates by name", given)
    methods = [_method(str(name), block) for name, block in given.items()]
    counts = {len(method.learning_rates) for method in methods}
    if len(counts) != 1 or BASE in given:
        raise ValueError(
            f"{path}: methods: expected as many learning rates for every method, and none called {BASE}, found "
            + ", ".join(f"{method.name} {len(method.learning_rates)}" for method in methods)
        )
    numbers = isinstance(seeds, list) and all(prepare.is_count(seed, 0) for seed in seeds)
    check_value(
        numbers and 0 < len(seeds) == len(set(seeds)), "seeds", "a list of different whole numbers from 0 on", seeds
    )
    data = fill(prepare.Options, values["data"], "data")
    prepare.check(data, "data.")
    check_value(data.validation > 0, "data.validation", "a number of rows a task to choose rates on", data.validation)
    for key in _paths(values["settings"] or {}) & _SET_ELSEWHERE.keys():
        raise ValueError(f"settings.{key}: not a setting of a grid, {_SET_ELSEWHERE[key]}")
    for method in methods:
        for key in sorted(_paths(method.settings)):
            if key not in _SET_ELSEWHERE and key.partition(".")[0] not in _SHARED:
                continue
            remedy = _SET_ELSEWHERE.get(key, "set it for all methods in settings, or they do not compare")
            raise ValueError(f"methods.{method.name}.{key}: not a setting of a method, {remedy}")
    grid = Grid(
        base=[_find_base(path, name) for name in base],
        settings=values["settings"] or {},
        data=data,
        methods=methods,
        seeds=seeds,
        evaluation=_evaluation(values["evaluation"]),
    )
    for method in methods:  # Parse every run now: a typing error must not show after hours.
        for rate in method.learning_rates:
            parse(grid.base, settings_of(grid, method, Trial(method.name, rate, grid.seeds[0]), Path("runs")))
    return grid


def settings_of(grid: Grid, method: Method, trial: Trial, out: Path) -> list[str]:
    """Return a run's settings, as overrides of the base configuration."""
    given = {
        **grid.settings,
        **method.settings,
        "method": method.method,
        "learning_rate": trial.learning_rate,
        "seed": trial.seed,
        "data": str(out / "data" / "train.jsonl.gz"),
        "rows": None,  # all rows of the data
        "held_out_rows": 0,  # the data have validation rows of their own
        "questions": 0,
        "output_dir": str(out / "runs" / trial.name),
    }
    return [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in given.items()]


def trials_of(grid: Grid) -> dict[str, tuple[Method, Trial]]:
    """Return every run that the grid may need, by its name."""
    return {
        (trial := Trial(method.name, rate, seed)).name: (method, trial)
        for method in grid.methods
        for rate in method.learning_rates
        for seed in grid.seeds
    }


def count_steps(grid: Grid) -> int:
    """Count the records of a complete grid: trials, their tests, and the test of the base model."""
    runs = sum(len(method.learning_rates) for method in grid.methods)
    return runs + 1 + len(grid.methods) * (2 * len(grid.seeds) - 1) if grid.evaluation.test else runs


def _find_base(path: Path, name: str) -> Path:
    folders = path.resolve().parents[:2]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    if name.removesuffix(".yaml") in config_names():
        return find_config(name)
    raise ValueError(
        f"{path}: base: expected a file in {', '.join(map(str, folders))}, or a shipped one, found no {name}"
    )


def _method(name: str, given: Any) -> Method:
    """Read a method: a list of rates, or a block with `learning_rates`, `method` and changes to the settings."""
    if isinstance(given, list):
        given = {"learning_rates": given}
    if not isinstance(given, dict) or not given.get("learning_rates"):
        raise ValueError(f"methods.{name}: expected learning rates, or a block with learning_rates, found {given!r}")
    rates = given["learning_rates"]
    numbers = isinstance(rates, list) and all(type(rate) in (int, float) and 0 < rate < math.inf for rate in rates)
    different = numbers and len({f"{rate:g}" for rate in rates}) == len(rates)  # Records are named by six digits.
    check_value(
        different, f"methods.{name}.learning_rates", "a list of positive numbers that differ in six digits", rates
    )
    plain = Path(name).name == name and not name.startswith(("-", "."))
    check_value(plain, "methods", "names that a file can have, without - or . in front", name)
    more = {key: value for key, value in given.items() if key not in ("learning_rates", "method")}
    return Method(name, given.get("method", name), tuple(float(rate) for rate in rates), more)


def _evaluation(given: Any) -> Evaluation:
    found = fill(Evaluation, given, "evaluation")
    every = found.rows is None or prepare.is_count(found.rows, 1)
    check_value(found.mode in _MODES, "evaluation.mode", " or ".join(_MODES), found.mode)
    check_value(every, "evaluation.rows", "a whole number from 1 on, or null for all", found.rows)
    check_value(
        prepare.is_count(found.batch_size, 1), "evaluation.batch_size", "a whole number from 1 on", found.batch_size
    )
    check_value(isinstance(found.test, bool), "evaluation.test", "true or false", found.test)
    return found


def _paths(block: dict[str, Any], prefix: str = "") -> set[str]:
    """Return the keys of a block and, with dots, of the blocks in it."""
    paths = set()
    for key, value in block.items():
        paths |= {f"{prefix}{key}"} | (_paths(value, f"{prefix}{key}.") if isinstance(value, dict) else set())
    return paths
