"""One trial: trains an arm on a domain, from its last checkpoint if there is one, and measures it on all domains."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, get_scheduler, set_seed
from transformers.models.byt5 import ByT5Tokenizer

from ... import balance_updates, initialize_from_activations, initialize_from_contrast, own_text
from ...io import atomic
from ...io import run_record as records
from ...io.hub_models import ModelSource, accelerator, find_model, weights_digest
from ..training.optimizer import Muon, scale_learning_rates
from .domains import Domain, read_domain
from .lora_starts import FROM_DATA, add_lora_from_data, balance_lora, contrast_lora
from .plan import BASE, OWN, TINY, Arm, Experiment, Trial
from .windows import Windows, document_losses, encode, own_windows, restricted_head
from .zeroshot import read_questions, score

Record = dict[str, Any]
OnStep = Callable[[Trial, int], None]


class Laboratory:
    """What the trials of an experiment share: model, domains and their windows, read once a process.

    Args:
        experiment: the experiment.
        out: folder for checkpoints and adapters.
        on_step: called after every step and its checkpoint.

    Raises:
        ValueError: the model, a domain or the questions cannot be had.
    """

    def __init__(self, experiment: Experiment, out: Path, on_step: OnStep | None = None) -> None:
        self.experiment, self.out, self.on_step = experiment, out, on_step
        self.own_texts = dict[tuple[int, int], list[dict[str, Tensor]]]()  # by rows and seed: trials share them
        asked = experiment.evaluation.zeroshot
        self.questions = read_questions(asked) if asked else {}
        tiny = experiment.model == TINY
        self.source = ModelSource(TINY, TINY, "none", "random") if tiny else find_model(experiment.model)
        self.tokenizer: Any = ByT5Tokenizer() if tiny else AutoTokenizer.from_pretrained(self.source.path)
        self.domains: dict[str, Domain] = {n: read_domain(n, source) for n, source in experiment.domains.items()}
        self.windows = {name: encode(domain, self.tokenizer, experiment) for name, domain in self.domains.items()}
        self.facts: Record = {
            "model": {
                "name": self.source.name,
                "origin": self.source.origin,
                "license": self.source.license,
                "weights_sha256": weights_digest(self.source.path),
            },
            "domains": {name: domain.describe() for name, domain in self.domains.items()},
            "vocabulary": {n: None if w.vocabulary is None else len(w.vocabulary) for n, w in self.windows.items()},
        }

    def run(self, trial: Trial) -> Record:
        """A trial's record: trains, and measures."""
        reset_peak_memory()
        model, found, held_out = self.load(), Record(), self.windows
        if rows := self.experiment.evaluation.own_text:
            file = self.out / "records" / "own_text.safetensors"  # beside the records, which are of this text
            facts = {"weights_sha256": str(self.facts["model"]["weights_sha256"]), "dtype": self.experiment.dtype}
            length = self.experiment.evaluation.length
            held_out = {**held_out, OWN: own_windows(file, rows, length, model, facts)}
        if trial.arm != BASE:
            model, found = self._train(model, trial)
        measured = self._measure(model, held_out, diverged=found.get("diverged_at_step") is not None)
        if any(loss is None for losses in measured["losses"].values() for loss in losses.values()):
            found["diverged_at_step"] = found.get("diverged_at_step") or len(found["training_loss"])
        names = [arm.name for arm in self.experiment.arms]
        return {
            "trial": vars(trial),
            "place": -1 if trial.arm == BASE else names.index(trial.arm),
            "settings": self.experiment.settings(trial),
            "split": self.experiment.evaluation.split,
            "first_rate": None if trial.arm == BASE else self.experiment.arm(trial.arm).rates[0],
            **self.facts,
            **found,
            **measured,
            "peak_memory_bytes": records.peak_memory_bytes(),
            "peak_gpu_bytes": records.peak_gpu_bytes(),
            "environment": records.environment(),
        }

    def load(self, dtype: torch.dtype | None = None) -> Any:
        """The base model, in the experiment's precision if no other is given."""
        dtype = getattr(torch, self.experiment.dtype) if dtype is None else dtype
        if self.source.path == TINY:
            torch.manual_seed(0)
            sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
            return LlamaForCausalLM(LlamaConfig(vocab_size=384, **sizes, initializer_range=0.2)).to(dtype)
        return AutoModelForCausalLM.from_pretrained(self.source.path, dtype=dtype).to(accelerator())

    def _measure(self, model: nn.Module, held_out: dict[str, Windows], diverged: bool) -> Record:
        """The loss of every held-out window, and the scored questions; None after training has diverged."""
        started, evaluation = time.perf_counter(), self.experiment.evaluation
        losses: dict[str, Any] = {}
        for name, windows in held_out.items():
            found = {} if diverged else document_losses(model, windows, evaluation.batch_size)
            losses[name] = {
                key: round(found[key], 6) if math.isfinite(found.get(key, math.nan)) else None for key in windows.keys
            }
        answers = score(model, self.tokenizer, self.questions) if self.questions and not diverged else None
        return {"losses": losses, "zeroshot": answers, "measure_seconds": round(time.perf_counter() - started, 2)}

    # ------------------------------------------------------------------ training

    def _train(self, base: Any, trial: Trial) -> tuple[Any, Record]:
        arm, training = self.experiment.arm(trial.arm), self.experiment.training
        windows = self.windows[trial.stages[0]]
        set_seed(trial.seed)
        started = time.perf_counter()
        statistics = list(self._statistics(base, arm, trial)) if arm.initialize_from_activations else None
        known = self._own_text(base, arm.contrast, trial.seed) if arm.contrast else None
        model = adapt(base, arm, statistics)
        lora = getattr(model, "peft_type", None) == "LORA"
        with restricted_head(model, windows.vocabulary) as labels:
            if statistics is not None and not lora:
                initialize_from_activations(model, statistics)
            if known is not None:
                order = drawn(windows, training.batch_size, trial.seed)
                new = [{"input_ids": next(order)} for _ in range(arm.contrast)]
                (contrast_lora if lora else initialize_from_contrast)(model, new, known)
            if arm.balance_updates:
                balance = balance_lora if lora else balance_updates
                order = drawn(windows, training.batch_size, trial.seed)
                balance(model, (self._batch(next(order), labels) for _ in range(arm.balance_updates)))
        init_seconds = time.perf_counter() - started
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        state = _State(model, arm, trial, self)
        for number, domain in enumerate(trial.stages):
            self._train_on(self.windows[domain], model, trial, state, number * training.steps)
        return model, {
            "parameters": sum(p.numel() for p in trained.values()),
            "adapter_bytes": self._save(model, arm, trial),
            "seconds": {"init": round(init_seconds, 2), "train": round(state.seconds, 2)},
            "tokens": state.step * training.batch_size * training.length,
            "training_loss": [round(loss, 5) for loss in state.losses],
            "diverged_at_step": None if state.is_finite() else state.step,
        }

    def _train_on(self, windows: Windows, model: Any, trial: Trial, state: _State, first: int) -> None:
        """Trains on a domain, from the trial's step `first` on, or from where it was cut off."""
        training = self.experiment.training
        if state.step >= first + training.steps:
            return
        order = drawn(windows, training.batch_size, trial.seed)
        for _ in range(first, state.step):
            next(order)
        if state.step == first:
            state.begin_stage()
        model.train()
        with restricted_head(model, windows.vocabulary) as labels:
            while state.step < first + training.steps and state.is_finite():
                began = time.perf_counter()
                loss = model(**self._batch(next(order), labels), use_cache=False).loss
                loss.backward()
                state.advance(loss.item(), time.perf_counter() - began)
                if state.step % training.checkpoint_steps == 0:
                    state.save()
                if self.on_step is not None:
                    self.on_step(trial, state.step)

    def _statistics(self, base: Any, arm: Arm, trial: Trial) -> Iterator[dict[str, Tensor]]:
        """The batches that the bases of a CLOVER arm, or the start of a LoRA, are computed from."""
        training, count = self.experiment.training, arm.initialize_from_activations
        if arm.activations_on == "own":
            yield from self._own_text(base, count, trial.seed)
            return
        others = [name for name in self.windows if name not in trial.stages]
        names = trial.stages[:1] if arm.activations_on == "domain" else others
        orders = [drawn(self.windows[name], training.batch_size, trial.seed) for name in names]
        for number in range(count):
            yield {"input_ids": next(orders[number % len(orders)])}

    def _own_text(self, base: Any, batches: int, seed: int) -> list[dict[str, Tensor]]:
        """Text of the base model, as much as so many training batches have; made once."""
        training = self.experiment.training
        rows = batches * training.batch_size
        if (rows, seed) not in self.own_texts:
            self.own_texts[rows, seed] = own_text(base, rows=rows, length=training.length, seed=seed)
        return self.own_texts[rows, seed]

    def _batch(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        ids = ids.to(labels.device)
        return {"input_ids": ids, "labels": labels[ids]}

    def _save(self, model: Any, arm: Arm, trial: Trial) -> int | None:
        """Saves the adapter, for later analysis; returns the bytes of its weights.

        A model that is trained whole is not saved, and neither is a CorDA: unlike PiSSA, peft cannot repeat its start
        when it loads one, without the batches.
        """
        config = arm.config()
        if config is None or getattr(config, "init_lora_weights", None) == "corda":
            return None
        folder = self.out / "adapters" / trial.name
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def adapt(base: Any, arm: Arm, statistics: Sequence[dict[str, Tensor]] | None = None) -> Any:
    """The model with the arm's adapter, or with all but embeddings and head to be trained.

    Args:
        base: the model, which is changed.
        arm: the arm.
        statistics: batches that peft starts a LoRA from, if the arm's does.
    """
    config = arm.config()
    if isinstance(config, LoraConfig) and config.init_lora_weights in FROM_DATA:
        assert statistics is not None, "plan.py asks for them"
        return add_lora_from_data(base, config, statistics)
    if config is not None:
        return get_peft_model(base, config)
    frozen = {id(p) for m in (base.get_input_embeddings(), base.get_output_embeddings()) for p in m.parameters()}
    for parameter in base.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    return base


def drawn(windows: Windows, count: int, seed: int) -> Iterator[Tensor]:
    """(count, length) windows to train on, in an order of the seed's own in every epoch, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(windows.train), generator=generator).split(count):
            if len(rows) == count:
                yield windows.train[rows]


class _State:
    """What a trial needs to go on where it was cut off: trained numbers in float32, optimizer, schedule, losses."""

    def __init__(self, model: Any, arm: Arm, trial: Trial, laboratory: Laboratory) -> None:
        training = laboratory.experiment.training
        self.file = laboratory.out / "checkpoints" / f"{trial.name}.pt"
        self.settings = {**laboratory.experiment.settings(trial), **laboratory.facts}
        self.max_grad_norm = training.max_grad_norm
        self.step, self.seconds, self.losses = 0, 0.0, list[float]()
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if arm.optimizer == "muon":
            self.optimizer: Any = Muon(self.trained.values(), lr=trial.rate, weight_decay=training.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(
                self.trained.values(), lr=trial.rate, weight_decay=training.weight_decay
            )
        if arm.rate_factors:
            scale_learning_rates(self.optimizer, model, arm.rate_factors)
        # Steps below the resolution of bfloat16 would be lost: such parameters get float32 copies that are trained.
        self.copies = {
            name: nn.Parameter(p.detach().float()) for name, p in self.trained.items() if p.dtype is not torch.float32
        }
        by_id = {id(self.trained[name]): copy for name, copy in self.copies.items()}
        for group in self.optimizer.param_groups:
            group["params"] = [by_id.get(id(p), p) for p in group["params"]]
        self.new_scheduler = partial(
            get_scheduler, training.schedule, self.optimizer, training.warmup_steps, training.steps
        )
        self.scheduler = self.new_scheduler()
        if self.file.is_file():
            self._load()

    def begin_stage(self) -> None:
        """Starts the optimizer and the schedule anew, for the next domain."""
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        self.scheduler = self.new_scheduler()

    def is_finite(self) -> bool:
        """Whether the last loss is."""
        return not self.losses or math.isfinite(self.losses[-1])

    def advance(self, loss: float, seconds: float) -> None:
        """One step of the optimizer, by the gradients that there are."""
        began = time.perf_counter()
        for name, copy in self.copies.items():
            gradient = self.trained[name].grad
            copy.grad = None if gradient is None else gradient.float()
            self.trained[name].grad = None
        parameters = [self.copies.get(name, p) for name, p in self.trained.items()]
        if self.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, copy in self.copies.items():
                self.trained[name].copy_(copy)
        self.losses.append(loss)
        self.step += 1
        self.seconds += seconds + time.perf_counter() - began

    def save(self) -> None:
        """Writes a checkpoint, complete or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: self.copies.get(name, p).detach() for name, p in self.trained.items()}
        state = {
            "settings": self.settings,
            "tensors": kept,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.get_rng_state(),
            "progress": {"step": self.step, "seconds": self.seconds, "losses": self.losses},
        }

        def write(partial: Path) -> None:
            with partial.open("wb") as file:  # with a path, torch's errors do not name it
                torch.save(state, file)

        atomic.write_by(self.file, write)

    def _load(self) -> None:
        try:
            found = torch.load(self.file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
            raise ValueError(
                f"{self.file}: expected a whole checkpoint, found one that cannot be read ({error}); delete it, and "
                "the trial begins anew"
            ) from error
        records.check_same(
            found["settings"], self.settings, str(self.file), "set it as before, or choose another --out"
        )
        with torch.no_grad():
            for name, tensor in found["tensors"].items():
                self.trained[name].copy_(tensor)
                if name in self.copies:
                    self.copies[name].copy_(tensor)
        self.optimizer.load_state_dict(found["optimizer"])
        self.scheduler.load_state_dict(found["scheduler"])
        torch.set_rng_state(found["random"])
        self.step, self.seconds, self.losses = (found["progress"][key] for key in ("step", "seconds", "losses"))


def reset_peak_memory() -> None:
    """Start to measure a process's peak memory anew, where the system can."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
