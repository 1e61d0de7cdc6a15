"""Which pairs of key dimensions keep their rotation, and what replaces the rotation of the others.

A pair of rotated dimensions is one complex number: position t multiplies it by exp(i w t). At one frequency w, the
keys of all key-value heads are a vector k in C^h, and any invertible complex V commutes with the rotation: `k = V c`,
and a query reads `Re(conj(q) k) = Re(conj(V^* q) c)`. V is free, and is chosen so that the components c have an order:
by what their rotation is worth. The stock class rotates the same frequencies in all layers, the slots. Each layer puts
components into them, its own or of a frequency close by; the others lose their rotation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

    `freq_fold` adjacent frequencies may count as one, as in TransMLA's FreqFold: n = h freq_fold.

    Attributes:
        mix: V, (d/2/freq_fold, n, n) complex128, columns ordered by worth; rows are frequency by frequency, and in it
            head by head.
        split: V^-1, rows in order.
        worth: (d/2/freq_fold, n) float64, what the rotation of each component is worth.
        gain: (d/2 n, d/2) float64, what it is worth to rotate a component by another frequency of the model.
        unrotated: (H, d/2) complex128, the factor of queries whose pair lost its rotation.
    """

    mix: Tensor
    split: Tensor
    worth: Tensor
    gain: Tensor
    unrotated: Tensor


@dataclass(frozen=True)
class Slots:
    """The rotary key.

    Attributes:
        frequencies: (pairs,) float64, the same in all layers.
        filled: for each layer (pairs,) int64, the component in each slot, counted through all frequencies.
        factors: for each layer (H, pairs) complex128, the factor of queries, where the slot's frequency is another.
    """

    frequencies: Tensor
    filled: list[Tensor]
    factors: list[Tensor]


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

    "clover" (ours): the eigenvectors of `W^1/2 E[k k^*] W^1/2`, where W is diagonal and has for each key-value head
    the sum over its query heads of `E|q|^2 (1 - |a|^2)`, with `a = E[exp(i w (t_q - t_k))]` under the head's
    attention. An eigenvalue is what squared scores lose if the component is multiplied by a instead of rotated.
    "transmla" (arXiv 2502.07864): the eigenvectors of the real part of `E[k k^*]`, and 1 for a.
    """
    keys, half = moments.keys / moments.tokens, len(source.frequencies)
    if method == "transmla":
        values, vectors = torch.linalg.eigh(keys.real)
        mix, ones = vectors.flip(-1).to(keys.dtype), torch.ones(source.heads, half, dtype=keys.dtype)
        return Components(mix, mix.mH, values.flip(-1), values.new_zeros(values.numel(), half), ones)
    a = moments.turn(source.frequencies)
    energy = moments.queries / moments.tokens * source.scale**2  # (H, d/2)
    loss = (energy * (1 - a.abs().square()).clamp(min=0)).unflatten(0, (-1, source.groups)).sum(1).T  # (d/2, h)
    loss = loss.clamp(min=1e-9 * float(loss.max()))
    root = loss.sqrt().to(keys.dtype)
    values, vectors = torch.linalg.eigh(root[:, :, None] * keys * root[:, None, :])
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    mix = vectors / root[:, :, None]
    other = (source.frequencies[:, None] - source.frequencies).flatten()
    saved = moments.turn(other).abs().square().unflatten(1, (half, half)) - a.abs().square()[..., None]
    of_head = mix.abs().square().repeat_interleave(source.groups, 1)  # (d/2, H, h)
    gain = torch.einsum("af,faj,fj,afw->fjw", energy, of_head, values, saved).flatten(0, 1)
    return Components(mix, vectors.mH * root[:, None, :], values, gain, a)


def freq_fold_of(source: Source, pairs: int, method: Method) -> int:
    """How many adjacent frequencies count as one: TransMLA has one component for each frequency, or for several."""
    half = source.head_dim // 2
    return half // pairs if method == "transmla" and pairs < half else 1


def choose(
    source: Source, moments: Sequence[LayerMoments], found: Sequence[Components], pairs: int, method: Method
) -> Slots:
    """The frequencies that are rotated, and the components that each layer puts there.

    "clover" adds one slot after another, of the frequency that is worth most over all layers together. "transmla", and
    any method that keeps all pairs, takes the first components of every frequency.
    """
    groups, n = found[0].worth.shape
    freq_fold = len(source.frequencies) // groups
    if method == "transmla" or pairs == groups * n:
        counts = torch.tensor([pairs // groups + (i < pairs % groups) for i in range(groups)])
        slots = torch.cat([i * n + torch.arange(int(count)) for i, count in enumerate(counts)])
        frequencies = source.frequencies[::freq_fold].repeat_interleave(counts)
        ones = torch.ones(source.heads, pairs, dtype=torch.complex128)
        return Slots(frequencies, [slots] * len(found), [ones] * len(found))
    gain = torch.stack([c.gain for c in found])  # (layers, components, frequencies)
    left, chosen = gain.clone(), []
    for _ in range(pairs):
        best, component = left.max(1)  # (layers, frequencies)
        chosen.append(int(best.sum(0).argmax()))
        left[torch.arange(len(left)), component[:, chosen[-1]]] = -1.0
    frequencies = source.frequencies[chosen]
    filled = [_fill(of_layer[:, chosen]) for of_layer in gain]
    factors = []
    for of_layer, components_ in zip(moments, filled, strict=True):
        own = source.frequencies[components_ // n]
        factors.append(of_layer.turn(own - frequencies))
    return Slots(frequencies, filled, factors)


def _fill(gain: Tensor) -> Tensor:
    """(slots,) int64: a component for every slot, the largest gains (components, slots) first."""
    result = torch.full((gain.shape[1],), -1)
    used = torch.zeros(len(gain), dtype=torch.bool)
    for flat in gain.flatten().argsort(descending=True, stable=True).tolist():
        component, slot = divmod(flat, gain.shape[1])
        if result[slot] < 0 and not used[component]:
            result[slot], used[component] = component, True
    return result
