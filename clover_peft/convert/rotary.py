"""Which pairs of key dimensions keep their rotation, and what replaces the rotation of the others.

A pair of rotated dimensions is one complex number: position t multiplies it by exp(i w t). At one frequency w, the
keys of all key-value heads are a vector k in C^h, and any invertible complex V commutes with the rotation: `k = V c`,
and a query reads `Re(conj(q) k) = Re(conj(V^* q) c)`. V is free, and is chosen so that the components c have an order:
by what their rotation is worth. The first components keep it, and become the rotary key that all heads share; the
others lose it. If the rotary key has fewer pairs than a head has frequencies, adjacent frequencies count as one, and
turn at the first of them (TransMLA's FreqFold).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..base_model.activations import TokenReader, evaluating
from .structure import Source

Method = Literal["clover", "transmla"]


@dataclass
class LayerMoments:
    """Sums over tokens of one layer.

    Attributes:
        keys: (d/2/freq_fold, n, n) complex128, sum of `k k^*` before rotation; n = h freq_fold.
        queries: (H, d/2) float64, sum of `|q|^2`.
        distances: (H, longest text) float64, sum of attention weights by the distance from query to key.
        values: float64, sum of `|v|^2`.
        tokens: number of tokens.
    """

    keys: Tensor
    queries: Tensor
    distances: Tensor
    values: float = 0.0
    tokens: int = 0

    def turn(self, frequencies: Tensor) -> Tensor:
        """(H, n) complex128: the mean of `exp(i w (t_q - t_k))` under each head's attention, for n frequencies w."""
        angles = torch.arange(self.distances.shape[1])[:, None] * frequencies
        share = self.distances / self.distances.sum(1, keepdim=True)
        return torch.complex(share @ angles.cos(), share @ angles.sin())


@dataclass(frozen=True)
class Components:
    """The components of one layer's keys.

    `freq_fold` adjacent frequencies may count as one: n = h freq_fold.

    Attributes:
        mix: V, (d/2/freq_fold, n, n) complex128, columns ordered by worth; rows are frequency by frequency, and in it
            head by head.
        split: V^-1, rows in order.
        worth: (d/2/freq_fold, n) float64, what the rotation of each component is worth.
        unrotated: (H, d/2) complex128, the factor of queries whose pair lost its rotation.
    """

    mix: Tensor
    split: Tensor
    worth: Tensor
    unrotated: Tensor


@torch.no_grad()
def collect(source: Source, batches: Iterable[Mapping[str, Any]], freq_fold: int = 1) -> list[LayerMoments]:
    """Run the model once over data and collect each layer's moments. Costs one layer's attention weights at a time."""
    h, heads, half = source.key_value_heads, source.heads, source.head_dim // 2
    sums = [
        LayerMoments(
            torch.zeros(half // freq_fold, h * freq_fold, h * freq_fold, dtype=torch.complex128),
            torch.zeros(heads, half, dtype=torch.float64),
            torch.zeros(heads, 0, dtype=torch.float64),
        )
        for _ in source.layers
    ]
    reader, mask = TokenReader(source.model), dict[str, Tensor]()

    def pairs(x: Tensor) -> Tensor:
        """(tokens, heads, d/2) complex64 of the real tokens."""
        x = x.unflatten(-1, (-1, 2, half)).float()
        return torch.complex(x[..., 0, :], x[..., 1, :])[mask["real"]]

    def keys(of: LayerMoments, output: Tensor) -> None:
        k = pairs(output).permute(2, 1, 0).reshape(half // freq_fold, h * freq_fold, -1)
        of.keys += (k @ k.mH).to(of.keys)
        of.tokens += k.shape[-1]

    def queries(of: LayerMoments, output: Tensor) -> None:
        of.queries += pairs(output).abs().square().sum(0).to(of.queries)

    def values(of: LayerMoments, output: Tensor) -> None:
        of.values += float(output[mask["real"]].float().square().sum())

    def weights(of: LayerMoments, output: Any) -> None:
        p = output[1].float()  # (rows, H, T, T)
        p, length = p * mask["real"][:, None, :, None], p.shape[-1]
        # With T + 1 numbers in a row instead of T, weights of one distance are in one column.
        skewed = torch.nn.functional.pad(p.flip(-1), (0, 1)).flatten(-2).unflatten(-1, (length + 1, length))
        found = skewed.sum((0, 2)).roll(1, -1).to(of.distances)
        longest = max(length, of.distances.shape[1])
        both = [torch.nn.functional.pad(x, (0, longest - x.shape[1])) for x in (of.distances, found)]
        of.distances = torch.stack(both).sum(0)

    with evaluating(source.model), ExitStack() as hooked, _eager(source.model):
        for layer, of in zip(source.layers, sums, strict=True):
            attention = layer.self_attn
            for module, add in (
                (attention.q_proj, queries),
                (attention.k_proj, keys),
                (attention.v_proj, values),
                (attention, weights),
            ):
                hook = module.register_forward_hook(lambda m, i, output, add=add, of=of: add(of, output))
                hooked.enter_context(hook)
        for batch in tqdm(batches, desc="CLOVER rotation", unit=" batches", delay=3, leave=False):
            values_, masks = reader.start_without_logits(batch)
            ids = values_["input_ids"]
            mask["real"] = masks.get("attention_mask", torch.ones_like(ids, dtype=torch.bool))
            source.model(**values_)
    return sums


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Attention that returns its weights, for the duration of the context."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def components(source: Source, moments: LayerMoments, method: Method) -> Components:
    """The components of a layer's keys.

    "clover" (ours): the eigenvectors of `W^1/2 E[k k^*] W^1/2`, where W is diagonal and has for each frequency w and
    key-value head the sum over its query heads of `E|q|^2 (1 - |a|^2)`, with `a = E[exp(i w (t_q - t_k))]` under the
    head's attention: what squared scores lose if the component is multiplied by a instead of rotated. Queries whose
    pair lost its rotation are multiplied by `a / |a|^1/2`. (That lost less than a and a / |a| on validation text of
    SmolLM2-135M. By a alone, all scores shrink.)
    "transmla" (arXiv 2502.07864): the eigenvectors of the real part of `E[k k^*]`, and 1 for a.
    """
    keys, half = moments.keys / moments.tokens, len(source.frequencies)
    if method == "transmla":
        values, vectors = torch.linalg.eigh(keys.real)
        mix, ones = vectors.flip(-1).to(keys.dtype), torch.ones(source.heads, half, dtype=keys.dtype)
        return Components(mix, mix.mH, values.flip(-1), ones)
    a = moments.turn(source.frequencies)
    energy = moments.queries / moments.tokens * source.scale**2  # (H, d/2)
    loss = (energy * (1 - a.abs().square()).clamp(min=0)).unflatten(0, (-1, source.groups)).sum(1)  # (h, d/2)
    loss = loss.T.reshape(keys.shape[:2]).clamp(min=1e-9 * (float(loss.max()) or 1.0))
    root = loss.sqrt().to(keys.dtype)
    values, vectors = torch.linalg.eigh(root[:, :, None] * keys * root[:, None, :])
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    unrotated = a / a.abs().clamp(min=1e-12).sqrt()
    return Components(vectors / root[:, :, None], vectors.mH * root[:, None, :], values, unrotated)


def freq_fold_of(source: Source, pairs: int) -> int:
    """How many adjacent frequencies count as one, so that each such group has a pair that is rotated."""
    return max(1, source.head_dim // (2 * pairs))


def frequencies_of(source: Source, rotated: Tensor) -> Tensor:
    """(pairs,) float64: the frequency at which each component turns that keeps its rotation."""
    freq_fold = freq_fold_of(source, len(rotated))
    return source.frequencies[::freq_fold][rotated // (source.key_value_heads * freq_fold)]


def choose(worth: Tensor, pairs: int) -> Tensor:
    """(pairs,) int64: the components that keep their rotation, in every layer, counted through all groups.

    They are the first one of each group of frequencies, the second one, and so on. The last round may not have a pair
    for every group; its groups are those with the most worth.

    Args:
        worth: (groups, n), of each component, over all layers.
        pairs: of the rotary key.
    """
    groups, n = worth.shape
    counts = torch.full((groups,), pairs // groups)
    if left := pairs % groups:
        counts[worth[:, pairs // groups].topk(left).indices] += 1
    return torch.cat([i * n + torch.arange(count) for i, count in enumerate(counts.tolist())])
