"""The job: fine-tunes a language model on instruction rows or plain text with TRL, and writes a record of the run."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from ... import broadcast_bases
from ...io import run_record as records
from ...io.hub_models import ModelSource, announce_model
from ...io.text_windows import cut
from ..commonsense.protocols import find_protocol
from .answers import Questions, question
from .arguments import Settings
from .card import eighth, show_change, show_training
from .data import Split, load_data
from .distillation import load_teacher
from .initialize import initialize
from .loading import load_model, load_tokenizer
from .resuming import Before, Clock, alone, bases_saved, check_inputs, find_checkpoint, identify, keep_settings
from .saving import keep_start, merge, save
from .trainer import Trainer

# The record repeats these settings of TRL's configuration, with their defaults filled in.
_RESOLVED = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "max_length"),
    *("packing", "gradient_checkpointing", "bf16", "fp16"),
)


def run(settings: Settings, callbacks: list[TrainerCallback] | None = None) -> dict[str, Any]:
    """Train and save into `output_dir`: `adapter/` (or `model/`), `merged/`, `probe.safetensors`.

    Args:
        settings: from `arguments.parse`.
        callbacks: further callbacks of the trainer.

    Returns:
        The run's record, as written to `output_dir/record.json`.

    Raises:
        ValueError: `output_dir` has a run with other settings, or another process writes into it; or the settings of
            model, data and adapter do not fit.
    """
    out = Path(settings.sft.output_dir).resolve()
    with contextlib.ExitStack() as held:
        if settings.sft.process_index == 0:
            # The lock lies beside the folder, which has to be empty.
            held.enter_context(alone(out.with_name(f".{out.name}.sft.lock"), f"output_dir={out}"))
        return _run(settings, callbacks)


def _run(settings: Settings, callbacks: list[TrainerCallback] | None) -> dict[str, Any]:
    # TRL's settings are changed below; those of the caller stay as they are.
    settings = dataclasses.replace(settings, sft=copy.copy(settings.sft))
    job, sft = settings.job, settings.sft
    if sft.n_gpu > 1:
        raise ValueError(
            f"expected one GPU a process, found {sft.n_gpu}, over which DataParallel would spread every batch; use "
            "accelerate launch (docs/how_to/several_gpus.md), or set CUDA_VISIBLE_DEVICES=0"
        )
    out = Path(sft.output_dir)
    say = sft.distributed_state.print  # Of several processes on a machine, only one prints.
    checkpoint = find_checkpoint(out, settings)

    source = announce_model(job.model, say)
    tokenizer = load_tokenizer(source, sft)
    split = load_rows(settings, tokenizer)
    main = sft.process_index == 0
    inputs = identify(split.fingerprint, source, job.teacher) if main else {}
    if job.resume and main:
        check_inputs(out, inputs)
    say(f"data: {len(split.train)} rows to train on, {len(split.held_out)} held out")
    say(f"learning rate: {sft.learning_rate:g}")
    init_kwargs = dict(sft.model_init_kwargs or {})
    model = load_model(source, init_kwargs, sft.trust_remote_code)
    teacher = load_teacher(job, init_kwargs, tokenizer, sft.trust_remote_code)
    sft.model_init_kwargs = None  # These were used above; TRL would warn that it ignores them.

    set_seed(sft.seed)
    started = time.perf_counter()
    if settings.peft is not None:
        with _refused_by("peft"):
            # Without the revision, the saved adapter would be loaded on the newest weights of its base.
            model = peft.get_peft_model(model, settings.peft, revision=init_kwargs.get("revision"))
    init_seconds = time.perf_counter() - started
    if settings.peft is not None:
        say(f"adapted modules: {', '.join(_adapter(model)['modules'])}")
    trainable, total = count_parameters(model)
    say(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")

    with _refused_by("trainer"):
        trainer = Trainer(
            settings,
            teacher,
            model=model,
            train_dataset=Dataset.from_list(split.train),
            eval_dataset=Dataset.from_list(split.held_out) if split.held_out else None,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    _check_trainer(trainer, settings, split)
    init_seconds += initialize(trainer, job, say)
    if trainer.accelerator.num_processes > 1 and not trainer.is_sharded:
        broadcast_bases(model)
    asked = [question(row, tokenizer, job.answer_tokens) for row in split.held_out[: job.questions]]
    questions = Questions(asked, tokenizer, job.answer_tokens)

    def measure() -> dict[str, Any]:
        return {"answers": questions.texts(questions.ask(trainer.model)), "loss": trainer.held_out_loss()}

    trainer.add_callback(clock := Clock())
    trainer.add_callback(before := Before(out, measure, resuming=checkpoint is not None))
    trainer.accelerator.wait_for_everyone()  # All processes have looked for another run's files by now.
    if trainer.is_world_process_zero():
        keep_settings(out, settings, inputs)
        keep_start(out, settings, model)
    if checkpoint:
        say(f"resuming from {checkpoint}")
    adapter = _adapter(model) if settings.peft is not None else None
    with bases_saved(model):
        result = trainer.train(resume_from_checkpoint=checkpoint)

    loss_after = trainer.held_out_loss()
    # Without autocast, the model that is probed and saved is the one that others will load.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    answers = questions.ask(model)
    seconds, tokens = clock.earlier + result.metrics["train_runtime"], trainer.state.num_input_tokens_seen
    record = {
        **_describe(settings, source, split, trainer),
        "adapter": adapter,
        "parameters": {"trainable": trainable, "total": total},
        "adapter_bytes": None,
        "steps": trainer.state.global_step,
        "resumed_from_step": int(checkpoint.rsplit("-", 1)[-1]) if checkpoint else None,
        "loss": _losses(trainer, before.measured["loss"], loss_after),
        "seconds": {"init": init_seconds, "train": seconds},
        "tokens_per_second": round(tokens / seconds, 3) if tokens and seconds else None,
        "answers": questions.compare(before.measured["answers"], questions.texts(answers)),
    }
    record["model"]["dtype"] = str(model.dtype)
    save(trainer, model, settings, record, questions.probe(model, answers))
    record |= {"peak_memory_bytes": records.peak_memory_bytes(), "peak_gpu_bytes": records.peak_gpu_bytes()}
    if trainer.is_world_process_zero():
        print(f"record: {records.write(out / 'record.json', record)}")
        _print_summary(record)
        if job.merge:  # last, since it can fail, and changes the model
            merge(model, tokenizer, out, record)
    return record


def load_rows(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Split:
    """Load, draw and split the rows of a run."""
    job, length = settings.job, settings.sft.max_length

    def windows(text: str) -> list[list[int]]:
        if length is None:
            raise ValueError("max_length=null: expected a number for plain text, which is cut into windows of it")
        return cut(text, tokenizer, length, job.data or "data")

    return load_data(
        job.data,
        rows=job.rows,
        held_out=job.held_out_rows,
        seed=settings.sft.seed,
        protocol=find_protocol(job.prompt, tokenizer),
        cut=windows,
        skip_bad_rows=job.skip_bad_rows,
    )


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return how many parameters train, and how many there are; a tied one counts once."""
    # DeepSpeed's ZeRO-3 leaves an empty tensor where a parameter is sharded.
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)


def first_and_last(losses: list[float]) -> dict[str, float | None]:
    """Return the means of the first and the last eighth of the logged losses."""
    if not losses:
        return {"first": None, "last": None}
    n = eighth(len(losses))
    return {"first": sum(losses[:n]) / n, "last": sum(losses[-n:]) / n}


def _check_trainer(trainer: Trainer, settings: Settings, split: Split) -> None:
    """Check what only the trainer knows, that it can merge and that rows are left; print what it dropped and cut."""
    sft, rows = settings.sft, len(split.train)
    if settings.job.merge and trainer.is_sharded:
        raise ValueError(
            "merge=true: expected the whole model in one process, found it sharded; leave merge out, and merge the "
            "saved adapter with scripts/export.py"
        )
    dropped = rows - len(trainer.train_dataset)
    if dropped == rows:
        raise ValueError(f"max_length={sft.max_length}: expected room for an answer, found none behind any prompt")
    say = sft.distributed_state.print
    if dropped and not sft.packing:
        say(f"data: {dropped} rows dropped, their prompts alone fill max_length={sft.max_length}")
    if dropped := len(split.held_out) - _held_out(trainer, split):
        say(f"data: {dropped} held-out rows dropped, their prompts alone fill max_length={sft.max_length}")
    if "prompt" in split.train[0] and (cut_off := _count_cut(trainer)):
        say(
            f"data: {cut_off} answers cut off by max_length={sft.max_length}: the model does not learn where they "
            "end; raise max_length, or leave these rows out"
        )


def _held_out(trainer: Trainer, split: Split) -> int:
    """How many held-out rows are measured; those that are packed are all taken to be."""
    sft = trainer.args
    packed = sft.packing if sft.eval_packing is None else sft.eval_packing
    return len(split.held_out) if packed or not split.held_out else len(trainer.eval_dataset)


def _count_cut(trainer: Trainer) -> int:
    """How many training rows fill `max_length` and have no end token to learn."""
    sft, end, rows = trainer.args, trainer.processing_class.eos_token_id, trainer.train_dataset
    if sft.packing or sft.max_length is None or sft.truncation_mode != "keep_start":
        return 0
    column = "labels" if "labels" in rows.column_names else "input_ids"
    batches = rows.select_columns([column]).with_format("numpy").iter(1000)
    return sum(len(ids) == sft.max_length and end not in ids for batch in batches for ids in batch[column])


def _describe(settings: Settings, source: ModelSource, split: Split, trainer: Trainer) -> dict[str, Any]:
    """Return the part of a record that does not depend on the result."""
    resolved = settings.sft.to_dict()
    resolved["optim"] = settings.optimizer or resolved["optim"]
    return {
        "settings": settings.values,
        "training": {key: resolved[key] for key in _RESOLVED},
        "seed": settings.sft.seed,
        "prompt": settings.job.prompt or ("chat" if trainer.processing_class.chat_template else "clover"),
        "environment": records.environment(),
        "model": {"name": source.name, "origin": source.origin, "license": source.license},
        "data": {
            "source": split.source,
            "fingerprint": split.fingerprint,
            "train_rows": len(trainer.train_dataset),
            "held_out_rows": _held_out(trainer, split),
            "bad_rows_skipped": split.skipped,
        },
        "processes": settings.sft.world_size,
    }


def _losses(trainer: Trainer, before: float | None, after: float | None) -> dict[str, Any]:
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        **first_and_last([entry["loss"] for entry in log]),
        "held_out_before": before,
        "held_out_after": after,
        "log": [{key: entry.get(key) for key in ("step", "loss", "learning_rate", "grad_norm")} for entry in log],
    }


@contextlib.contextmanager
def _refused_by(what: str) -> Iterator[None]:
    """Raise errors of peft or TRL as a `ValueError` of one sentence, such as a module that cannot be adapted."""
    try:
        yield
    except (TypeError, RuntimeError, ImportError) as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error


def _adapter(model: Any) -> dict[str, Any]:
    """Return the adapter's configuration, completed by peft, and the last names of the modules it adapts."""
    config = model.active_peft_config.to_dict()
    modules = getattr(model.base_model, "targeted_module_names", [])  # Prompt methods adapt no modules.
    return {
        "config": json.loads(json.dumps(config, default=lambda v: sorted(v) if isinstance(v, set) else str(v))),
        "modules": sorted({name.rpartition(".")[2] for name in modules}),
    }


def _print_summary(record: dict[str, Any]) -> None:
    loss, speed = record["loss"], record["tokens_per_second"]
    held_out = show_change(loss["held_out_before"], loss["held_out_after"], "not measured")
    print(f"\ntraining loss: {show_training(loss, record['steps'])}")
    print(f"held-out loss: {held_out}")
    if speed:
        print(f"training took {record['seconds']['train']:.0f} s, {speed:,.0f} tokens/s")
    lost = [entry["step"] for entry in loss["log"] if not math.isfinite(entry["loss"])]
    if lost or not math.isfinite(loss["held_out_after"] or 0.0):
        since = f"from step {lost[0]} on the logged loss" if lost else "the held-out loss"
        print(f"WARNING: training failed: {since} is no finite number; start again with a lower learning_rate")
    answers = record["answers"]
    for item in answers:
        print(f"\n  question: {textwrap.shorten(item['question'], 200)}\n  expected: {item['expected']}")
        for when in ("before", "after"):
            print(f"  {when + ':':9} {item[when]}" + ("" if _is_right(item, when) else "   (not as expected)"))
    if answers:
        before, after = (sum(_is_right(item, when) for item in answers) for when in ("before", "after"))
        print(f"\nanswers as expected, word for word: {before} of {len(answers)} before, {after} after")


def _is_right(item: dict[str, str], when: str) -> bool:
    return item[when].split() == item["expected"].split()
