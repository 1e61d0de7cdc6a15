"""Runs data through the stock model with latents of full rank, one group of layers at a time, for their moments.

Where all layers fit the budget, they are one group, and each batch makes one pass. Otherwise a first sweep writes what
enters each group into temporary files. A second one takes the groups from the last to the first: each runs again, and
hands the gradient at its input down to the group before. The groups change no bit of the moments.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .latent import EVERY, LatentMoments
from .layerwise import Layerwise

BUDGET = 2**31  # bytes of a group of two layers or more: their weights, moments and activations. Not tuned.


def collect(
    target: Layerwise, batches: Sequence[Mapping[str, Any]], gradients: bool
) -> Generator[tuple[int, LatentMoments]]:
    """Yield each layer's number and moments, when it is at work; the layer may be changed then, but not before.

    The loss is the cross-entropy of answers that are sampled from the model's own logits, which makes the squared
    gradients its Fisher information. It counts a random quarter of the tokens, for speed.

    Args:
        target: the stock model, all of its layers empty. A layer that was yielded stays as it is.
        batches: keyword arguments; rows are texts.
        gradients: whether to make a backward pass too, for `fisher`. The last group of layers comes first then.

    Raises:
        OSError: the disk has no room for the temporary files.
    """
    config = target.model.config
    itemsize, shapes = target.model.dtype.itemsize, [batch["input_ids"].shape for batch in batches]
    saved = max(saved_bytes(config, rows, length, itemsize) for rows, length in shapes) if gradients else 0
    at_once = group_size(config, target.layer_numbers * itemsize + saved, gradients)
    order = list(enumerate(group.tolist() for group in torch.arange(config.num_hidden_layers).split(at_once)))
    with tempfile.TemporaryDirectory(prefix="clover-") as folder:
        _check_room(
            folder, stored_bytes(len(order), sum(map(math.prod, shapes)), config.hidden_size, itemsize, gradients)
        )
        passes = _Passes(target, batches, Path(folder), len(order), gradients)
        if gradients:
            for k, group in order[:-1]:
                passes.sweep(k, group, None)
                for i in group:
                    target.empty(i)
        for k, group in reversed(order) if gradients else order:
            moments = {i: LatentMoments.zeros(config.kv_lora_rank) for i in group}
            passes.sweep(k, group, moments)
            for i in group:
                yield i, moments.pop(i)
    passes.progress.close()


def group_size(config: Any, layer: int, gradients: bool) -> int:
    """How many layers are at work at once.

    Args:
        config: of the stock model with latents of full rank.
        layer: bytes of a layer's weights, and of what it saves for the backward pass.
        gradients: whether there is one.
    """
    moments = (1 + gradients) * 8 * config.kv_lora_rank**2
    return max(1, min(config.num_hidden_layers, BUDGET // (moments + layer)))


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
        self, target: Layerwise, batches: Sequence[Mapping[str, Any]], folder: Path, groups: int, gradients: bool
    ) -> None:
        self.target, self.batches, self.folder, self.gradients = target, batches, folder, gradients
        self.last, sweeps = groups - 1, 2 * groups - 1 if gradients else groups
        self.generator = torch.Generator(target.device).manual_seed(0)
        total = sweeps * len(batches)
        self.progress = tqdm(total=total, desc="CLOVER latent", unit=" batches", delay=3, leave=False)

    def sweep(self, k: int, group: Sequence[int], moments: Mapping[int, LatentMoments] | None) -> None:
        """Give the layers of group k their weights, and run all batches through them.

        Args:
            k: number of the group.
            group: its layers.
            moments: what to add to, layer by layer; None for the first of two sweeps.
        """
        layers = {i: self.target.fill(i) for i in group}
        for b, batch in enumerate(self.batches):
            hidden, options, mask = self.target.start(batch)
            if k:
                hidden = self._read(f"{k}-{b}", moments is not None).requires_grad_(self.gradients)
            with torch.set_grad_enabled(self.gradients), ExitStack() as hooked:
                for i, layer in layers.items():
                    hook = partial(self._add, None if moments is None else moments[i], mask)
                    hooked.enter_context(layer.self_attn.kv_a_layernorm.register_forward_hook(hook))
                output = hidden
                for layer in layers.values():
                    output = layer(output, **options)
            if self.gradients and moments is not None:
                if k == self.last:
                    self._loss(output[mask]).backward()
                else:
                    output.backward(self._read(f"gradient-{b}", True))
                if hidden.grad is not None:
                    self._write(f"gradient-{b}", hidden.grad)
            elif k < self.last:
                self._write(f"{k + 1}-{b}", output.detach())
            self.progress.update()

    def _add(self, of: LatentMoments | None, mask: Tensor, module: Any, inputs: Any, output: Tensor) -> Tensor:
        """Add a layer's latents (B, T, n), and in the backward pass their gradients."""
        if of is not None:
            z = output.detach().float() * mask.unsqueeze(-1)
            of.tokens += int(mask.sum())
            of.second += (z.flatten(0, 1).T @ z.flatten(0, 1)).to(of.second)
        if self.gradients:
            output = output if output.requires_grad else output.detach().requires_grad_()
            if of is not None:
                output.register_hook(partial(_add_gradient, of))
        return output

    def _loss(self, hidden: Tensor) -> Tensor:
        """The loss of hidden states (tokens, D) behind the last layer."""
        hidden = self.target.model.model.norm(hidden)
        chosen = torch.randperm(len(hidden), generator=self.generator, device=hidden.device)
        logits = self.target.model.lm_head(hidden[chosen[: -(-len(hidden) // EVERY)]])
        logs = logits.float().log_softmax(-1)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=self.generator)
        return logs.gather(-1, drawn).sum().neg()

    def _write(self, name: str, tensor: Tensor) -> None:
        torch.save(tensor.cpu(), self.folder / f"{name}.pt")

    def _read(self, name: str, last: bool) -> Tensor:
        """A tensor that was written; the last reader deletes the file."""
        path = self.folder / f"{name}.pt"
        tensor: Tensor = torch.load(path, map_location=self.target.device)
        if last:
            path.unlink()
        return tensor


def _add_gradient(of: LatentMoments, gradient: Tensor) -> None:
    g = gradient.float().flatten(0, 1)
    of.fisher += (g.T @ g).to(of.fisher)


def stored_bytes(groups: int, tokens: int, hidden_size: int, itemsize: int, gradients: bool) -> int:
    """Bytes of the temporary files: what enters each group but the first, and a gradient where there are two."""
    return (groups if gradients else 1) * (groups > 1) * tokens * hidden_size * itemsize


def _check_room(folder: str, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder}: expected room for {needed / 2**30:.1f} GiB of temporary files, found {free / 2**30:.1f} GiB; "
            "set TMPDIR to a folder on a larger disk, or pass less calibration data"
        )
