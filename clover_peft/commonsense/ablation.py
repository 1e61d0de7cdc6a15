"""A grid of (method x learning rate x seed) over one base configuration, and the table that its records make.

Every method gets as many learning rates; the one that is best on the validation questions, at the first seed, is the
method's own: by its loss where options are scored, which tells rates apart with few questions, else by accuracy. Only
then come the other seeds, and then each seed meets the test sets, once.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from clover_peft import records
from clover_peft.training.arguments import apply_override, load_yaml, parse
from clover_peft.training.models import find_model, load_trained

from . import evaluation, prepare
from .protocols import find_protocol
from .tasks import TASKS

BASE = "base"  # the model that is not fine-tuned
Record = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: as shown.
        method: name of the block among the model's `methods`.
        learning_rates: those tried.
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


@dataclass
class Evaluation:
    """How runs are evaluated.

    Attributes:
        mode: "score" or "generate".
        rows: test questions a task, drawn with seed 0; None = all.
        batch_size: questions at a time.
        test: ask test questions at all; False compares on validation questions alone, as a search does.
    """

    mode: str = "score"
    rows: int | None = None
    batch_size: int = 32
    test: bool = True


@dataclass
class Ablation:
    """A grid, as its file describes it.

    Attributes:
        base: configuration files of the run, relative to `configs/`; one has `methods`.
        settings: on top of them, for all methods.
        data: what the rows are.
        methods: the rows of the table.
        seeds: of training; the first also chooses the learning rates.
        evaluation: of validation and test questions.
    """

    base: list[Path]
    settings: dict[str, Any]
    data: prepare.Options
    methods: list[Method]
    seeds: list[int]
    evaluation: Evaluation


def read(path: Path, overrides: Sequence[str] = ()) -> Ablation:
    """Reads and checks a grid's file.

    Args:
        path: a YAML file in `configs/ablations/`.
        overrides: `key=value`, with dots into blocks.

    Raises:
        ValueError: naming the key, what was expected and what was found.
    """
    if not path.is_file():
        raise ValueError(f"--config {path}: expected a YAML file, found none; see configs/ablations/")
    values = load_yaml(path.read_text(encoding="utf-8"), str(path))
    for change in overrides:
        apply_override(values, change)
    keys = [part.name for part in fields(Ablation)]
    if not isinstance(values, dict) or set(values) != set(keys):
        raise ValueError(f"{path}: expected the keys {', '.join(keys)}, found {', '.join(map(str, values))}")
    methods = [_method(str(name), given) for name, given in values["methods"].items()]
    counts = {len(method.learning_rates) for method in methods}
    if len(counts) != 1 or BASE in values["methods"]:
        raise ValueError(
            f"{path}: methods: expected as many learning rates for every method, and none called {BASE}, found "
            + ", ".join(f"{method.name} {len(method.learning_rates)}" for method in methods)
        )
    if not isinstance(values["seeds"], list) or not values["seeds"]:
        raise ValueError(f"{path}: seeds: expected a list of numbers, found {values['seeds']!r}")
    if "validation" not in values["data"]:
        raise ValueError(f"{path}: data.validation: expected a number of rows a task to choose rates on, found none")
    grid = Ablation(
        base=[path.resolve().parents[1] / name for name in values["base"]],
        settings=values["settings"] or {},
        data=_fill(prepare.Options, values["data"], "data"),
        methods=methods,
        seeds=values["seeds"],
        evaluation=_fill(Evaluation, values["evaluation"], "evaluation"),
    )
    for method in methods:  # a typing error shows now, not after hours
        for rate in method.learning_rates:
            parse(grid.base, settings_of(grid, method, Trial(method.name, rate, grid.seeds[0]), Path("runs")))
    return grid


def make_data(grid: Ablation, folder: Path) -> None:
    """Writes training, validation and test rows, unless they are there."""
    if not (folder / prepare.RECORD).is_file():
        suite = prepare.read(grid.data)
        prepare.clean(suite, grid.data)
        prepare.write(suite, folder, vars(grid.data))


def ready_steps(grid: Ablation, results: Path) -> list[str]:
    """Names of the records that can be made now, "<trial>" or "<trial>.test", by those there are; empty: it is full.

    All rates of all methods come first, then the tests of the first seed, then further seeds: no test question is
    asked before every learning rate has been chosen.
    """
    found = load(results)
    candidates = {
        method.name: [Trial(method.name, rate, grid.seeds[0]).name for rate in method.learning_rates]
        for method in grid.methods
    }
    missing = [name for names in candidates.values() for name in names if name not in found]
    if missing or not grid.evaluation.test:
        return missing
    ready = [f"{BASE}.test"]
    for seed in grid.seeds:
        for name, trials in candidates.items():
            rate = choose([found[trial] for trial in trials])["trial"]["learning_rate"]
            trial = Trial(name, rate, seed).name
            ready.append(f"{trial}.test" if trial in found else trial)
    return [step for step in ready if step not in found]


def make(grid: Ablation, step: str, out: Path, results: Path) -> Path:
    """Makes one record: trains and answers the validation questions, or answers the test questions.

    Training goes on from its last checkpoint where it was cut off, and is done again where only its record is left.

    Args:
        grid: the grid.
        step: from `ready_steps`.
        out: folder for data, adapters and predictions.
        results: folder for records.

    Returns:
        The record's path.
    """
    from clover_peft.training.run import run

    name = step.removesuffix(".test")
    folder = out / "runs" / name
    make_data(grid, out / "data")
    record: Record = {"trial": None, "environment": records.environment()}
    if name != BASE:
        method, trial = _trial(grid, name)
        settings = parse(grid.base, settings_of(grid, method, trial, out))
        if not (folder / "record.json").is_file():
            settings.job.resume = folder.exists()
            run(settings)
        trained = json.loads((folder / "record.json").read_text())
        record |= {"trial": vars(trial), "run": trained}
    else:
        first = grid.methods[0]
        trial = Trial(first.name, first.learning_rates[0], grid.seeds[0])
        settings = parse(grid.base, settings_of(grid, first, trial, out))
    split = "test" if step.endswith(".test") else "validation"
    if split == "test":
        record.pop("run", None)  # the other record of this trial has it
    record[split] = _evaluate(grid, settings, folder, split, out)
    return records.write(results / f"{step}.json", record)


def _evaluate(grid: Ablation, settings: Any, folder: Path, split: str, out: Path) -> Record:
    chosen = grid.evaluation
    if (folder / "model").is_dir():
        source, adapter = find_model(str(folder / "model")), None
    else:
        source = find_model(settings.job.model)
        adapter = folder / "adapter" if (folder / "adapter").is_dir() else None
    dtype = (settings.sft.model_init_kwargs or {}).get("dtype", "float32")  # as in training
    model, tokenizer = load_trained(source, adapter, dtype)
    protocol = find_protocol(settings.job.prompt, tokenizer)
    rows = chosen.rows if split == "test" else None
    questions = evaluation.read_rows(out / "data", split, grid.data.tasks or list(TASKS), rows, seed=0)
    if chosen.mode == "score":
        predict = evaluation.scorer(model, tokenizer, protocol)
    else:
        beams, tokens = (protocol.beams, protocol.new_tokens) if protocol else (1, 32)
        predict = evaluation.generator(model, tokenizer, protocol, beams, tokens)
    given = {key: value for key, value in vars(chosen).items() if key != "test"}
    predictions = evaluation.evaluate(questions, predict, chosen.batch_size, folder / split, given)
    return {**evaluation.summarise(predictions), "evaluation": given, "prompt": settings.job.prompt}


def load(results: Path) -> dict[str, Record]:
    """Name -> record, of a folder of records."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}


def choose(candidates: Sequence[Record]) -> Record:
    """The candidate with the lowest validation loss, or the most right answers where there is no loss; of equals the
    one with the lower rate."""

    def rank(record: Record) -> tuple[float, float]:
        validation = record["validation"]
        return validation.get("loss", -validation["mean"]), record["trial"]["learning_rate"]

    return min(candidates, key=rank)


def rows_of_table(found: dict[str, Record]) -> Iterator[Record]:
    """A row for every method that has a test record, from the records alone.

    Yields:
        `method`, `learning_rate`, `seeds`, `parameters`, `tasks` (name -> mean accuracy over the seeds), `average`,
        `sd` (of the seeds' averages, None for one seed), `averages`, `interval` (95 %, of the questions of all seeds),
        `candidates` (rate -> (validation accuracy, loss or None)), means of `init_seconds`, `train_seconds`,
        `peak_memory_bytes` and `adapter_bytes`, `train_rows`, `questions`, `unparsed`, `losses` (a list of
        (step, loss) a seed), and the names of its `records`.
    """
    tests = {name.removesuffix(".test"): record for name, record in found.items() if name.endswith(".test")}
    groups: dict[tuple[str, float | None], list[str]] = {}
    for name, record in tests.items():
        trial = record["trial"] or {"method": BASE, "learning_rate": None}
        groups.setdefault((trial["method"], trial["learning_rate"]), []).append(name)
    for (method, rate), names in groups.items():
        results = [tests[name]["test"] for name in names]
        runs = [found[name]["run"] for name in names if name in found]
        averages = [result["mean"] for result in results]
        candidates = {
            record["trial"]["learning_rate"]: (record["validation"]["mean"], record["validation"].get("loss"))
            for name, record in found.items()
            if "validation" in record and record["trial"]["method"] == method
            if record["trial"]["seed"] == min(tests[n]["trial"]["seed"] for n in names)
        }
        questions = sum(task["questions"] for task in results[0]["tasks"].values())
        yield {
            "method": method,
            "learning_rate": rate,
            "seeds": [tests[name]["trial"]["seed"] for name in names if tests[name]["trial"]],
            "parameters": runs[0]["parameters"]["trainable"] if runs else 0,
            "tasks": {
                task: statistics.mean(result["tasks"][task]["accuracy"] for result in results)
                for task in results[0]["tasks"]
            },
            "average": statistics.mean(averages),
            "averages": averages,
            "sd": statistics.stdev(averages) if len(averages) > 1 else None,
            "interval": _interval(results),
            "candidates": dict(sorted(candidates.items())),
            "init_seconds": _mean([run["seconds"]["init"] for run in runs]),
            "train_seconds": _mean([run["seconds"]["train"] for run in runs]),
            "peak_memory_bytes": _mean([run["peak_memory_bytes"] for run in runs]),
            "adapter_bytes": _mean([run["adapter_bytes"] for run in runs if run["adapter_bytes"]]),
            "train_rows": runs[0]["data"]["train_rows"] if runs else 0,
            "questions": questions,
            "unparsed": sum(task["unparsed"] for result in results for task in result["tasks"].values()),
            "losses": [[(entry["step"], entry["loss"]) for entry in run["loss"]["log"]] for run in runs],
            "records": [name for n in names for name in (n, f"{n}.test") if name in found],
        }


def trials(found: dict[str, Record]) -> list[Record]:
    """All that met the validation questions, best first: `name`, `method`, `learning_rate`, `accuracy`, `loss` (or
    None), `parameters`, `train_rows` and `train_seconds`."""
    rows = [
        {
            "name": name,
            **{key: record["trial"][key] for key in ("method", "learning_rate")},
            "accuracy": record["validation"]["mean"],
            "loss": record["validation"].get("loss"),
            "parameters": record["run"]["parameters"]["trainable"],
            "train_rows": record["run"]["data"]["train_rows"],
            "train_seconds": record["run"]["seconds"]["train"],
        }
        for name, record in found.items()
        if "validation" in record
    ]
    return sorted(rows, key=lambda row: (row["loss"] is None, row["loss"] or 0.0, -row["accuracy"]))


def difference(one: Record, other: Record) -> tuple[float, float | None]:
    """Of two rows' averages, with the standard error from the seeds' spread (None for one seed)."""
    gap = one["average"] - other["average"]
    if one["sd"] is None or other["sd"] is None:
        return gap, None
    return gap, math.sqrt(one["sd"] ** 2 / len(one["averages"]) + other["sd"] ** 2 / len(other["averages"]))


def _interval(results: Sequence[Record]) -> list[float]:
    """95 % interval of the mean over seeds, from the questions; the seeds answer the same ones."""
    mean = statistics.mean(result["mean"] for result in results)
    half = statistics.mean((result["interval"][1] - result["interval"][0]) / 2 for result in results)
    return [mean - half, mean + half]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def _method(name: str, given: Any) -> Method:
    """A list of rates, or a block with `learning_rates`, `method` and changes to the settings."""
    if isinstance(given, list):
        given = {"learning_rates": given}
    if not isinstance(given, dict) or not given.get("learning_rates"):
        raise ValueError(f"methods.{name}: expected learning rates, or a block with learning_rates, found {given!r}")
    more = {key: value for key, value in given.items() if key not in ("learning_rates", "method")}
    return Method(name, given.get("method", name), tuple(float(rate) for rate in given["learning_rates"]), more)


def settings_of(grid: Ablation, method: Method, trial: Trial, out: Path) -> list[str]:
    """A run's settings as overrides of the base configuration."""
    given = {
        **grid.settings,
        **method.settings,
        "method": method.method,
        "learning_rate": trial.learning_rate,
        "seed": trial.seed,
        "data": str(out / "data" / "train.jsonl.gz"),
        "rows": None,  # what the data has
        "held_out_rows": 0,  # validation is the data's own
        "questions": 0,
        "output_dir": str(out / "runs" / trial.name),
    }
    return [f"{key}={json.dumps(value)}" for key, value in given.items()]


def _trial(grid: Ablation, name: str) -> tuple[Method, Trial]:
    for method in grid.methods:
        for rate in method.learning_rates:
            for seed in grid.seeds:
                if (trial := Trial(method.name, rate, seed)).name == name:
                    return method, trial
    raise ValueError(f"{name}: expected a run of the grid, <method>-lr<rate>-seed<seed>")


def _fill(kind: Any, given: Any, where: str) -> Any:
    known = [part.name for part in fields(kind)]
    if not isinstance(given, dict) or (unknown := sorted(set(given) - set(known))):
        found = given if not isinstance(given, dict) else ", ".join(unknown)
        raise ValueError(f"{where}: expected some of {', '.join(known)}, found {found}")
    return kind(**given)
