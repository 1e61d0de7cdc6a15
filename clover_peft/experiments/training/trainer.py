"""TRL's SFTTrainer with a job's optimiser, learning rate factors and teacher, and a cheaper loss on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import trl.trainer.utils
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from .arguments import Settings
from .distillation import Teacher
from .optimizer import Muon, scale_learning_rates, trained_names


class Trainer(SFTTrainer):
    """TRL's trainer, with `Settings` in the place of `args`."""

    optimizer: Any

    def __init__(self, settings: Settings, teacher: Teacher | None = None, **kwargs: Any) -> None:
        super().__init__(args=settings.sft, **kwargs)
        self.teacher = teacher
        if teacher is not None:
            others = {
                "a sharded model": self.is_sharded,
                "a router's auxiliary loss": getattr(self, "aux_loss_enabled", False),
                f"loss_type={self.args.loss_type}": self.args.loss_type not in ("nll", "chunked_nll"),
                "label_smoothing_factor": self.args.label_smoothing_factor > 0,
            }
            if found := [what for what, is_there in others.items() if is_there]:
                raise ValueError(
                    f"teacher: expected a whole model in each process and no other loss, found {found[0]}; leave it "
                    "out"
                )
            if getattr(teacher.model, "hf_device_map", None) is None:
                teacher.model.to(self.args.device)
        self.muon, self.learning_rate_factors = settings.optimizer == "muon", settings.learning_rate_factors
        trained_names(self.model, self.learning_rate_factors)  # A wrong one is refused before anything is written.

    @property
    def is_sharded(self) -> bool:
        """Whether the model is sharded: no process holds all of it while it trains."""
        plugin = self.accelerator.state.deepspeed_plugin
        return bool(self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3))

    def held_out_loss(self) -> float | None:
        """Return the mean loss per token of the evaluation rows, in nats; None without rows."""
        return float(self.evaluate()["eval_loss"]) if self.eval_dataset else None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As in transformers, except that the loss is the mean over all tokens, not the mean of the batches' means."""
        self.scored: list[Any] = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.scored:
            total, tokens = self.accelerator.reduce(torch.stack(self.scored).sum(0))
            output.metrics[f"{metric_key_prefix}_loss"] = float(total / tokens.clamp(min=1))
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Keep the sum of a batch's losses and the number of its tokens."""
        labels, state = inputs["labels"], self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:  # The last batches are filled up with rows from the first.
            labels[max(0, state.remainder - self.accelerator.process_index * len(labels)) :] = -100
        found = super().prediction_step(model, inputs, *args, **kwargs)
        tokens = (labels[:, 1:] != -100).sum().to(found[0].device, torch.float32)
        self.scored.append(torch.stack([found[0].float() * tokens, tokens]))
        return found

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        new = self.optimizer is None
        if new and self.muon:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = Muon(trained, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
        optimizer = super().create_optimizer(*args, **kwargs)
        if new and self.learning_rate_factors:
            scale_learning_rates(optimizer, self.model, self.learning_rate_factors)
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does, except that a checkpoint of the last step is not trained one step more."""
        self.add_callback(_StopIfDone)
        try:
            return super().train(*args, **kwargs)
        except _IsDone:
            self.is_in_train = False
            return TrainOutput(self.state.global_step, 0.0, {"train_runtime": 0.0})

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch: TRL's, or in training the teacher's where there is one."""
        if self.teacher is None or not model.training:
            with scoring_labels_alone(self.args.device):
                return super().compute_loss(
                    model, inputs, return_outputs, num_items_in_batch if model.training else None
                )
        total, tokens = self.teacher.loss(model, inputs)
        if num_items_in_batch is None:
            return total / tokens.clamp(min=1)
        # The number counts the tokens of all processes, over which gradients are averaged.
        shared = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total / num_items_in_batch * shared

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: `saving.save` writes one that explains how to load the adapter, which TRL's does not."""


class _IsDone(Exception):
    pass


class _StopIfDone(TrainerCallback):
    """Stops a training that is complete: a checkpoint has been loaded when this callback is called."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if 0 < state.max_steps <= state.global_step:
            raise _IsDone


@contextlib.contextmanager
def scoring_labels_alone(device: torch.device) -> Iterator[None]:
    """Let TRL on a CPU compute the logits of tokens with labels only, as it does on GPUs.

    Without Triton, TRL also computes the logits of the prompt and masks their losses, because some accelerators
    compile every shape anew. On a CPU, that takes two fifths of a step of a small model with a large vocabulary.
    """
    if device.type != "cpu" or not hasattr(trl.trainer.utils, "_use_triton"):
        yield
        return
    with mock.patch.object(trl.trainer.utils, "_use_triton", return_value=True):
        yield
