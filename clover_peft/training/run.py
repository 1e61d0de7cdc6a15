"""The job: fine-tune a language model on instruction rows with TRL, and leave a record that says what happened."""

from __future__ import annotations

import contextlib
import json
import math
import os
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import trl.trainer.utils
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl import SFTTrainer

from clover_peft import broadcast_bases, initialize_from_activations, records
from clover_peft.commonsense.protocols import find_protocol
from clover_peft.training.arguments import Settings
from clover_peft.training.cards import change, write_card
from clover_peft.training.data import Row, load_data
from clover_peft.training.models import find_model, load_model, load_tokenizer
from clover_peft.training.optimizer import Muon, scale_learning_rates

_SETTINGS = "settings.json"
_BEFORE = "before.json"
_INITIAL = "initial_adapter"
_SPENT = "seconds_so_far"  # in the log
# What the record repeats of TRL's configuration after its defaults.
_RESOLVED = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "max_length"),
    *("packing", "gradient_checkpointing", "bf16", "fp16"),
)


def run(settings: Settings, callbacks: list[TrainerCallback] | None = None) -> dict[str, Any]:
    """Trains as `settings` say and saves into `output_dir`: `adapter/` (or `model/`), `merged/`, `probe.safetensors`.

    Args:
        settings: from `arguments.parse`.
        callbacks: further trainer callbacks.

    Returns:
        The run's record, as written to `output_dir/record.json`.

    Raises:
        ValueError: `output_dir` is in use by other settings, or model, data or adapter settings do not fit.
    """
    job, sft = settings.job, settings.sft
    if sft.n_gpu > 1:
        raise ValueError(
            f"expected one GPU a process, found {sft.n_gpu}, over which DataParallel would spread every batch; use "
            "accelerate launch (docs/scale.md), or set CUDA_VISIBLE_DEVICES=0"
        )
    out = Path(sft.output_dir)
    say = sft.distributed_state.print  # of several processes on a machine, one speaks
    checkpoint = _find_checkpoint(out, settings)

    source = find_model(job.model)
    say(f"model: {source.name}, {source.origin}, licence: {source.license}")
    tokenizer = load_tokenizer(source, sft)
    split = load_data(
        job.data,
        rows=job.rows,
        held_out=job.held_out_rows,
        seed=sft.seed,
        protocol=find_protocol(job.prompt, tokenizer),
        skip_bad_rows=job.skip_bad_rows,
    )
    say(f"data: {len(split.train)} rows to train on, {len(split.held_out)} held out")
    model = load_model(source, sft)
    sft.model_init_kwargs = None  # used above; TRL warns that it ignores them

    set_seed(sft.seed)
    started = time.perf_counter()
    if settings.peft is not None:
        with _refused_by("peft"):
            model = peft.get_peft_model(model, settings.peft)
    init_seconds = time.perf_counter() - started
    if adapter := _adapter(model) if settings.peft is not None else None:
        say(f"adapted modules: {', '.join(adapter['modules'])}")
    trainable, total = count_parameters(model)
    say(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")

    with _refused_by("trainer"):
        trainer = _Trainer(
            model=model,
            args=sft,
            train_dataset=Dataset.from_list(split.train),
            eval_dataset=Dataset.from_list(split.held_out) if split.held_out else None,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    trainer.muon, trainer.learning_rate_factors = settings.optimizer == "muon", settings.learning_rate_factors
    if job.calibration_rows:
        started = time.perf_counter()
        rows = trainer.train_dataset.select(range(min(job.calibration_rows, len(trainer.train_dataset))))
        say(f"making bases from the activations of {len(rows)} training rows")
        batches = ({"input_ids": torch.tensor([row["input_ids"]])} for row in rows)
        initialize_from_activations(model, batches)
        init_seconds += time.perf_counter() - started
        adapter = _adapter(model)
    if trainer.accelerator.num_processes > 1 and not _is_sharded(trainer):
        broadcast_bases(model)
    if job.merge and _is_sharded(trainer):
        raise ValueError(
            "merge=true: expected the whole model in one process, found it sharded; leave merge out, and merge the "
            "saved adapter with scripts/export.py"
        )
    dropped = len(split.train) - len(trainer.train_dataset)
    if dropped == len(split.train):
        raise ValueError(f"max_length={sft.max_length}: expected room for an answer, found none behind any prompt")
    if dropped and not sft.packing:
        say(f"data: {dropped} rows dropped, their prompts alone fill max_length={sft.max_length}")
    questions = split.held_out[: job.questions]
    prompts = [prompt_ids(tokenizer, row) for row in questions]

    def measure() -> dict[str, Any]:
        ids = [greedy_ids(trainer.model, tokenizer, prompt, job.answer_tokens) for prompt in prompts]
        return {"answers": [_decode(tokenizer, answer) for answer in ids], "loss": _held_out_loss(trainer)}

    trainer.add_callback(clock := _Clock())
    trainer.add_callback(start := _Before(out / _BEFORE, measure, resuming=checkpoint is not None))
    trainer.accelerator.wait_for_everyone()  # no process looks for another run's files any more
    if trainer.is_world_process_zero():
        out.mkdir(parents=True, exist_ok=True)
        _write_json(out / _SETTINGS, _repeatable(settings))
        if _needs_conversion(settings.peft):
            model.save_pretrained(out / _INITIAL)
    if checkpoint:
        say(f"resuming from {checkpoint}")
    with _bases_saved(model):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    seconds, tokens = clock.earlier + result.metrics["train_runtime"], trainer.state.num_input_tokens_seen

    before, loss_after = start.measured, _held_out_loss(trainer)
    # Autocast, where used, is undone: what is probed and saved is the model as others will load it.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    after = [greedy_ids(model, tokenizer, prompt, job.answer_tokens) for prompt in prompts]

    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in log]
    resolved = sft.to_dict()
    record: dict[str, Any] = {
        "settings": _shown(settings),
        "training": {key: resolved[key] for key in _RESOLVED},
        "adapter": adapter,
        "seed": sft.seed,
        "environment": records.environment(),
        "model": {"name": source.name, "origin": source.origin, "license": source.license, "dtype": str(model.dtype)},
        "data": {
            "source": split.source,
            "fingerprint": split.fingerprint,
            "train_rows": len(trainer.train_dataset),
            "held_out_rows": len(split.held_out),
            "bad_rows_skipped": split.skipped,
        },
        "parameters": {"trainable": trainable, "total": total},
        "adapter_bytes": None,
        "processes": sft.world_size,
        "steps": trainer.state.global_step,
        "resumed_from_step": int(checkpoint.rsplit("-", 1)[-1]) if checkpoint else None,
        "loss": {
            **first_and_last(losses),
            "held_out_before": before["loss"],
            "held_out_after": loss_after,
            "log": [{key: entry.get(key) for key in ("step", "loss", "learning_rate", "grad_norm")} for entry in log],
        },
        "seconds": {"init": init_seconds, "train": seconds},
        "tokens_per_second": round(tokens / seconds, 3) if tokens and seconds else None,
        "answers": [
            {
                "question": _text(row["prompt"]),
                "expected": _text(row["completion"]),
                "before": answer_before,
                "after": _decode(tokenizer, ids_after),
            }
            for row, answer_before, ids_after in zip(questions, before["answers"], after, strict=True)
        ],
    }
    probe: dict[str, torch.Tensor] = {}
    for i, (prompt, ids) in enumerate(zip(prompts, after, strict=True)):
        probe |= {f"prompt.{i}": prompt, f"answer.{i}": ids, f"logits.{i}": answer_logits(model, prompt, ids)}
    _save(trainer, model, settings, record, probe)
    record |= {"peak_memory_bytes": records.peak_memory_bytes(), "peak_gpu_bytes": records.peak_gpu_bytes()}
    if trainer.is_world_process_zero():
        print(f"record: {records.write(out / 'record.json', record)}")
        _print_summary(record)
    return record


def greedy_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Continues a prompt greedily up to the tokenizer's end token.

    Args:
        model: in any mode; generation runs in evaluation mode.
        tokenizer: for its end and pad tokens.
        prompt: token ids, (1, prompt tokens).
        tokens: the most to generate.

    Returns:
        The new token ids, (1, new tokens), on the CPU.
    """
    prompt = prompt.to(model.device)
    with _evaluating(model):
        generated = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    return generated[:, prompt.shape[1] :].cpu().contiguous()


def prompt_ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> torch.Tensor:
    """Returns the prompt's token ids, (1, tokens), as training saw them."""
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        return tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return tokenizer(prompt, return_tensors="pt")["input_ids"]


def answer_logits(model: PreTrainedModel, prompt: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Returns the logits after the prompt (1, p) and after each answer token (1, a): (1 + a, vocabulary), float32."""
    with _evaluating(model):
        ids = torch.cat([prompt, answer], dim=1).to(model.device)
        return model(input_ids=ids).logits[0, prompt.shape[1] - 1 :].float().cpu().contiguous()


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Returns how many parameters train, and how many there are; a tied one counts once."""
    # DeepSpeed's ZeRO-3 leaves an empty tensor where a parameter is sharded.
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)


def first_and_last(losses: list[float]) -> dict[str, float | None]:
    """Means of the first and the last eighth of the logged losses: one batch is too noisy to compare."""
    if not losses:
        return {"first": None, "last": None}
    n = max(1, len(losses) // 8)
    return {"first": sum(losses[:n]) / n, "last": sum(losses[-n:]) / n}


class _Trainer(SFTTrainer):
    optimizer: Any
    muon: bool = False
    learning_rate_factors: dict[str, float] = {}  # noqa: RUF012  set on instances, never changed

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        new = self.optimizer is None
        if new and self.muon:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = Muon(trained, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
        optimizer = super().create_optimizer(*args, **kwargs)
        if new and self.learning_rate_factors:
            scale_learning_rates(optimizer, self.model, self.learning_rate_factors)
        return optimizer

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with _scoring_labels_alone(self.args.device):
            return super().compute_loss(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none: TRL's card cannot say how to load the adapter; ours is written beside it at the end."""


@contextlib.contextmanager
def _scoring_labels_alone(device: torch.device) -> Iterator[None]:
    """Within it, TRL on a CPU computes the logits of tokens with labels alone, as it does on GPUs.

    Without Triton it computes those of the prompt too and masks their losses, for accelerators that compile every
    shape anew. On a CPU that is two fifths of a step of a small model with a large vocabulary.
    """
    if device.type != "cpu" or not hasattr(trl.trainer.utils, "_use_triton"):
        yield
        return
    with mock.patch.object(trl.trainer.utils, "_use_triton", return_value=True):
        yield


class _Clock(TrainerCallback):
    """Adds up the seconds of training over a run that is resumed, in an entry of the log: each checkpoint holds that.

    Attributes:
        earlier: seconds up to the checkpoint that was resumed from.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        entry = next((entry for entry in state.log_history if _SPENT in entry), None)
        if entry is None:
            # a checkpoint from before there was such an entry: the last time that was logged
            logged = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
            state.log_history.append(entry := {_SPENT: logged[-1] if logged else 0.0})
        self.entry, self.earlier, self.started = entry, entry[_SPENT], time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.entry[_SPENT] = self.earlier + time.perf_counter() - self.started


class _Before(TrainerCallback):
    """Measures the model at the start, and writes that down for a run that is resumed.

    Not before training starts: accelerate then holds a model that was evaluated for prepared, neither shards it nor
    averages its gradients, and every process trains alone.
    """

    def __init__(self, path: Path, measure: Callable[[], dict[str, Any]], resuming: bool) -> None:
        self.path, self.measure = path, measure
        self.measured: dict[str, Any] = (
            records.read_json(path, f"choose another output_dir than {path.parent}") if resuming else {}
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.measured:
            return
        self.measured = self.measure()  # in all processes: a sharded model runs in all of them or in none
        if state.is_world_process_zero:
            _write_json(self.path, self.measured)


@contextlib.contextmanager
def _bases_saved(model: Any) -> Iterator[None]:
    """Checkpoints are saved with their bases: a folded adapter, which the run may have to leave, cannot be trained."""
    config: Any = getattr(model, "active_peft_config", None)
    folded = getattr(config, "save_bases", None) == "folded"
    if folded:
        config.save_bases = True
    try:
        yield
    finally:
        if folded:
            config.save_bases = "folded"


@contextlib.contextmanager
def _refused_by(what: str) -> Iterator[None]:
    """Says in one sentence what only building shows to be wrong: a module to adapt, a reporter not installed."""
    try:
        yield
    except (TypeError, RuntimeError, ImportError) as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error


def _adapter(model: Any) -> dict[str, Any]:
    """The adapter's configuration after peft filled it in, and the last names of the modules it adapts."""
    config = model.active_peft_config.to_dict()
    modules = getattr(model.base_model, "targeted_module_names", [])  # prompt methods adapt none
    return {
        "config": json.loads(json.dumps(config, default=lambda v: sorted(v) if isinstance(v, set) else str(v))),
        "modules": sorted({name.rpartition(".")[2] for name in modules}),
    }


def _is_sharded(trainer: SFTTrainer) -> bool:
    """Whether no process will hold all of the model while it trains."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    return bool(trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3))


def _held_out_loss(trainer: SFTTrainer) -> float | None:
    return float(trainer.evaluate()["eval_loss"]) if trainer.eval_dataset else None


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _find_checkpoint(out: Path, settings: Settings) -> str | None:
    """Returns the checkpoint to continue from; refuses an `output_dir` that this run would spoil."""
    if not settings.job.resume:
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(
                f"output_dir={out}: expected a new or empty folder, found files; continue an unfinished run with "
                "resume=true, or choose another output_dir=..."
            )
        return None
    if (out / "record.json").exists():
        raise ValueError(f"output_dir={out}: expected an unfinished run to resume, found a finished one")
    saved_file = out / _SETTINGS
    if saved_file.is_file():
        remedy = "delete it, to resume with the settings given now without comparing, or choose another output_dir=..."
        saved = records.read_json(saved_file, remedy)
        now = _repeatable(settings)
        for key in sorted(saved.keys() | now.keys()):
            if saved.get(key) != now.get(key):
                raise ValueError(
                    f"{key}: expected {saved.get(key)!r} as in the run to resume, found {now.get(key)!r}; repeat its "
                    "settings, or choose another output_dir=..."
                )
    say = settings.sft.distributed_state.print
    found = {int(folder.name[11:]): folder for folder in out.glob("checkpoint-*") if folder.name[11:].isdecimal()}
    for _, folder in sorted(found.items(), reverse=True):
        damaged = _damaged(folder)
        if damaged is None:
            return str(folder)
        say(f"{folder} is passed over: {damaged} is missing or was cut short")
    say(f"no whole checkpoint in {out}, starting from the beginning")
    return None


def _damaged(checkpoint: Path) -> str | None:
    """Which file of a checkpoint a kill, or a full disk, left out or cut short; None where all were written."""
    last = checkpoint / "trainer_state.json"
    for file in (last, *sorted(path for path in checkpoint.rglob("*") if path.is_file())):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            elif file.suffix in {".pt", ".pth", ".bin"} and not zipfile.is_zipfile(file):  # a pickle is not read
                return file.name
        except (OSError, ValueError, SafetensorError):
            return file.name
    return None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Complete or not at all: what was there stays until all is written."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _repeatable(settings: Settings) -> dict[str, Any]:
    """The settings that a resumed run must share with the one it continues, as JSON gives them back."""
    values = {key: value for key, value in _shown(settings).items() if key not in {"resume", "merge", "output_dir"}}
    return dict(json.loads(json.dumps(values, default=str)))


def _shown(settings: Settings) -> dict[str, Any]:
    return {key: value for key, value in settings.values.items() if not key.endswith("hub_token")}


def _needs_conversion(config: peft.PeftConfig | None) -> bool:
    # Their randomised SVD changes the base weights in a way that loading the adapter would not repeat.
    return str(getattr(config, "init_lora_weights", None)).startswith("pissa_niter")


def _save(
    trainer: SFTTrainer, model: Any, settings: Settings, record: dict[str, Any], probe: dict[str, torch.Tensor]
) -> None:
    out = Path(settings.sft.output_dir)
    tokenizer = trainer.processing_class
    kind = "model" if settings.peft is None else "adapter"
    if trainer.is_fsdp_enabled:
        # Transformers' own gathers the whole base first, or with SHARDED_STATE_DICT saves nothing here.
        state = _whole_state(model, trained_only=kind == "adapter")
        if trainer.is_world_process_zero():
            model.save_pretrained(out / kind, state_dict=state)
            tokenizer.save_pretrained(out / kind)
    else:
        trainer.save_model(str(out / kind))
    if not trainer.is_world_process_zero():
        return
    if _needs_conversion(settings.peft):
        model.save_pretrained(out / kind, path_initial_model_for_weight_conversion=str(out / _INITIAL))
    (out / kind / "training_args.bin").unlink(missing_ok=True)  # a pickle of what the record says
    write_card(out / kind, kind, record)
    if kind == "adapter":
        record["adapter_bytes"] = (out / kind / "adapter_model.safetensors").stat().st_size
    if probe:
        save_file(probe, out / "probe.safetensors")
    print(f"saved {out / kind}")
    if settings.job.merge:
        merged = model.merge_and_unload(safe_merge=True)
        merged.save_pretrained(out / "merged")
        tokenizer.save_pretrained(out / "merged")
        write_card(out / "merged", "model", record)
        print(f"saved {out / 'merged'}")


def _whole_state(model: torch.nn.Module, trained_only: bool) -> dict[str, torch.Tensor]:
    """The tensors of a model that FSDP2 has sharded, whole and on the CPU; all processes gather them together."""
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not trained_only or tensor.requires_grad or not isinstance(tensor, torch.nn.Parameter):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            state[name] = whole.detach().cpu()
    return state


def _decode(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> str:
    return str(tokenizer.decode(ids[0], skip_special_tokens=True)).strip()


def _text(part: str | list[Row]) -> str:
    return part.strip() if isinstance(part, str) else str(part[-1]["content"])


def _print_summary(record: dict[str, Any]) -> None:
    loss, speed = record["loss"], record["tokens_per_second"]
    held_out = change(loss["held_out_before"], loss["held_out_after"], "not measured")
    print(f"\nloss {change(loss['first'], loss['last'], 'not logged')} over {record['steps']} steps", end="")
    print(f", held-out {held_out}", end="")
    print(f"; {record['seconds']['train']:.0f} s, {speed:,.0f} tokens/s" if speed else "")
    lost = [entry["step"] for entry in loss["log"] if not math.isfinite(entry["loss"])]
    if lost or not math.isfinite(loss["held_out_after"] or 0.0):
        since = f"from step {lost[0]} on the logged loss" if lost else "the held-out loss"
        print(f"WARNING: training failed: {since} is no finite number; start again with a lower learning_rate")
    for item in record["answers"]:
        print(f"\n  question: {textwrap.shorten(item['question'], 200)}\n  expected: {item['expected']}")
        print(f"  before:   {item['before']}\n  after:    {item['after']}")
