"""Makes a grid's records, one after the other: trains, chooses learning rates, asks the test questions.

Every method gets as many learning rates; the one that is best on the validation questions, at the first seed, is the
method's own: by its loss where options are scored, which tells rates apart with few questions, else by accuracy. Only
then come the other seeds, and then each seed meets the test sets, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
from .grid import BASE, Grid, Trial, settings_of, trials_of
from .results import Record, choose, load


def make_data(grid: Grid, folder: Path) -> Record:
    """Writes training, validation and test rows, all or none, unless they are there.

    Returns:
        Their record: options, source, and the sha256 of every file.

    Raises:
        ValueError: naming the option that differs from those of the rows that are there, or a task without questions.
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
    """Refuses to go on with records that were made with other settings; further methods and seeds may come.

    Once a method has met the test questions, its learning rate stays: with further rates, or another first seed, it
    would be chosen by who has seen them.

    Raises:
        ValueError: naming the record and the setting.
    """
    known, found = trials_of(grid), load(results)
    for name, record in found.items():
        file = results / f"{name}.json"
        if test := record.get("test", {}).get("evaluation"):
            _same(test, _evaluation_settings(grid), file, "evaluation.")
        if validation := record.get("validation", {}).get("evaluation"):  # which is asked all its rows
            _same(validation, {**_evaluation_settings(grid), "rows": validation.get("rows")}, file, "evaluation.")
        if name in known and (settings := record.get("run", {}).get("settings")):
            now = parse(grid.base, settings_of(grid, *known[name], Path("runs"))).values
            _same(_comparable(settings), _comparable(now), file)
        if "test" in record and record["trial"]:
            _check_choice(grid, found, record, file)


def _check_choice(grid: Grid, found: dict[str, Record], record: Record, file: Path) -> None:
    """Refuses a grid that may choose another learning rate than the one that a test record has."""
    trial = record["trial"]
    for method in grid.methods:
        if method.name != trial["method"]:
            continue
        names = [Trial(method.name, rate, grid.seeds[0]).name for rate in method.learning_rates]
        missing = [name for name in names if name not in found]
        if further := [name for name in missing if name not in record.get("chosen_from", ())]:
            raise ValueError(
                f"{file}: {method.name} has met the test questions, expected no further choice of its learning rate, "
                f"found {further[0]} to try; keep its rates and the first seed, or choose another --out"
            )
        if not missing and (chosen := _chosen(found, names)) != trial["learning_rate"]:  # what was lost is made again
            raise ValueError(
                f"{file}: expected a test at the learning rate that was chosen, {chosen:g}; take this record out"
            )


def _chosen(found: dict[str, Record], names: list[str]) -> float:
    return float(choose([found[name] for name in names])["trial"]["learning_rate"])


def ready_steps(grid: Grid, results: Path) -> list[str]:
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
            trial = Trial(name, _chosen(found, trials), seed).name
            ready.append(f"{trial}.test" if trial in found else trial)
    return [step for step in ready if step not in found]


def make(grid: Grid, step: str, out: Path, results: Path) -> Path:
    """Makes one record: trains and answers the validation questions, or answers the test questions.

    Training goes on from its last checkpoint where it was cut off, and is done again where only its record is left.

    Args:
        grid: the grid.
        step: from `ready_steps`.
        out: folder for data, adapters and predictions.
        results: folder for records.

    Returns:
        The record's path.

    Raises:
        ValueError: it is not this step's turn, another process makes it, or what is there was made otherwise.
    """
    name, test = step.removesuffix(".test"), step.endswith(".test")
    known = trials_of(grid)
    if name not in known and step != f"{BASE}.test":
        raise ValueError(f"{step}: expected a run of the grid, <method>-lr<rate>-seed<seed>, or its .test")
    with _alone(results / f".{step}.lock"), _alone(out / "runs" / f".{name}.lock"):
        if step in load(results):  # by a process that has ended since
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
        if not test or load(results).get(name, {}).get("weights_sha256") != digest:  # else the validation's has it
            record["run"] = trained
        if test:
            record["chosen_from"] = [Trial(method.name, rate, grid.seeds[0]).name for rate in method.learning_rates]
    split = "test" if test else "validation"
    record[split] = _evaluate(grid, settings, source, folder, split, out)
    return records.write(results / f"{name}{'.test' * test}.json", record)


def _train(grid: Grid, given: list[str], folder: Path) -> Record:
    """The record of a training, which is done now unless it is there."""
    from ..training.run import load_rows, run

    file, settings = folder / "record.json", parse(grid.base, given)
    if not file.is_file():
        settings.job.resume = folder.exists()
        return run(settings)
    trained = records.read_json(file, "delete it, and the run goes on from its last checkpoint")
    if not (folder / "adapter").is_dir() and not (folder / "model").is_dir():
        raise ValueError(f"{folder}: expected an adapter or a model, found the record alone; delete the folder")
    _same(_comparable(trained.get("settings", {})), _comparable(settings.values), file)
    rows = load_rows(settings, load_tokenizer(find_model(settings.job.model), settings.sft))
    before = {"fingerprint": trained.get("data", {}).get("fingerprint")}
    _same(before, {"fingerprint": rows.fingerprint}, file, "data.")
    return trained


def _check_origin(record: Record, results: Path) -> None:
    """Refuses to add a record of other weights or other rows to those that are there."""
    for name, other in load(results).items():
        file = results / f"{name}.json"
        if model := other.get("model"):
            _same(model, {key: record["model"].get(key) for key in model}, file, "model.")  # older ones say less
        elif model := other.get("run", {}).get("model"):
            _same({"origin": model["origin"]}, {"origin": record["model"]["origin"]}, file, "model.")
        if data := other.get("data"):
            _same(data["files"], record["data"]["files"], file, "data.")


def _evaluate(grid: Grid, settings: Any, source: ModelSource, folder: Path, split: str, out: Path) -> Record:
    adapter = folder / "adapter" if (folder / "adapter").is_dir() else None
    if (folder / "model").is_dir():
        source = find_model(str(folder / "model"))
    init_kwargs = {"dtype": "float32", **(settings.sft.model_init_kwargs or {})}  # as in training
    if settings.sft.trust_remote_code:
        init_kwargs["trust_remote_code"] = True
    asked = _evaluation_settings(grid)
    predict: evaluation.Predict
    if adapter is not None and not _is_finite(adapter):
        predict = evaluation.unanswered  # its training diverged, and not every method would load it
    else:
        model, tokenizer = load_trained(source, adapter, **init_kwargs)
        if adapter is None and not (folder / "model").is_dir():
            tokenizer = load_tokenizer(source, settings.sft)  # the base is asked as the others are
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
    """How questions are asked, for their records."""
    return {key: value for key, value in vars(grid.evaluation).items() if key != "test"}


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Within it no other process makes the same record: one may be left of a grid that was killed.

    Raises:
        ValueError: if one does.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"{lock.stem[1:]}: expected no other process to make it, found one; wait for it, or kill it"
            ) from error
        yield


def _digest(folder: Path) -> str | None:
    """sha256 of the weights that a run saved; None where it saved none."""
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
    """A run's settings, less where it lies and what is done with it."""
    return {key: value for key, value in settings.items() if key not in LOCAL}


def _same(before: Record, now: Record, file: Path, prefix: str = "") -> None:
    records.check_same(before, now, str(file), "set it as before, or choose another --out", prefix)
