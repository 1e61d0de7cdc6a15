"""Domains as tokens: windows to train on, a window of every held-out document, and the vocabulary of the domain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ... import own_text
from ...base_model.activations import evaluating
from ...io import atomic
from .domains import SPLITS, Domain
from .plan import OWN, Experiment


@dataclass(frozen=True)
class Windows:
    """A domain as tokens.

    Attributes:
        train: (windows, length) int64, of the training documents, one after the other.
        held_out: (documents, length) int64, a window of each at a place that its hash chooses.
        keys: of the documents in `held_out`.
        vocabulary: (tokens,) int64, ascending: those that the head is restricted to; None for all.
    """

    train: Tensor
    held_out: Tensor
    keys: list[str]
    vocabulary: Tensor | None


def encode(domain: Domain, tokenizer: Any, experiment: Experiment) -> Windows:
    """A domain's windows.

    Raises:
        ValueError: it has too little text.
    """
    training, evaluation = experiment.training, experiment.evaluation
    tokens = {
        split: [tokenizer(d.text, add_special_tokens=False, verbose=False)["input_ids"] for d in domain.of(split)]
        for split in SPLITS
    }
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = [token for document in tokens["train"] for token in document + end]
    count = len(stream) // training.length
    long = [
        (document.key, ids)
        for document, ids in zip(domain.of(evaluation.split), tokens[evaluation.split], strict=True)
        if len(ids) >= evaluation.length
    ][: evaluation.documents]
    if count < training.batch_size or not long:
        raise ValueError(
            f"domains.{domain.name}: expected text for {training.batch_size} windows of {training.length} tokens and "
            f"{evaluation.split} documents of {evaluation.length}, found {count} and {len(long)}; shorten the windows"
        )
    held_out = []
    for key, ids in long:
        start = int(key[8:16], 16) % (len(ids) - evaluation.length + 1)
        held_out.append(ids[start : start + evaluation.length])
    vocabulary = None
    if evaluation.vocabulary == "domain":
        # Of all splits: otherwise a token of held-out text might have no probability.
        vocabulary = torch.tensor(sorted({t for split in tokens.values() for ids in split for t in ids} | set(end)))
    return Windows(
        torch.tensor(stream[: count * training.length]).view(count, training.length),
        torch.tensor(held_out),
        [key for key, _ in long],
        vocabulary,
    )


def own_windows(file: Path, rows: int, length: int, base: Any, facts: dict[str, str]) -> Windows:
    """Held-out windows of text that the base model writes: read from a file, or written to it once.

    The model draws each token from its own distribution. So the mean rise of the loss on this text estimates, without
    a bias, the KL divergence of the adapted model from the base model in nats a token.

    Args:
        file: a safetensors file that keeps the text: another machine would draw another one.
        rows: windows.
        length: tokens of each.
        base: the model without an adapter.
        facts: which model that is.

    Raises:
        ValueError: the file has text of another size, or of another model.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            # Not seed 0 and its neighbours, which statistics are drawn with.
            ids = torch.cat([batch["input_ids"] for batch in own_text(base, rows=rows, length=length, seed=1_000_003)])
            tensors = {"input_ids": ids.cpu()}
            atomic.write_by(file, lambda partial: save_file(tensors, partial, metadata=facts))
    with safe_open(file, "pt") as text:
        ids, found = text.get_tensor("input_ids"), text.metadata() or {}
    if ids.shape != (rows, length) or found != facts:
        raise ValueError(
            f"{file}: expected {rows} windows of {length} tokens by the model {facts}, found {tuple(ids.shape)} by "
            f"{found}; set evaluation.own_text, evaluation.length, model and dtype as before, or choose another --out"
        )
    return Windows(ids[:0], ids, [f"{OWN} {row}" for row in range(rows)], None)


@contextmanager
def restricted_head(model: Any, vocabulary: Tensor | None) -> Iterator[Tensor]:
    """Within it the model's head has the rows of a vocabulary alone, frozen, and the softmax is over them.

    Args:
        model: a causal language model of transformers, or peft's around one.
        vocabulary: (tokens,) int64, ascending; None leaves the head as it is.

    Yields:
        (model's tokens,) int64: the label of every token, -100 for those that are left out.

    Raises:
        ValueError: the head is not a plain linear layer.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, size = inner.get_output_embeddings(), inner.config.vocab_size
    if not isinstance(head, nn.Linear):
        raise ValueError(f"head: expected nn.Linear, found {type(head).__name__}; take it out of the adapted modules")
    labels = torch.arange(head.out_features, device=head.weight.device)
    if vocabulary is None:
        yield labels
        return
    vocabulary = vocabulary.to(head.weight.device)
    small = nn.Linear(head.in_features, len(vocabulary), bias=head.bias is not None, device="meta")
    small.weight = nn.Parameter(head.weight.detach()[vocabulary], requires_grad=False)
    if head.bias is not None:
        small.bias = nn.Parameter(head.bias.detach()[vocabulary], requires_grad=False)
    labels = torch.full_like(labels, -100)
    labels[vocabulary] = torch.arange(len(vocabulary), device=labels.device)
    try:
        inner.set_output_embeddings(small)
        inner.config.vocab_size = len(vocabulary)  # which the model's own loss reads
        yield labels
    finally:
        inner.set_output_embeddings(head)
        inner.config.vocab_size = size


@torch.no_grad()
def document_losses(model: nn.Module, windows: Windows, batch_size: int) -> dict[str, float]:
    """The mean loss of a token of every held-out document, by its key, in nats; in evaluation mode."""
    result: dict[str, float] = {}
    with evaluating(model), restricted_head(model, windows.vocabulary) as labels:
        for start in range(0, len(windows.keys), batch_size):
            ids = windows.held_out[start : start + batch_size].to(labels.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            losses = F.cross_entropy(logits.transpose(1, 2), labels[ids[:, 1:]], reduction="none").mean(-1)
            result.update(zip(windows.keys[start:], losses.tolist(), strict=False))
    return result
