"""`clover analyze`: measures what fine-tuning did to the weights."""

from __future__ import annotations

import argparse
import gzip
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..experiments.analysis import (
    Change,
    adapter_changes,
    collect_inputs,
    figures,
    left_out_of_adapter,
    left_out_of_models,
    measure,
    model_changes,
    moves_base,
)
from ..experiments.commonsense import sources
from ..io import run_record as records
from ..io.adapters import label_options, saved_shapes
from ..io.figures import find_pyplot
from ..io.hub_models import ModelSource, announce_model, find_adapter, load_adapted, load_tokenizer
from ..io.model_class import find_class, read_config
from ..io.tables import markdown_table
from . import checks, parsers
from .errors import reports_errors


@reports_errors()
def run(given: argparse.Namespace) -> int:
    checks.analyze(given)
    labels = checks.labels(given)
    if not given.no_pictures:
        find_pyplot()
    found: dict[str, Any] = {}
    left_out: dict[str, list[str]] = {}
    if given.adapter:
        for label, path in zip(labels, given.adapter, strict=True):
            found[label], left_out[label] = _measure_adapter(label, path, given)
    else:
        source, end = announce_model(given.before), announce_model(given.after)
        before = load_adapted(source, None, _class_of(source, given), given.dtype)
        after = load_adapted(end, None, _class_of(end, given), given.dtype)
        texts, label = _texts(source, None, given), labels[0]
        found[label], left_out[label] = _measure_models(before, after, texts, label, given)
    print(_table(found))
    for label, names in left_out.items():
        if names:
            print(f"{label}: changed too, but not measured, as they are no projections: {_kinds(names)}")
    options = {key: value for key, value in vars(given).items() if value is not None}
    record = {"options": options, "environment": records.environment(), "modules": found, "left_out": left_out}
    print(records.write(given.out / "analysis.json", record))
    for path in [] if given.no_pictures else figures.draw(found, given.out):
        print(path)
    return 0


# The first part holds the measures of each module; the second names what changed as well and was not measured.
Measured = tuple[list[dict[str, Any]], list[str]]


def _measure_adapter(label: str, path: Path, given: argparse.Namespace) -> Measured:
    config = find_adapter(path)
    source = announce_model(given.model or config.base_model_name_or_path)
    revision = (config.revision if given.model is None else None) or "main"  # of the base that the adapter names
    base_config = read_config(source.path, revision)
    kind, texts = find_class(base_config, config, given.model_class), _texts(source, path, given, revision)
    options = {"revision": revision, **label_options(base_config, kind, config, path)}
    if moves_base(config):
        base = load_adapted(source, None, kind, given.dtype, **options)
        merged = load_adapted(source, path, kind, given.dtype, merge=True, **options)
        return _measure_models(base, merged, texts, label, given)
    model = load_adapted(source, path, kind, given.dtype, **options)
    targeted = getattr(model.base_model, "targeted_module_names", [])  # prompt methods adapt none, and are refused
    left_out = left_out_of_adapter(model, saved_shapes(path)) if targeted else []
    layers = [name for name in targeted if name not in left_out]
    inputs = _inputs(model, layers, texts)
    changes = _shown(adapter_changes(model), label, len(layers))
    return [_measured(change, inputs, given) for change in changes], left_out


def _class_of(source: ModelSource, given: argparse.Namespace) -> Any:
    return find_class(read_config(source.path), name=given.model_class)


def _measure_models(
    before: Any, after: Any, texts: list[torch.Tensor], label: str, given: argparse.Namespace
) -> Measured:
    names = [name for name, module in before.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    inputs = _inputs(before, names, texts)
    found = [_measured(change, inputs, given) for change in _shown(model_changes(before, after), label, len(names))]
    left_out = left_out_of_models(before, after)
    if not found and left_out:
        raise ValueError(
            f"{label}: expected projections with other weights than before, found the same ones, and others in "
            f"{_kinds(left_out)} alone, which are not measured"
        )
    if not found:
        raise ValueError(f"{label}: expected other weights than before, found the same")
    return found, left_out


def _kinds(names: list[str]) -> str:
    """The names without the numbers of their layers, and how many there are of each."""
    counts = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _measured(change: Change, inputs: dict[str, torch.Tensor], given: argparse.Namespace) -> dict[str, Any]:
    return measure(change, inputs.get(change.name), top=given.top, threshold=given.threshold)


def _texts(
    source: ModelSource, adapter: Path | None, given: argparse.Namespace, revision: str = "main"
) -> list[torch.Tensor]:
    """The tokens of every text, (1, tokens) each; none without `--texts`."""
    texts: Path | None = given.texts
    if texts is None:
        return []
    if ".jsonl" in texts.suffixes:
        chosen = [row["instruction"] for row in sources.read_rows(texts)[:64]]
    else:
        opener: Any = gzip.open if texts.suffix == ".gz" else open
        with opener(texts, "rt", encoding="utf-8") as lines:
            chosen = list(islice((line.strip() for line in lines if line.strip()), 64))
    if not chosen:
        raise ValueError(f"{texts}: expected a text a line, found none")
    tokenizer = load_tokenizer(source, adapter, revision=revision)
    return [tokenizer(t, return_tensors="pt", truncation=True, max_length=512)["input_ids"] for t in chosen]


def _inputs(model: Any, names: list[str], texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    if not texts:
        return {}
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        raise ValueError(
            f"--texts: expected a model that reads text alone, found {type(model).__name__}; leave it out"
        )
    return collect_inputs(model, names, [{"input_ids": ids.to(model.device)} for ids in texts])


def _shown(changes: Iterator[Change], label: str, count: int) -> Iterator[Change]:
    return iter(tqdm(changes, desc=label, total=count, unit="module"))


def _table(found: figures.Found) -> str:
    """Means over the layers, of each kind of module."""
    header = [
        "",
        "",
        "modules",
        "rank",
        "effective rank",
        "of",
        "relative size",
        "intruders",
        "share of input",
        "chance",
    ]
    rows = []
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for label, measured in found.items():
        for module in measured:
            kinds.setdefault((label, module["name"].rpartition(".")[2]), []).append(module)
    for (label, kind), modules in kinds.items():
        updates = [module["update"] for module in modules]
        shares = [module["share"] for module in modules if "share" in module]
        rank, effective = (statistics.mean(update[key] for update in updates) for key in ("rank", "effective_rank"))
        narrowest = statistics.mean(min(module["shape"]) for module in modules)
        relative = statistics.mean(update["relative"] for update in updates)
        intruders = sum(module["intruders"]["count"] for module in modules)
        trained, chance = (
            f"{statistics.mean(share[key] for share in shares):.1%}" if shares else "-"
            for key in ("trained", "chance")
        )
        cells = [f"{rank:.1f}", f"{effective:.1f}", f"{narrowest:.1f}", f"{relative:.2%}", str(intruders)]
        rows.append([label, kind, str(len(modules)), *cells, trained, chance])
    return markdown_table(header, rows, left=2)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parsers.analyze(arguments))
