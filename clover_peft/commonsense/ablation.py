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

from safetensors.torch import load_file

from clover_peft import records
from clover_peft.training.arguments import apply_override, load_yaml, parse
from clover_peft.training.downloads import build_once
from clover_peft.training.models import find_model, load_trained

from . import evaluation, prepare
from .protocols import find_protocol
from .tasks import TASKS

BASE = "base"  # the model that is not fine-tuned
_MODES = ("score", "generate")
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
    keys = [part.name for part in fields(Ablation)]
    if isinstance(values, dict):
        for change in overrides:
            apply_override(values, change)
    if not isinstance(values, dict) or set(values) != set(keys):
        found = ", ".join(map(str, values)) if isinstance(values, dict) else repr(values)
        raise ValueError(f"{path}: expected the keys {', '.join(keys)}, found {found}")
    base, given, seeds = values["base"], values["methods"], values["seeds"]
    _expect(isinstance(base, list) and all(isinstance(name, str) for name in base), "base", "a list of files", base)
    _expect(isinstance(values["settings"] or {}, dict), "settings", "a block of settings", values["settings"])
    _expect(isinstance(given, dict), "methods", "a block of learning rates by name", given)
    methods = [_method(str(name), block) for name, block in given.items()]
    counts = {len(method.learning_rates) for method in methods}
    if len(counts) != 1 or BASE in given:
        raise ValueError(
            f"{path}: methods: expected as many learning rates for every method, and none called {BASE}, found "
            + ", ".join(f"{method.name} {len(method.learning_rates)}" for method in methods)
        )
    numbers = isinstance(seeds, list) and all(prepare.is_count(seed, 0) for seed in seeds)
    _expect(
        numbers and 0 < len(seeds) == len(set(seeds)), "seeds", "a list of different whole numbers from 0 on", seeds
    )
    data = _fill(prepare.Options, values["data"], "data")
    prepare.check(data, "data.")
    _expect(data.validation > 0, "data.validation", "a number of rows a task to choose rates on", data.validation)
    grid = Ablation(
        base=[path.resolve().parents[1] / name for name in base],
        settings=values["settings"] or {},
        data=data,
        methods=methods,
        seeds=seeds,
        evaluation=_evaluation(values["evaluation"]),
    )
    for method in methods:  # a typing error shows now, not after hours
        for rate in method.learning_rates:
            parse(grid.base, settings_of(grid, method, Trial(method.name, rate, grid.seeds[0]), Path("runs")))
    return grid


def make_data(grid: Ablation, folder: Path) -> None:
    """Writes training, validation and test rows, all or none, unless they are there.

    Raises:
        ValueError: naming the option that differs from those of the rows that are there, or a task without questions.
    """
    if (folder / prepare.RECORD).is_file():
        made = records.read_json(folder / prepare.RECORD, "delete the folder to write its rows again")
        _same(made["options"], vars(grid.data), folder / prepare.RECORD, "data.")
        return
    if folder.exists():
        raise ValueError(f"{folder}: expected no folder or one with {prepare.RECORD}, found none in it; delete it")
    suite = prepare.read(grid.data)
    prepare.clean(suite, grid.data)
    if empty := [name for name, rows in suite.test.items() if not rows or not suite.validation.get(name)]:
        raise ValueError(f"data.tasks: expected tasks with rows to train on and to test, found none of {empty[0]}")

    def write(partial: Path) -> None:
        prepare.write(suite, partial, vars(grid.data))

    build_once(folder, write)


def check_records(grid: Ablation, results: Path) -> None:
    """Refuses to go on with records that were made with other settings; further methods, rates and seeds may come.

    Raises:
        ValueError: naming the record and the setting.
    """
    known = _trials(grid)
    for name, record in load(results).items():
        file = results / f"{name}.json"
        if test := record.get("test", {}).get("evaluation"):
            _same(test, _asked(grid), file, "evaluation.")
        if validation := record.get("validation", {}).get("evaluation"):  # which is asked all its rows
            _same(validation, {**_asked(grid), "rows": validation.get("rows")}, file, "evaluation.")
        if name in known and (settings := record.get("run", {}).get("settings")):
            now = parse(grid.base, settings_of(grid, *known[name], Path("runs"))).values
            _same(_shared(settings), _shared(now), file)


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
    known = _trials(grid)
    if name != BASE and name not in known:
        raise ValueError(f"{name}: expected a run of the grid, <method>-lr<rate>-seed<seed>")
    make_data(grid, out / "data")
    record: Record = {"trial": None, "environment": records.environment()}
    method, trial = known[name] if name != BASE else next(iter(known.values()))
    given = settings_of(grid, method, trial, out)
    if name != BASE:
        if not (folder / "record.json").is_file():
            settings = parse(grid.base, given)
            settings.job.resume = folder.exists()
            run(settings)
        trained = json.loads((folder / "record.json").read_text())
        record |= {"trial": vars(trial), "run": trained}
    split = "test" if step.endswith(".test") else "validation"
    if split == "test":
        record.pop("run", None)  # the other record of this trial has it
    record[split] = _evaluate(grid, parse(grid.base, given), folder, split, out)  # parsed anew: training changes them
    return records.write(results / f"{step}.json", record)


def _evaluate(grid: Ablation, settings: Any, folder: Path, split: str, out: Path) -> Record:
    if (folder / "model").is_dir():
        source, adapter = find_model(str(folder / "model")), None
    else:
        source = find_model(settings.job.model)
        adapter = folder / "adapter" if (folder / "adapter").is_dir() else None
    if adapter is not None and not _is_finite(adapter):
        predict: evaluation.Predict = (
            evaluation.unanswered
        )  # its training diverged, and not every method would load it
    else:
        dtype = (settings.sft.model_init_kwargs or {}).get("dtype", "float32")  # as in training
        model, tokenizer = load_trained(source, adapter, dtype)
        protocol = find_protocol(settings.job.prompt, tokenizer)
        if grid.evaluation.mode == "score":
            predict = evaluation.scorer(model, tokenizer, protocol)
        else:
            beams, tokens = (protocol.beams, protocol.new_tokens) if protocol else (1, 32)
            predict = evaluation.generator(model, tokenizer, protocol, beams, tokens)
    rows = grid.evaluation.rows if split == "test" else None
    questions = evaluation.read_rows(out / "data", split, grid.data.tasks or list(TASKS), rows, seed=0)
    asked = _asked(grid)
    predictions = evaluation.evaluate(questions, predict, grid.evaluation.batch_size, folder / split, asked)
    return {**evaluation.summarise(predictions), "evaluation": asked, "prompt": settings.job.prompt}


def _asked(grid: Ablation) -> Record:
    """How questions are asked, for their records."""
    return {key: value for key, value in vars(grid.evaluation).items() if key != "test"}


def _is_finite(adapter: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in load_file(adapter / "adapter_model.safetensors").values())


def load(results: Path) -> dict[str, Record]:
    """Name -> record, of a folder of records.

    Raises:
        ValueError: naming the file that is damaged.
    """
    remedy = "delete it, and the next run makes it again"
    return {path.stem: records.read_json(path, remedy) for path in sorted(results.glob("*.json"))}


def choose(candidates: Sequence[Record]) -> Record:
    """The candidate with the lowest validation loss, or the most right answers where none has a loss; of equals the
    one with the lower rate. One without a loss among others diverged."""

    def rank(record: Record) -> tuple[float, float, float]:
        loss, rate = _loss(record), record["trial"]["learning_rate"]
        return (loss, 0.0, rate) if loss is not None else (math.inf, -record["validation"]["mean"], rate)

    return min(candidates, key=rank)


def _loss(record: Record) -> float | None:
    """Of the validation questions, if it is a number; a record has text for NaN."""
    loss = record["validation"].get("loss")
    return loss if isinstance(loss, (int, float)) and math.isfinite(loss) else None


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
        validated = [r for r in found.values() if "validation" in r and r["trial"]["method"] == method]
        seeds = sorted(record["trial"]["seed"] for record in validated)
        candidates = {
            record["trial"]["learning_rate"]: (record["validation"]["mean"], _loss(record))
            for record in validated
            if record["trial"]["seed"] == statistics.mode(seeds)  # at which several rates were tried
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
            "losses": [[(entry["step"], float(entry["loss"])) for entry in run["loss"]["log"]] for run in runs],
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
            "loss": _loss(record),
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
    rates = given["learning_rates"]
    numbers = isinstance(rates, list) and all(type(rate) in (int, float) and 0 < rate < math.inf for rate in rates)
    different = numbers and len({f"{rate:g}" for rate in rates}) == len(rates)  # as records are named
    _expect(different, f"methods.{name}.learning_rates", "a list of positive numbers that differ in six digits", rates)
    _expect(Path(name).name == name, "methods", "names that can be those of files", name)
    more = {key: value for key, value in given.items() if key not in ("learning_rates", "method")}
    return Method(name, given.get("method", name), tuple(float(rate) for rate in rates), more)


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


def _evaluation(given: Any) -> Evaluation:
    found: Evaluation = _fill(Evaluation, given, "evaluation")
    every = found.rows is None or prepare.is_count(found.rows, 1)
    _expect(found.mode in _MODES, "evaluation.mode", " or ".join(_MODES), found.mode)
    _expect(every, "evaluation.rows", "a whole number from 1 on, or null for all", found.rows)
    _expect(
        prepare.is_count(found.batch_size, 1), "evaluation.batch_size", "a whole number from 1 on", found.batch_size
    )
    _expect(isinstance(found.test, bool), "evaluation.test", "true or false", found.test)
    return found


def _trials(grid: Ablation) -> dict[str, tuple[Method, Trial]]:
    """Every run that the grid may come to, by its name."""
    return {
        (trial := Trial(method.name, rate, seed)).name: (method, trial)
        for method in grid.methods
        for rate in method.learning_rates
        for seed in grid.seeds
    }


def _shared(settings: Record) -> Record:
    """A run's settings, less where it lies and what is done with it."""
    local = ("data", "output_dir", "resume", "merge")
    return {key: value for key, value in settings.items() if key not in local and not key.endswith("hub_token")}


def _same(before: Record, now: Record, file: Path, prefix: str = "") -> None:
    """Refuses values other than those of a file that was made before, naming the key."""
    now = json.loads(json.dumps(now))
    for key in sorted(before.keys() | now.keys()):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            _same(one, other, file, f"{prefix}{key}.")
        elif one != other:
            raise ValueError(
                f"{prefix}{key}: expected {one!r} as in {file}, found {other!r}; set it as before, or choose another "
                "--out"
            )


def _expect(good: bool, key: str, expected: str, found: Any) -> None:
    if not good:
        raise ValueError(f"{key}: expected {expected}, found {found!r}")


def _fill(kind: Any, given: Any, where: str) -> Any:
    known = [part.name for part in fields(kind)]
    if not isinstance(given, dict) or (unknown := sorted(set(given) - set(known))):
        found = given if not isinstance(given, dict) else ", ".join(unknown)
        raise ValueError(f"{where}: expected some of {', '.join(known)}, found {found}")
    return kind(**given)
