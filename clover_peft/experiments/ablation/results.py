"""The table that a grid's records make: arithmetic on records, and nothing else."""

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
_OWN = {"learning_rate", "seed", "peft", "method", *LOCAL}  # settings of a run of its own


@dataclass(frozen=True)
class TableRow:
    """A method that met the test questions, at the learning rate that was chosen for it. Means are over its seeds.

    Attributes:
        method: its name, or `BASE`.
        learning_rate: the one chosen; None for the base.
        seeds: those that met the test questions.
        parameters: trainable ones.
        tasks: name -> mean accuracy.
        averages: a seed each, unweighted over the tasks.
        loss: mean over tasks and seeds, in nats, of the right option among its question's; None where none has any.
        interval: 95 % of the mean, from the questions; the seeds answer the same ones.
        right: of each seed, task -> a character a question, "1" where it was right; empty where a record lacks it.
        missing: names of the records from which it was chosen, where they are not there.
        candidates: learning rate -> (accuracy, loss or None) on the validation questions, from which it was chosen.
        init_seconds, train_seconds, peak_memory_bytes, adapter_bytes: means; None where there are none.
        train_rows: rows that it was given to train on; few steps do not see them all.
        steps: of the optimiser.
        questions: how many were asked.
        asked: digests of the questions, one where all seeds answered the same; None of a record that lacks it.
        unparsed: answers of all seeds that could not be parsed.
        losses: of each seed, (step, training loss).
        made: where its numbers come from: base weights, data, revisions, machines, settings (in JSON) beside its own.
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
        """Mean accuracy of the tasks, over the seeds."""
        return statistics.mean(self.averages)

    @property
    def sd(self) -> float | None:
        """Of the seeds' averages; None for one seed."""
        return statistics.stdev(self.averages) if len(self.averages) > 1 else None

    @property
    def at_edge(self) -> bool:
        """Whether the best of several learning rates was the lowest or the highest, beyond which a better may lie."""
        return len(self.candidates) > 1 and self.learning_rate in (min(self.candidates), max(self.candidates))


@dataclass(frozen=True)
class Difference:
    """Of two rows' averages.

    Attributes:
        points: the first's less the second's, as a share of 1.
        of_seeds: standard error from the seeds' spread; None for one seed.
        of_questions: standard error from the questions, which both answer: of the differences, question by question;
            None where the records do not say which questions were right, or they are not the same ones.
    """

    points: float
    of_seeds: float | None
    of_questions: float | None


def load(results: Path) -> dict[str, Record]:
    """Name -> record, of a folder of records; other JSON files are passed over.

    Raises:
        ValueError: naming the file that is damaged.
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
    """The candidate with the lowest validation loss, or the most right answers where none has a loss; of equals the
    one with the lower rate. One without a loss among others diverged."""

    def rank(record: Record) -> tuple[float, float, float]:
        loss, rate = _loss(record["validation"]), record["trial"]["learning_rate"]
        return (loss, 0.0, rate) if loss is not None else (math.inf, -record["validation"]["mean"], rate)

    return min(candidates, key=rank)


def table_rows(found: dict[str, Record]) -> list[TableRow]:
    """A row for every method that has a test record.

    Raises:
        ValueError: a method met the test questions at two learning rates, of which one was not chosen before; or
            records were asked other questions, or in another way.
    """
    tests = {name.removesuffix(".test"): record for name, record in found.items() if name.endswith(".test")}
    for key in ("evaluation", "prompt", "questions"):  # as far as records say
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
    """The training behind a test: in its own record where that was another than the validated one."""
    return found[f"{name}.test"].get("run") or found.get(name, {}).get("run") or {}


def made_with(found: Sequence[Record]) -> dict[str, set[str]]:
    """What -> where the numbers of some records come from, as far as they say."""
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
    """All that met the validation questions, best first: `name`, `method`, `learning_rate`, `accuracy`, `loss` (or
    None), `parameters`, `train_rows` and `train_seconds`."""
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
    """Of two rows' averages, with what seeds and questions leave uncertain in it."""
    of_seeds = None
    if one.sd is not None and other.sd is not None:
        of_seeds = math.sqrt(one.sd**2 / len(one.averages) + other.sd**2 / len(other.averages))
    return Difference(one.average - other.average, of_seeds, _error_of_questions(one, other))


def _error_of_questions(one: TableRow, other: TableRow) -> float | None:
    """Standard error of the mean over tasks of paired differences; each question's is averaged over seeds first."""
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
    """Of the questions, if it is a number; a record has text for NaN."""
    loss = result.get("loss")
    return loss if isinstance(loss, (int, float)) and math.isfinite(loss) else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None
