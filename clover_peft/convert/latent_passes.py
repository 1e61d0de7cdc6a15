"""Runs data through the stock model with latents of full rank, one group of layers at a time, for sums over tokens.

Where all layers fit the budget, they are one group, and each batch makes one pass. Otherwise a first sweep writes what
enters each group into temporary files. A second one takes the groups from the last to the first: each runs again, and
hands the gradient at its input down to the group before. The groups change no bit of the sums.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .layerwise import Layerwise
from .temporary import TemporaryTensors, temporary_tensors

BUDGET = 2**31  # bytes of a group of two layers or more: their weights, sums and activations. Not tuned.
# Of this many predictions one is taken a gradient of, because large vocabularies cost more than the rest. Not tuned.
EVERY = 4


def collect(target: Layerwise, batches: Sequence[Mapping[str, Any]], gradients: bool) -> Generator[tuple[int, Tensor]]:
    """Yield each layer's number and a sum over tokens, when it is at work; the layer may be changed then, not before.

    The sum is that of `z z^T` (n, n), float64, for latents z of full rank; or with `gradients` of `g g^T`, for the
    gradients g of a loss. The loss is the cross-entropy of answers that are sampled from the model's own logits, which
    makes the squared gradients its Fisher information. It counts a random quarter of the tokens, for speed.

    Args:
        target: the stock model, all of its layers empty. A layer that was yielded stays as it is.
        batches: keyword arguments; rows are texts.
        gradients: whether to make a backward pass too. The last group of layers comes first then.

    Raises:
        OSError: the disk has no room for the temporary files.
    """
    config = target.model.config
    itemsize, shapes = target.model.dtype.itemsize, [batch["input_ids"].shape for batch in batches]
    saved = max(saved_bytes(config, rows, length, itemsize) for rows, length in shapes) if gradients else 0
    at_once = group_size(config, target.layer_numbers * itemsize + saved)
    order = list(enumerate(group.tolist() for group in torch.arange(config.num_hidden_layers).split(at_once)))
    needed = stored_bytes(len(order), sum(map(math.prod, shapes)), config.hidden_size, itemsize, gradients)
    with temporary_tensors(needed, target.device) as files:
        passes = _Passes(target, batches, files, len(order), gradients)
        with passes.progress:
            if gradients:
                for k, group in order[:-1]:
                    passes.sweep(k, group, None)
                    for i in group:
                        target.empty(i)
            for k, group in reversed(order) if gradients else order:
                n = config.kv_lora_rank
                sums = {i: torch.zeros(n, n, dtype=torch.float64) for i in group}
                passes.sweep(k, group, sums)
                for i in group:
                    yield i, sums.pop(i)


def group_size(config: Any, layer: int) -> int:
    """How many layers are at work at once.

    Args:
        config: of the stock model with latents of full rank.
        layer: bytes of a layer's weights, and of what it saves for a backward pass.
    """
    return max(1, min(config.num_hidden_layers, BUDGET // (8 * config.kv_lora_rank**2 + layer)))


def saved_bytes(config: Any, rows: int, length: int, itemsize: int) -> int:
    """Bytes that a layer with a latent of full rank saves of (rows, length) tokens for the backward pass, about.

    Norms work in float32. Keys are wider than values, and for such heads a CPU has no kernel that computes the float32
    attention weights again.
    """
    n, heads = config.kv_lora_rank, config.num_attention_heads
    key, nope = config.qk_nope_head_dim + config.qk_rope_head_dim, config.qk_nope_head_dim
    numbers = 3 * config.intermediate_size + heads * (2 * key + nope + config.v_head_dim) + n
    return rows * length * (itemsize * numbers + 4 * (2 * config.hidden_size + n + heads * length))


class _Passes:
    """Sweeps of all batches through one group of layers, and the files between the groups."""

    def __init__(
        self,
        target: Layerwise,
        batches: Sequence[Mapping[str, Any]],
        files: TemporaryTensors,
        groups: int,
        gradients: bool,
    ) -> None:
        self.target, self.batches, self.files, self.gradients = target, batches, files, gradients
        self.last, sweeps = groups - 1, 2 * groups - 1 if gradients else groups
        self.generator = torch.Generator(target.device).manual_seed(0)
        total = sweeps * len(batches)
        self.progress = tqdm(total=total, desc="CLOVER latent", unit=" batches", delay=3, leave=False)

    def sweep(self, k: int, group: Sequence[int], sums: Mapping[int, Tensor] | None) -> None:
        """Give the layers of group k their weights, and run all batches through them.

        Args:
            k: number of the group.
            group: its layers.
            sums: what to add to, layer by layer; None for the first of two sweeps.
        """
        layers = {i: self.target.fill(i) for i in group}
        for b, batch in enumerate(self.batches):
            hidden, options, mask = self.target.start(batch)
            if k:
                hidden = self.files.read(f"{k}-{b}", last=sums is not None).requires_grad_(self.gradients)
            with torch.set_grad_enabled(self.gradients), ExitStack() as hooked:
                for i, layer in layers.items():
                    hook = partial(self._add, None if sums is None else sums[i], mask)
                    hooked.enter_context(layer.self_attn.kv_a_layernorm.register_forward_hook(hook))
                output = hidden
                for layer in layers.values():
                    output = layer(output, **options)
            if self.gradients and sums is not None:
                if k == self.last:
                    self._loss(output[mask]).backward()
                else:
                    output.backward(self.files.read(f"gradient-{b}", last=True))
                if hidden.grad is not None:
                    self.files.write(f"gradient-{b}", hidden.grad)
            elif k < self.last:
                self.files.write(f"{k + 1}-{b}", output.detach())
            self.progress.update()

    def _add(self, of: Tensor | None, mask: Tensor, module: Any, inputs: Any, output: Tensor) -> Tensor:
        """Add a layer's latents (B, T, n), or in the backward pass their gradients."""
        if self.gradients:
            output = output if output.requires_grad else output.detach().requires_grad_()
            if of is not None:
                output.register_hook(partial(_add_squares, of))
        elif of is not None:
            _add_squares(of, output * mask.unsqueeze(-1))
        return output

    def _loss(self, hidden: Tensor) -> Tensor:
        """The loss of hidden states (tokens, D) behind the last layer."""
        hidden = self.target.model.model.norm(hidden)
        chosen = torch.randperm(len(hidden), generator=self.generator, device=hidden.device)
        logits = self.target.model.lm_head(hidden[chosen[: -(-len(hidden) // EVERY)]])
        logs = logits.float().log_softmax(-1)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=self.generator)
        return logs.gather(-1, drawn).sum().neg()


def _add_squares(of: Tensor, x: Tensor) -> None:
    x = x.float().flatten(0, 1)
    of += (x.T @ x).to(of)


def stored_bytes(groups: int, tokens: int, hidden_size: int, itemsize: int, gradients: bool) -> int:
    """Bytes of the temporary files: what enters each group but the first, and a gradient where there are two."""
    return (groups if gradients else 1) * (groups > 1) * tokens * hidden_size * itemsize
