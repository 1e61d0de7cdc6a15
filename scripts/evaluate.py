#!/usr/bin/env python
"""Asks a model the commonsense suite's questions, and writes its accuracy with the predictions.

    python scripts/evaluate.py --adapter runs/a/adapter --data data/commonsense --out runs/a/test
    python scripts/evaluate.py --adapter runs/a/adapter --data data/commonsense --out runs/a/scored --mode score
    python scripts/evaluate.py --model runs/a/merged --data data/commonsense --out runs/a/beams --prompt llm_adapters
    python scripts/evaluate.py --adapter runs/a/adapter --harness mmlu arc_easy wikitext --out runs/a/harness

Modes: `generate` writes an answer and looks for the first answer word in it, as published (`--prompt clover`: greedy;
`--prompt llm_adapters`: four beams); `score` takes the option with the highest probability, which needs no parsing
and gives a loss. `--harness` measures what fine-tuning made the model forget, zero-shot, with
lm-evaluation-harness (pip install lm-eval) instead.

An evaluation that was cut off goes on with the same command. Writes predictions.jsonl and record.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import clover_peft  # noqa: F401  registers CLOVER
from clover_peft.experiments.commonsense import TASKS, evaluation
from clover_peft.experiments.commonsense.protocols import find_protocol
from clover_peft.io import run_record as records
from clover_peft.io.hub_models import ModelSource, accelerator, find_adapter, find_model, load_trained, weights_digest

_UNUSED_BY_HARNESS = ("data", "split", "tasks", "mode", "prompt", "beams", "new_tokens", "merge", "vllm")


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        if (given.out / "record.json").exists():
            raise ValueError(f"{given.out}: expected an unfinished evaluation or a new folder, found a finished one")
        for key in ("rows", "batch_size", "beams", "new_tokens"):
            if (value := getattr(given, key)) is not None and value < 1:
                raise ValueError(f"--{key.replace('_', '-')}: expected at least 1, found {value}")
        _refuse_unused(given)
        if given.merge and given.adapter is None:
            raise ValueError("--merge: expected --adapter, found none to merge")
        given.mode, given.split = given.mode or "generate", given.split or "test"
        trained = _trained(given.adapter or given.model)
        given.dtype = given.dtype or trained.get("model", {}).get("dtype", "torch.float32").removeprefix("torch.")
        source = find_model(given.model or _base(given.adapter))
        result = _harness(given, source, trained) if given.harness else _suite(given, source, trained)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    record = {"options": options, "model": source.name, "origin": source.origin, **result}
    print(f"record: {records.write(given.out / 'record.json', {**record, 'environment': records.environment()})}")
    return 0


def _refuse_unused(given: argparse.Namespace) -> None:
    for what, chosen, keys in (
        ("--harness", given.harness, _UNUSED_BY_HARNESS),
        ("--mode score", given.mode == "score", ("beams", "new_tokens")),
        ("no --harness", not given.harness, ("harness_tasks",)),
    ):
        if chosen and (unused := [key for key in keys if getattr(given, key) not in (None, False)]):
            raise ValueError(f"--{unused[0].replace('_', '-')}: expected none with {what}, which does not use it")


def _suite(given: argparse.Namespace, source: ModelSource, trained: dict[str, Any]) -> dict[str, Any]:
    if given.data is None:
        raise ValueError("--data: expected a folder of scripts/prepare_data.py, found none")
    rows = evaluation.read_questions(given.data, given.split, given.tasks or list(TASKS), given.rows, given.seed)
    if given.vllm and (given.adapter or given.mode == "score"):
        raise ValueError("--vllm generates with a merged model: pass its folder as --model (scripts/export.py)")
    model: Any = None
    if given.vllm:
        tokenizer = AutoTokenizer.from_pretrained(source.path)
    else:
        model, tokenizer = load_trained(source, given.adapter, given.dtype, given.merge, **_revision(trained))
    in_training = (trained.get("settings") or {}).get("prompt")
    prompt = given.prompt or in_training
    protocol = find_protocol(prompt, tokenizer)
    why = "as asked for" if given.prompt else "as in training" if in_training else "nothing says how it was trained"
    print(f"prompt: {prompt or ('chat' if protocol is None else 'clover')} ({why}); weights: {given.dtype}")
    beams = given.beams or (protocol.beams if protocol else 1)
    new_tokens = given.new_tokens or (protocol.new_tokens if protocol else 32)
    if given.mode == "score":
        predict = evaluation.scorer(model, tokenizer, protocol)
    elif given.vllm:
        predict = evaluation.vllm_generator(source.path, tokenizer, protocol, beams, new_tokens, given.dtype)
    else:
        predict = evaluation.generator(model, tokenizer, protocol, beams, new_tokens)
    asked = {
        key: getattr(given, key)
        for key in ("adapter", "data", "split", "tasks", "seed", "mode", "prompt", "dtype", "merge", "vllm")
    }
    asked["prompt"] = prompt
    if given.adapter and given.adapter.is_dir():  # another may have been trained into the same folder
        asked["adapter_sha256"] = records.digest(sorted(given.adapter.glob("adapter_*")))
    asked |= {"model_sha256": weights_digest(source.path), **_revision(trained)}
    if given.mode == "generate":
        asked |= {"beams": beams, "new_tokens": new_tokens}
    resumed = (given.out / "predictions.jsonl").exists()
    started = time.perf_counter()
    predictions = evaluation.evaluate(rows, predict, given.batch_size, given.out, {"model": source.path, **asked})
    summary = evaluation.summarise(predictions)
    print(evaluation.show(summary))
    return {**summary, "asked": asked, "seconds": None if resumed else time.perf_counter() - started}


def _harness(given: argparse.Namespace, source: ModelSource, trained: dict[str, Any]) -> dict[str, Any]:
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise ValueError("--harness: expected lm-evaluation-harness, found none; pip install lm-eval") from error
    arguments = {"pretrained": source.path, "dtype": given.dtype, **_revision(trained)}
    if given.adapter:
        arguments["peft"] = str(given.adapter)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=given.harness,
        num_fewshot=0,
        batch_size=given.batch_size,
        device=str(accelerator()),  # its own default is CUDA
        limit=given.rows,
        task_manager=TaskManager(include_path=given.harness_tasks),
        random_seed=given.seed,
    )
    print(make_table(found))
    return {key: found[key] for key in ("results", "versions", "n-samples", "higher_is_better") if key in found}


def _trained(folder: str | Path | None) -> dict[str, Any]:
    """The record that scripts/sft.py left beside an adapter or a model; empty where there is none."""
    record = None if folder is None else Path(folder).resolve().parent / "record.json"
    if record is None or not record.is_file():
        return {}
    return records.read_json(record, "move it away, and pass --prompt")


def _revision(trained: dict[str, Any]) -> dict[str, str]:
    """The base's revision that an adapter was trained on, where it was pinned."""
    revision = ((trained.get("settings") or {}).get("model_init_kwargs") or {}).get("revision")
    return {"revision": revision} if revision else {}


def _base(adapter: Path | None) -> str | None:
    """The base that an adapter names; None is the default model."""
    if adapter is None:
        return None
    name = find_adapter(adapter).base_model_name_or_path
    return str(name) if name else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="folder or hub name; by default the adapter's base, else SmolLM2-135M-Instruct"
    )
    parser.add_argument("--adapter", type=Path, help="folder of a peft adapter, CLOVER or any other")
    parser.add_argument("--merge", action="store_true", help="fold the adapter into the weights first")
    parser.add_argument("--data", type=Path, help="folder of scripts/prepare_data.py")
    parser.add_argument("--split", choices=("test", "validation"), help="by default test")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="task", help="a part of the suite")
    parser.add_argument("--rows", type=int, metavar="N", help="questions a task, drawn; by default all")
    parser.add_argument("--mode", choices=("generate", "score"), help="by default generate")
    parser.add_argument(
        "--prompt", help="clover, llm_adapters or chat; by default as in training, else chat where there is a template"
    )
    parser.add_argument("--beams", type=int, help="of the search; by default the protocol's")
    parser.add_argument("--new-tokens", type=int, help="longest answer; by default the protocol's 32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights; by default as in training, else float32",
    )
    parser.add_argument("--vllm", action="store_true", help="generate with vLLM, for a merged model")
    parser.add_argument("--harness", nargs="+", metavar="task", help="lm-evaluation-harness's tasks, instead")
    parser.add_argument("--harness-tasks", metavar="FOLDER", help="further tasks of the harness, as YAML files")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--out", type=Path, required=True, help="folder for predictions and record")
    return parser


if __name__ == "__main__":
    sys.exit(main())
