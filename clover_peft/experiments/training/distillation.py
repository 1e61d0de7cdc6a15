"""Distillation: a model also learns the predictions of another, such as those it had before it was converted."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ...io.hub_models import find_model
from .job_arguments import JobArguments
from .loading import load_model

_CHUNK = 1024  # tokens whose probabilities are held at a time


@dataclass(frozen=True)
class Teacher:
    """The model whose predictions are learned.

    Attributes:
        model: the model, frozen and in evaluation mode.
        weight: share of its predictions in the loss, 0 to 1; the labels have the rest.
        temperature: both models' logits are divided by it.
    """

    model: PreTrainedModel
    weight: float
    temperature: float

    def loss(self, student: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Run both models and sum the loss over the tokens that have labels.

        The loss of a token is `(1 - weight) CE + weight T^2 KL(teacher || student)` at the temperature T (Hinton et
        al., arXiv 1503.02531), in nats.

        Args:
            student: the model that trains.
            inputs: a batch with `labels` (B, L) int64, where -100 marks tokens without a loss.

        Returns:
            The sum, a float32 scalar, and the number of tokens, an int64 scalar.
        """
        labels = inputs["labels"][:, 1:]
        given = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
        scored = labels != -100
        behind = slice(-1 - labels.shape[1], -1)  # Methods with virtual tokens have logits in front of these.
        with torch.no_grad():
            target = self._logits(given, scored)
        logits = student(**given).logits[:, behind][scored]
        if logits.shape != target.shape:
            raise ValueError(
                f"teacher: expected logits over {logits.shape[-1]} tokens, as the model has, found "
                f"{target.shape[-1]}; choose the model that this one was made from"
            )
        parts = zip(logits.split(_CHUNK), target.split(_CHUNK), labels[scored].split(_CHUNK), strict=True)
        sums = [checkpoint(self._sum, *part, use_reentrant=False) for part in parts]
        return torch.stack(sums).sum(), scored.sum()

    def _logits(self, given: Mapping[str, Any], scored: Tensor) -> Tensor:
        """(tokens, vocabulary): the teacher's logits where `scored` (B, L - 1), in front of tokens with labels."""
        if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            return self.model(**given).logits[:, :-1][scored]
        kept = scored.any(0).nonzero()[:, 0]  # none of positions that are a prompt's in every row
        return self.model(**given, logits_to_keep=kept).logits[scored[:, kept]]

    def _sum(self, logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        logits, target = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logits, target))
        hard = cross_entropy(logits, labels, reduction="sum")
        ours, theirs = (x.div(self.temperature).log_softmax(-1) for x in (logits, target))
        soft = (theirs.exp() * (theirs - ours)).sum()
        return (1 - self.weight) * hard + self.weight * self.temperature**2 * soft


def load_teacher(
    job: JobArguments, init_kwargs: dict[str, Any], tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> Teacher | None:
    """Load the teacher of a run; None without one.

    Args:
        job: names the teacher.
        init_kwargs: those that the model is loaded with, such as its dtype; the revision is the model's own.
        tokenizer: the model's tokenizer.
        trust_remote_code: run code that the teacher brings with it, as for the model.

    Raises:
        ValueError: the teacher reads other tokens than the model.
    """
    if job.teacher is None:
        return None
    source = find_model(job.teacher)
    vocabulary = AutoTokenizer.from_pretrained(source.path, trust_remote_code=trust_remote_code).get_vocab()
    if vocabulary != tokenizer.get_vocab():
        raise ValueError(
            f"teacher={job.teacher}: expected the tokens of the model's tokenizer ({len(tokenizer.get_vocab())}), "
            f"found others ({len(vocabulary)}); choose the model that this one was made from"
        )
    kwargs = {name: value for name, value in init_kwargs.items() if name != "revision"}
    model = load_model(source, kwargs, trust_remote_code).eval().requires_grad_(False)
    return Teacher(model, job.teacher_weight, job.teacher_temperature)
