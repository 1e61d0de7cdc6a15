"""Runs a grid step by step: trains, chooses learning rates, asks the test questions. Each step writes one record.

All methods try equally many learning rates. For each method, the rate that is best on the validation questions at the
first seed is chosen: by the loss where options are scored, because it tells rates apart with few questions, else by
the accuracy. Only then are the other seeds trained, and each seed answers the test questions once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from ...io import run_record as records
from ...io.atomic import build_once
from ...io.hub_models import ModelSource, find_model, load_trained, weights_digest
from ..commonsense import TASKS, evaluation, prepare
from ..commonsense.protocols import find_protocol
from ..training.arguments import LOCAL, parse
from ..training.loading import load_tokenizer
from ..training.resuming import alone
from .grid import BASE, Grid, Trial, settings_of, trials_of
from .results import Record, choose, load


def make_data(grid: Grid, folder: Path) -> Record:
    """Write training, validation and test rows, all or none, unless the folder has them.

    Returns:
        Their record: options, source, and the sha256 of every file.

    Raises:
        ValueError: the folder's rows were made with other options or have changed, or a task has no questions.
    """
    if (folder / prepare.RECORD).is_file():
        made = records.read_json(folder / prepare.RECORD, "delete the folder to write its rows again")
        _same(made["options"], vars(grid.data), folder / prepare.RECORD, "data.")
        prepare.check_files(folder, made)
        return made
    if folder.exists():
        raise ValueError(f"{folder}: expected no folder or one with {prepare.RECORD}, found none in it; delete it")
    suite = prepare.read(grid.data)
    prepare.clean(suite, grid.data)
    if empty := [name for name, rows in suite.test.items() if not rows or not suite.validation.get(name)]:
        raise ValueError(f"data.tasks: expected tasks with rows to train on and to test, found none of {empty[0]}")

    def write(partial: Path) -> None:
        prepare.write(suite, partial, vars(grid.data))

    build_once(folder, write)
    return records.read_json(folder / prepare.RECORD, "delete the folder to write its rows again")


def check_records(grid: Grid, results: Path) -> None:
    """Check that the records were made with the grid's settings; further methods and seeds may be added.

    Once a method has answered the test questions, its learning rates and the first seed are fixed: a new choice would
    be made by somebody who has seen the test results.

    Raises:
        ValueError: a setting differs; the message names it and the record.
    """
    known, found = trials_of(grid), load(results)
    for name, record in found.items():
        file = results / f"{name}.json"
        if test := record.get("test", {}).get("evaluation"):
            _same(test, _evaluation_settings(grid), file, "evaluation.")
        if validation := record.get("validation", {}).get("evaluation"):  # All validation rows are asked.
            _same(validation, {**_evaluation_settings(grid), "rows": validation.get("rows")}, file, "evaluation.")
        if name in known and (settings := record.get("run", {}).get("settings")):
            now = parse(grid.base, settings_of(grid, *known[name], Path("runs"))).values
            _same(_comparable(settings), _comparable(now), file)
        if "test" in record and record["trial"]:
            _check_choice(grid, found, record, file)


def _check_choice(grid: Grid, found: dict[str, Record], record: Record, file: Path) -> None:
    """Check that the grid cannot choose another learning rate than the one that a test record has."""
    trial = record["trial"]
    for method in grid.methods:
        if method.name != trial["method"]:
            continue
        names = [Trial(method.name, rate, grid.seeds[0]).name for rate in method.learning_rates]
        missing = [name for name in names if name not in found]
        if further := [name for name in missing if name not in record.get("chosen_from", ())]:
            raise ValueError(
                f"{file}: {method.name} has answered the test questions, expected no further choice of its learning "
                f"rate, found {further[0]} to try; keep its rates and the first seed, or choose another --out"
            )
        # Missing records are made again.
        if not missing and (chosen := _chosen(found, names)) != trial["learning_rate"]:
            raise ValueError(
                f"{file}: expected a test at the learning rate that was chosen, {chosen:g}; take this record out"
            )


def _chosen(found: dict[str, Record], names: list[str]) -> float:
    return float(choose([found[name] for name in names])["trial"]["learning_rate"])


def ready_steps(grid: Grid, results: Path) -> list[str]:
    """List the records that can be made now, "<trial>" or "<trial>.test"; the list of a complete grid is empty.

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
            trial = Trial(name, _chosen(found, trials), seed).name
            ready.append(f"{trial}.test" if trial in found else trial)
    return [step for step in ready if step not in found]


def make(grid: Grid, step: str, out: Path, results: Path) -> Path:
    """Make one record: train and answer the validation questions, or answer the test questions.

    An interrupted training resumes from its last checkpoint. A training of which only the record is left is repeated.

    Args:
        grid: the grid.
        step: the name of the record, from `ready_steps`.
        out: folder for data, adapters and predictions.
        results: folder for records.

    Returns:
        The record's path.

    Raises:
        ValueError: other steps come first, another process makes this one, or earlier work had other settings.
    """
    name, test = step.removesuffix(".test"), step.endswith(".test")
    known = trials_of(grid)
    if name not in known and step != f"{BASE}.test":
        raise ValueError(f"{step}: expected a run of the grid, <method>-lr<rate>-seed<seed>, or its .test")
    with alone(results / f".{step}.lock", step), alone(out / "runs" / f".{name}.lock", name):
        if step in load(results):  # Another process has made it in the meantime.
            return results / f"{step}.json"
        if (made := results / f"{step}.json").exists():
            raise ValueError(f"{made}: expected a record or no file, found another; take it out")
        if step not in (ready := ready_steps(grid, results)):
            why = f"others to be made first, such as {ready[0]}" if ready else "a full grid"
            raise ValueError(f"{step}: expected a step whose turn it is, found {why}")
        return _make(grid, name, test, out, results)


def _make(grid: Grid, name: str, test: bool, out: Path, results: Path) -> Path:
    folder = out / "runs" / name
    data = make_data(grid, out / "data")
    method, trial = trials_of(grid).get(name) or next(iter(trials_of(grid).values()))
    given = settings_of(grid, method, trial, out)
    settings = parse(grid.base, given)
    source = find_model(settings.job.model)
    record: Record = {
        "trial": None if name == BASE else vars(trial),
        "environment": records.environment(),
        "model": {
            "name": source.name,
            "origin": source.origin,
            "revision": (settings.sft.model_init_kwargs or {}).get("revision"),
            "weights_sha256": weights_digest(source.path),
        },
        "data": {key: data.get(key) for key in ("options", "source", "files")},
    }
    _check_origin(record, results)
    if name != BASE:
        trained = _train(grid, given, folder)
        record["weights_sha256"] = digest = _digest(folder)
        # A test record has its training only where the validation record is about other weights.
        if not test or load(results).get(name, {}).get("weights_sha256") != digest:
            record["run"] = trained
        if test:
            record["chosen_from"] = [Trial(method.name, rate, grid.seeds[0]).name for rate in method.learning_rates]
    split = "test" if test else "validation"
    record[split] = _evaluate(grid, settings, source, folder, split, out)
    return records.write(results / f"{name}{'.test' * test}.json", record)


def _train(grid: Grid, given: list[str], folder: Path) -> Record:
    """Train, unless that is done, and return the record of the training."""
    from ..training.run import load_rows, run

    file, settings = folder / "record.json", parse(grid.base, given)
    if not file.is_file():
        settings.job.resume = folder.exists()
        return run(settings)
    trained = records.read_json(file, "delete it, and the run resumes from its last checkpoint")
    if not (folder / "adapter").is_dir() and not (folder / "model").is_dir():
        raise ValueError(f"{folder}: expected an adapter or a model, found the record alone; delete the folder")
    _same(_comparable(trained.get("settings", {})), _comparable(settings.values), file)
    rows = load_rows(settings, load_tokenizer(find_model(settings.job.model), settings.sft))
    before = {"fingerprint": trained.get("data", {}).get("fingerprint")}
    _same(before, {"fingerprint": rows.fingerprint}, file, "data.")
    return trained


def _check_origin(record: Record, results: Path) -> None:
    """Check that a new record has the weights and the rows of the records that are there."""
    for name, other in load(results).items():
        file = results / f"{name}.json"
        if model := other.get("model"):
            now = {key: record["model"].get(key) for key in model}  # Older records have fewer keys.
            _same(model, now, file, "model.")
        elif model := other.get("run", {}).get("model"):
            _same({"origin": model["origin"]}, {"origin": record["model"]["origin"]}, file, "model.")
        if data := other.get("data"):
            _same(data["files"], record["data"]["files"], file, "data.")


def _evaluate(grid: Grid, settings: Any, source: ModelSource, folder: Path, split: str, out: Path) -> Record:
    adapter = folder / "adapter" if (folder / "adapter").is_dir() else None
    if (folder / "model").is_dir():
        source = find_model(str(folder / "model"))
    init_kwargs = {"dtype": "float32", **(settings.sft.model_init_kwargs or {})}  # the same as in training
    if settings.sft.trust_remote_code:
        init_kwargs["trust_remote_code"] = True
    asked = _evaluation_settings(grid)
    predict: evaluation.Predict
    if adapter is not None and not _is_finite(adapter):
        predict = evaluation.unanswered  # The training diverged, and some methods cannot load such an adapter.
    else:
        model, tokenizer = load_trained(source, adapter, **init_kwargs)
        if adapter is None and not (folder / "model").is_dir():
            tokenizer = load_tokenizer(source, settings.sft)  # The base model gets the prompts of the others.
        protocol = find_protocol(settings.job.prompt, tokenizer)
        if grid.evaluation.mode == "score":
            predict = evaluation.scorer(model, tokenizer, protocol)
        else:
            beams, tokens = (protocol.beams, protocol.new_tokens) if protocol else (1, 32)
            predict = evaluation.generator(model, tokenizer, protocol, beams, tokens)
    rows = grid.evaluation.rows if split == "test" else None
    questions = evaluation.read_questions(out / "data", split, grid.data.tasks or list(TASKS), rows, seed=0)
    determined = {"origin": source.origin, "prompt": settings.job.prompt, "weights_sha256": _digest(folder)}
    predictions = evaluation.evaluate(
        questions, predict, grid.evaluation.batch_size, folder / split, {**asked, **init_kwargs, **determined}
    )
    asked["rows"] = rows
    summary = evaluation.summarise(predictions)
    return {**summary, "evaluation": asked, "prompt": settings.job.prompt, "questions": evaluation.digest(questions)}


def _evaluation_settings(grid: Grid) -> Record:
    """Return how questions are asked, for the records."""
    return {key: value for key, value in vars(grid.evaluation).items() if key != "test"}


def _digest(folder: Path) -> str | None:
    """Return the sha256 of the weights that a run saved; None where it saved none."""
    return weights_digest(folder / "adapter") or weights_digest(folder / "model")


def _is_finite(adapter: Path) -> bool:
    file = adapter / "adapter_model.safetensors"
    try:
        return all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: expected an adapter's weights, found none that can be read; delete {adapter.parent}"
        ) from error


def _comparable(settings: Record) -> Record:
    """Return a run's settings, without its paths and without what is done with its result."""
    return {key: value for key, value in settings.items() if key not in LOCAL}


def _same(before: Record, now: Record, file: Path, prefix: str = "") -> None:
    records.check_same(before, now, str(file), "set it as before, or choose another --out", prefix)
