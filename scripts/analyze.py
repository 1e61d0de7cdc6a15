#!/usr/bin/env python
"""Says what a fine-tuning did to the weights: rank of the update, intruder dimensions, data on trained directions.

    python scripts/analyze.py --adapter runs/clover/adapter --adapter runs/lora/adapter --out runs/analysis
    python scripts/analyze.py --before HuggingFaceTB/SmolLM2-135M-Instruct --after runs/full/model --out runs/analysis
    python scripts/analyze.py --adapter runs/clover/adapter --texts questions.txt --out runs/analysis

Any method of peft that merges will do. With `--texts` (a text a line) the share of what each projection reads that
lies on the trained directions is measured too. Writes analysis.json and pictures of the paper's figures 2, 4, 5 and 6.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import clover_peft  # noqa: F401  registers CLOVER
from clover_peft.experiments.analysis import (
    Change,
    adapter_changes,
    collect_inputs,
    figures,
    measure,
    model_changes,
    moves_base,
)
from clover_peft.experiments.commonsense import sources
from clover_peft.io import run_record as records
from clover_peft.io.hub_models import find_adapter, find_model, load_trained
from clover_peft.io.tables import markdown_table


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        if not (given.adapter or (given.before and given.after)):
            raise ValueError("expected --adapter, or --before and --after")
        unused = ("before", "after") if given.adapter else ("model",)
        if useless := [key for key in unused if getattr(given, key) is not None]:
            raise ValueError(f"--{useless[0]}: expected none with --{'adapter' if given.adapter else 'before'}")
        labels = given.label or ([path.parent.name for path in given.adapter] if given.adapter else ["after"])
        if len(set(labels)) != len(given.adapter or labels[:1]):
            raise ValueError(f"--label: expected a name of its own for each adapter or model, found {labels}")
        if given.top < 1:
            raise ValueError(f"--top: expected at least 1, found {given.top}")
        if (given.out / "analysis.json").exists():
            raise ValueError(f"{given.out}: expected a new folder, found an analysis in it; choose another")
        found: dict[str, Any] = {}
        if given.adapter:
            for label, path in zip(labels, given.adapter, strict=True):
                found[label] = _measure_adapter(label, path, given)
        else:
            before, tokenizer = load_trained(find_model(given.before), None, given.dtype)
            after = AutoModelForCausalLM.from_pretrained(find_model(given.after).path, dtype=given.dtype)
            after = after.to(before.device)
            found[labels[0]] = _measure_models(before, after, tokenizer, labels[0], given)
        print(_table(found))
        options = {key: value for key, value in vars(given).items() if value is not None}
        record = {"options": options, "environment": records.environment(), "modules": found}
        print(records.write(given.out / "analysis.json", record))
        for path in [] if given.no_pictures else figures.draw(found, given.out):
            print(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _measure_adapter(label: str, path: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    config = find_adapter(path)
    source = find_model(given.model or config.base_model_name_or_path)
    if moves_base(config):
        base, tokenizer = load_trained(source, None, given.dtype)
        merged, _ = load_trained(source, path, given.dtype, merge=True)
        return _measure_models(base, merged, tokenizer, label, given)
    model, tokenizer = load_trained(source, path, given.dtype)
    layers = getattr(model.base_model, "targeted_module_names", [])  # prompt methods adapt none, and are refused
    inputs = _inputs(model, tokenizer, layers, given.texts)
    return [_measured(change, inputs, given) for change in _shown(adapter_changes(model), label, len(layers))]


def _measure_models(
    before: Any, after: Any, tokenizer: Any, label: str, given: argparse.Namespace
) -> list[dict[str, Any]]:
    names = [name for name, module in before.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    inputs = _inputs(before, tokenizer, names, given.texts)
    found = [_measured(change, inputs, given) for change in _shown(model_changes(before, after), label, len(names))]
    if not found:
        raise ValueError(f"{label}: expected other weights than before, found the same")
    return found


def _measured(change: Change, inputs: dict[str, torch.Tensor], given: argparse.Namespace) -> dict[str, Any]:
    return measure(change, inputs.get(change.name), top=given.top, threshold=given.threshold)


def _inputs(model: Any, tokenizer: Any, names: list[str], texts: Path | None) -> dict[str, torch.Tensor]:
    if texts is None:
        return {}
    if ".jsonl" in texts.suffixes:
        chosen = [row["instruction"] for row in sources.read_rows(texts)[:64]]
    else:
        opener: Any = gzip.open if texts.suffix == ".gz" else open
        with opener(texts, "rt", encoding="utf-8") as lines:
            chosen = list(islice((line.strip() for line in lines if line.strip()), 64))
    if not chosen:
        raise ValueError(f"{texts}: expected a text a line, found none")
    batches = [tokenizer(t, return_tensors="pt", truncation=True, max_length=512).to(model.device) for t in chosen]
    return collect_inputs(model, names, [{"input_ids": batch["input_ids"]} for batch in batches])


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
        numbers = [f"{rank:.1f}", f"{effective:.1f}", f"{narrowest:.1f}", f"{relative:.2%}", str(intruders)]
        rows.append([label, kind, str(len(modules)), *numbers, trained, chance])
    return markdown_table(header, rows, left=2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, action="append", help="folder of a peft adapter; again for another")
    parser.add_argument("--label", action="append", help="its name in table and pictures; by default its folder's")
    parser.add_argument("--model", help="base of the adapters; by default the one they name")
    parser.add_argument("--before", help="model, folder or hub name")
    parser.add_argument("--after", help="the same, fine-tuned")
    parser.add_argument(
        "--texts", type=Path, help="a text a line, or .jsonl rows of scripts/prepare_data.py; .gz too; 64 are read"
    )
    parser.add_argument("--top", type=int, default=10, help="leading singular vectors to look for intruders among")
    parser.add_argument("--threshold", type=float, default=0.5, help="cosine below which one is an intruder")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights; the last two round the update",
    )
    parser.add_argument("--no-pictures", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="folder for analysis.json and pictures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
