"""The results of a grid, computed from its records: chosen learning rates, a row for each method, differences."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...io import run_record as records
from ..training.arguments import LOCAL
from .grid import BASE, Trial

Record = dict[str, Any]
_OWN = {"learning_rate", "seed", "peft", "method", *LOCAL}  # settings in which the runs of a grid differ


@dataclass(frozen=True)
class TableRow:
    """The test results of one method at its chosen learning rate. Means are over its seeds.

    Attributes:
        method: the method's name, or `BASE`.
        learning_rate: the chosen rate; None for the base model.
        seeds: the seeds that answered the test questions.
        parameters: the number of trainable parameters.
        tasks: name -> mean accuracy.
        averages: for each seed, the mean accuracy of the tasks, unweighted.
        loss: negative log-probability of the right option, in nats, averaged over tasks and seeds; None without any.
        interval: 95 % interval of the mean accuracy, from the number of questions; all seeds answer the same ones.
        right: for each seed, task -> a string with "1" for each right answer and "0" for each wrong one; empty where a
            record lacks it.
        missing: names of records that took part in the choice of the learning rate and are no longer there.
        candidates: learning rate -> (accuracy, loss or None) on the validation questions, for the rates tried.
        init_seconds, train_seconds, peak_memory_bytes, adapter_bytes: means; None where no record has them.
        train_rows: the number of rows to train on; a short training does not reach all of them.
        steps: steps of the optimiser.
        questions: the number of test questions.
        asked: digests of the questions: one, if all seeds answered the same; None for a record that lacks it.
        unparsed: how many answers, over all seeds, could not be parsed.
        losses: for each seed, (step, training loss).
        made: the origin of the numbers: base weights, data, revisions, machines, and the settings (in JSON) in which
            the runs of a grid should not differ.
        records: names of its records.
    """

    method: str
    learning_rate: float | None
    seeds: list[int]
    parameters: int
    tasks: dict[str, float]
    averages: list[float]
    loss: float | None
    interval: list[float]
    right: list[dict[str, str]]
    missing: list[str]
    candidates: dict[float, tuple[float, float | None]]
    init_seconds: float | None
    train_seconds: float | None
    peak_memory_bytes: float | None
    adapter_bytes: float | None
    train_rows: int
    steps: int
    questions: int
    asked: set[str | None]
    unparsed: int
    losses: list[list[tuple[int, float]]]
    made: dict[str, set[str]]
    records: list[str]

    @property
    def average(self) -> float:
        """The mean accuracy over tasks and seeds."""
        return statistics.mean(self.averages)

    @property
    def sd(self) -> float | None:
        """The standard deviation of the seeds' averages; None for one seed."""
        return statistics.stdev(self.averages) if len(self.averages) > 1 else None

    @property
    def at_edge(self) -> bool:
        """Whether the chosen rate is the lowest or the highest of those tried: a better one may lie beyond it."""
        return len(self.candidates) > 1 and self.learning_rate in (min(self.candidates), max(self.candidates))


@dataclass(frozen=True)
class Difference:
    """The difference of two rows' averages.

    Attributes:
        points: the first average less the second, as a share of 1.
        of_seeds: its standard error from the spread over seeds; None for one seed.
        of_questions: its standard error from the differences on each question; None unless the records have every
            answer and both rows have the same questions.
    """

    points: float
    of_seeds: float | None
    of_questions: float | None


def load(results: Path) -> dict[str, Record]:
    """Read a folder of records; other JSON files are ignored.

    Returns:
        Name -> record.

    Raises:
        ValueError: a file is damaged.
    """
    remedy = "delete it, and the next run makes it again"
    found = {path: records.read_json(path, remedy) for path in sorted(results.glob("*.json"))}
    for path, record in found.items():
        if "trial" in record:
            try:
                trial = Trial(**record["trial"]).name if record["trial"] else BASE
            except TypeError:
                trial = repr(record["trial"])
            parts = {trial: "validation", f"{trial}.test": "test"}
            if not isinstance(record.get(parts.get(path.stem, "")), dict):
                raise ValueError(f"{path}: expected the record of {path.stem}, found one of {trial}; {remedy}")
    return {path.stem: record for path, record in found.items() if "trial" in record}


def choose(candidates: Sequence[Record]) -> Record:
    """Choose the candidate with the lowest validation loss, or with the most right answers where none has a loss.

    Of equal candidates the one with the lower rate is chosen. Where some have a loss, one without it diverged.
    """

    def rank(record: Record) -> tuple[float, float, float]:
        loss, rate = _loss(record["validation"]), record["trial"]["learning_rate"]
        return (loss, 0.0, rate) if loss is not None else (math.inf, -record["validation"]["mean"], rate)

    return min(candidates, key=rank)


def table_rows(found: dict[str, Record]) -> list[TableRow]:
    """Make a row for every method that has a test record.

    Raises:
        ValueError: a method has test records at two learning rates; or the records do not compare, because they are
            about different questions or ways of asking them.
    """
    tests = {name.removesuffix(".test"): record for name, record in found.items() if name.endswith(".test")}
    for key in ("evaluation", "prompt", "questions"):  # Older records lack some of these.
        known = {name: record["test"][key] for name, record in tests.items() if key in record["test"]}
        for name, value in known.items():
            if value != (first := next(iter(known.values()))):
                raise ValueError(
                    f"{name}.test: expected the {key} of {next(iter(known))}.test, {first}, found {value}; "
                    "take out the records that do not compare"
                )
    groups: dict[str, dict[float | None, list[str]]] = {}
    for name, record in tests.items():
        trial = record["trial"] or {"method": BASE, "learning_rate": None}
        groups.setdefault(trial["method"], {}).setdefault(trial["learning_rate"], []).append(name)
    for method, rates in groups.items():
        if len(rates) > 1:
            found_rates = ", ".join(f"{rate:g}" for rate in rates if rate is not None)
            raise ValueError(
                f"{method}: expected test records at the one learning rate chosen for it, found {found_rates}; "
                "take out those that are not of this grid"
            )
    return [_row(method, rate, names, found) for method, rates in groups.items() for rate, names in rates.items()]


def _row(method: str, rate: float | None, names: list[str], found: dict[str, Record]) -> TableRow:
    tests = [found[f"{name}.test"] for name in names]
    results = [record["test"] for record in tests]
    runs = [run for name in names if (run := _run_of(name, found))]
    tried = [found[name] for name in tests[0].get("chosen_from", ()) if name in found]
    everything = [*tests, *(found[name] for name in names if name in found)]
    return TableRow(
        method=method,
        learning_rate=rate,
        seeds=[record["trial"]["seed"] for record in tests if record["trial"]],
        parameters=runs[0]["parameters"]["trainable"] if runs else 0,
        tasks={
            task: statistics.mean(result["tasks"][task]["accuracy"] for result in results)
            for task in results[0]["tasks"]
        },
        averages=[result["mean"] for result in results],
        loss=_mean([loss for result in results if (loss := _loss(result)) is not None]),
        interval=[statistics.mean(result["interval"][side] for result in results) for side in (0, 1)],
        right=[{name: task["right"] for name, task in r["tasks"].items() if "right" in task} for r in results],
        missing=[name for name in tests[0].get("chosen_from", ()) if name not in found],
        candidates={
            record["trial"]["learning_rate"]: (record["validation"]["mean"], _loss(record["validation"]))
            for record in sorted(tried, key=lambda record: record["trial"]["learning_rate"])
        },
        init_seconds=_mean([run["seconds"]["init"] for run in runs]),
        train_seconds=_mean([run["seconds"]["train"] for run in runs]),
        peak_memory_bytes=_mean([run.get("peak_gpu_bytes") or run["peak_memory_bytes"] for run in runs]),
        adapter_bytes=_mean([run["adapter_bytes"] for run in runs if run["adapter_bytes"]]),
        train_rows=runs[0]["data"]["train_rows"] if runs else 0,
        steps=runs[0]["steps"] if runs else 0,
        questions=sum(task["questions"] for task in results[0]["tasks"].values()),
        asked={result.get("questions") for result in results},
        unparsed=sum(task["unparsed"] for result in results for task in result["tasks"].values()),
        losses=[[(entry["step"], float(entry["loss"])) for entry in run["loss"]["log"]] for run in runs],
        made=made_with(everything),
        records=[name for n in names for name in (n, f"{n}.test") if name in found],
    )


def _run_of(name: str, found: dict[str, Record]) -> Record:
    """Return the training behind a test; the test record has its own, if the model was trained again for it."""
    return found[f"{name}.test"].get("run") or found.get(name, {}).get("run") or {}


def made_with(found: Sequence[Record]) -> dict[str, set[str]]:
    """Collect where some records' numbers come from: base, data, machine, revision and settings."""
    made: dict[str, set[str]] = {"base": set(), "data": set(), "machine": set(), "revision": set(), "settings": set()}
    for record in found:
        if settings := record.get("run", {}).get("settings"):
            shared = {key: value for key, value in settings.items() if key not in _OWN}
            made["settings"].add(json.dumps(shared, sort_keys=True))
        if model := record.get("model") or record.get("run", {}).get("model"):
            made["base"].add(f"{model['name']}, {model['origin']}")
        if data := record.get("data"):
            made["data"].add(str(data["source"] or data["options"]["source"]))
        if environment := record.get("environment"):
            made["machine"].add(
                environment["cuda"] or f"{environment['torch_threads']} thread(s) of {environment['cpu']}"
            )
            made["revision"].add(str(environment["git_revision"])[:7] + "+" * bool(environment["git_dirty"]))
    return made


def trials(found: dict[str, Record]) -> list[Record]:
    """List the trials that answered the validation questions, best first.

    Returns:
        For each `name`, `method`, `learning_rate`, `accuracy`, `loss` (or None), `parameters`, `train_rows` and
        `train_seconds`.
    """
    rows = [
        {
            "name": name,
            **{key: record["trial"][key] for key in ("method", "learning_rate")},
            "accuracy": record["validation"]["mean"],
            "loss": _loss(record["validation"]),
            "parameters": record["run"]["parameters"]["trainable"],
            "train_rows": record["run"]["data"]["train_rows"],
            "train_seconds": record["run"]["seconds"]["train"],
        }
        for name, record in found.items()
        if "validation" in record
    ]
    return sorted(rows, key=lambda row: (row["loss"] is None, row["loss"] or 0.0, -row["accuracy"]))


def difference(one: TableRow, other: TableRow) -> Difference:
    """Compute the difference of two rows' averages and its standard errors."""
    of_seeds = None
    if one.sd is not None and other.sd is not None:
        of_seeds = math.sqrt(one.sd**2 / len(one.averages) + other.sd**2 / len(other.averages))
    return Difference(one.average - other.average, of_seeds, _error_of_questions(one, other))


def _error_of_questions(one: TableRow, other: TableRow) -> float | None:
    """Return the standard error of the mean over tasks of paired differences; seeds are averaged first."""
    if one.asked != other.asked or len(one.asked) != 1 or None in one.asked:
        return None
    variances = []
    for task in one.tasks:
        shares = []
        for row in (one, other):
            marks = [right.get(task) for right in row.right]
            if None in marks or len({len(str(mark)) for mark in marks}) != 1:
                return None
            shares.append([statistics.mean(map(int, column)) for column in zip(*map(str, marks), strict=True)])
        if len(shares[0]) != len(shares[1]) or len(shares[0]) < 2:
            return None
        variances.append(statistics.variance(a - b for a, b in zip(*shares, strict=True)) / len(shares[0]))
    return math.sqrt(sum(variances)) / len(variances)


def _loss(result: Record) -> float | None:
    """Return the loss of the questions if it is a number; a record has text for NaN."""
    loss = result.get("loss")
    return loss if isinstance(loss, (int, float)) and math.isfinite(loss) else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None
