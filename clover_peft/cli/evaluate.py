"""`clover evaluate`: a model's accuracy on the commonsense suite."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..experiments.commonsense import TASKS, evaluation
from ..experiments.commonsense.protocols import find_protocol
from ..io import run_record as records
from ..io.hub_models import ModelSource, accelerator, announce_model, find_adapter, load_trained, weights_digest
from . import checks, parsers
from .errors import reports_errors


@reports_errors()
def run(given: argparse.Namespace) -> int:
    checks.evaluate(given)
    given.mode, given.split = given.mode or "generate", given.split or "test"
    trained = _trained(given.adapter or given.model)
    given.dtype = given.dtype or trained.get("model", {}).get("dtype", "torch.float32").removeprefix("torch.")
    source = announce_model(given.model or _base(given.adapter))
    init_kwargs = _init_kwargs(given, trained)
    result = _harness(given, source, init_kwargs) if given.harness else _suite(given, source, trained, init_kwargs)
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    record = {"options": options, "model": source.name, "origin": source.origin, **result}
    print(f"record: {records.write(given.out / 'record.json', {**record, 'environment': records.environment()})}")
    return 0


def _suite(
    given: argparse.Namespace, source: ModelSource, trained: dict[str, Any], init_kwargs: dict[str, Any]
) -> dict[str, Any]:
    rows = evaluation.read_questions(given.data, given.split, given.tasks or list(TASKS), given.rows, given.seed)
    model: Any = None
    if given.vllm:
        tokenizer = AutoTokenizer.from_pretrained(source.path)
    else:
        model, tokenizer = load_trained(source, given.adapter, given.dtype, given.merge, **init_kwargs)
    settings = trained.get("settings") or {}
    in_training = trained.get("prompt") or settings.get("prompt")  # Earlier records have the latter alone.
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
    asked |= {"model_sha256": weights_digest(source.path), **init_kwargs}
    if given.mode == "generate":
        asked |= {"beams": beams, "new_tokens": new_tokens}
    resumed = (given.out / "predictions.jsonl").exists()
    started = time.perf_counter()
    predictions = evaluation.evaluate(rows, predict, given.batch_size, given.out, {"model": source.path, **asked})
    summary = evaluation.summarise(predictions)
    print(evaluation.show(summary))
    return {**summary, "asked": asked, "seconds": None if resumed else time.perf_counter() - started}


def _harness(given: argparse.Namespace, source: ModelSource, init_kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise ValueError("--harness: expected lm-evaluation-harness, found none; pip install lm-eval") from error
    arguments = {"pretrained": source.path, "dtype": given.dtype, **init_kwargs}
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
    """The record that `clover sft` left beside an adapter or a model; empty where there is none."""
    record = None if folder is None else Path(folder).resolve().parent / "record.json"
    if record is None or not record.is_file():
        return {}
    return records.read_json(record, "move it away, and pass --prompt")


def _init_kwargs(given: argparse.Namespace, trained: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the base was loaded with in training, and that decide which weights it has."""
    in_training = (trained.get("settings") or {}).get("model_init_kwargs") or {}
    found: dict[str, Any] = {}
    if given.model is None:  # another base has other revisions
        revision = in_training.get("revision") or (given.adapter and find_adapter(given.adapter).revision)
        found |= {"revision": revision} if revision else {}
    if given.adapter and (quantisation := in_training.get("quantization_config")):
        unquantised = "--merge" if given.merge else "--harness" if given.harness else None
        if unquantised:
            print(
                f"{unquantised}: the base is loaded unquantised, although the adapter was trained on a quantised one"
            )
        else:
            print(f"the base is quantised as in training: {quantisation}")
            found["quantization_config"] = quantisation
    return found


def _base(adapter: Path | None) -> str | None:
    """The base that an adapter names; None is the default model."""
    if adapter is None:
        return None
    name = find_adapter(adapter).base_model_name_or_path
    return str(name) if name else None


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parsers.evaluate(arguments))
