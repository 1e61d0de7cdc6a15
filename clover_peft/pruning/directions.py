"""Directions of attention heads in the order of their singular values, and the maps that keep the leading ones.

With `W_o W_v = V S U^T` in a head (Eq. 3, arXiv 2411.17426) a head passes on `V S U^T x`. In the coordinates of the
head (ours) cutting it to r directions is the map `P = E_r C_r` of its own features, where `C z = S^1/2 U^T x`,
`W_o E = V S^1/2` and `E C = I` at full rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..base_model.weight import base_of, base_weight, partner_weight
from ..linalg.decomposition import gram, pair_bases
from ..linalg.moments import Moments, pair_grams
from .calibration import Calibration, measure
from .pairs import Kind, Pair, beside_name, find_pairs, select_pairs

Method = Literal["clover", "vanilla"]


@dataclass(frozen=True)
class Directions:
    """The directions of a pair's heads, most important first.

    Attributes:
        values: (H, d) float64, singular values, or importances of coordinates; descending.
        down: (H, d, d) float64, C: coordinates of a head's features in its directions.
        back: (H, d, d) float64, E: back from them; `back @ down = I`.
        seen: (G, d, d) float64, second moments about the bias of what every query head reads, drawn towards the
            weights, if its own way back is to be fitted.
        bias: (G, d) float64, the value's, a constant in what the output projection reads of every query head.
            Directions that are cut take no part of it with them, it goes into the output's bias. None without.
    """

    values: Tensor
    down: Tensor
    back: Tensor
    seen: Tensor | None = None
    bias: Tensor | None = None

    def factors(self, ranks: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """The ways into the leading directions and back.

        Under grouped-query attention C is one for all query heads of a group. Where it is known what each of them
        reads (moment A), each has its own `E = A C^T (C A C^T)^-1`, the best for it in the mean.

        Args:
            ranks: (H,), directions that every head keeps.
            groups: query heads that share a head.

        Returns:
            C (H, d, d), of which the rows beyond a head's rank are zero, and E (H * groups, d, d), of which the
            columns are; float64. Of a head that keeps all of them both are the identity.
        """
        size = self.values.shape[1]
        eye = torch.eye(size, dtype=self.down.dtype, device=self.down.device)
        whole = (ranks.to(eye.device) == size).view(-1, 1, 1)
        kept = (torch.arange(size, device=self.down.device) < ranks.to(self.down.device).unsqueeze(1)).to(self.down)
        down = torch.where(whole, eye, kept.unsqueeze(-1) * self.down)
        if self.seen is None:
            back = torch.where(whole, eye, self.back * kept.unsqueeze(1))
            return down, back.repeat_interleave(groups, dim=0)
        each = down.repeat_interleave(groups, dim=0)
        read = self.seen @ each.mT
        back = read @ torch.linalg.pinv(each @ read, hermitian=True)
        back = back * kept.repeat_interleave(groups, dim=0).unsqueeze(1)
        return down, torch.where(whole.repeat_interleave(groups, dim=0), eye, back)

    @staticmethod
    def product(down: Tensor, back: Tensor) -> Tensor:
        """`P = E C`, (G, d, d): what is left of the features of every query head."""
        return back @ down.repeat_interleave(len(back) // len(down), dim=0)

    def constant(self, down: Tensor, back: Tensor) -> Tensor | None:
        """(G, d), the part of the bias that is cut, `(I - E C) b`; None without one."""
        if self.bias is None:
            return None
        return self.bias - (self.product(down, back) @ self.bias.unsqueeze(-1)).squeeze(-1)

    def energy(self, ranks: Tensor) -> Tensor:
        """(H,), the share of the sum of squared values that the leading directions hold; 1 where all are zero."""
        squares = self.values.square()
        kept = torch.arange(squares.shape[1], device=squares.device) < ranks.to(squares.device).unsqueeze(1)
        total = squares.sum(1)
        return torch.where(total > 0, (squares * kept).sum(1) / total.clamp(min=1e-300), torch.ones_like(total))


Found = dict[str, tuple[Pair, Directions]]  # by name of a pair


@torch.no_grad()
def decompose(
    model: nn.Module,
    kinds: Iterable[Kind] | None = None,
    method: Method = "clover",
    calibration: Iterable[Mapping[str, Any]] | Calibration | None = None,
    target_modules: str | Sequence[str] | None = None,
) -> Found:
    """The directions of all pairs of a model.

    Args:
        model: a model of a known family, without adapters.
        kinds: which pairs; None for all that the model has.
        method: "clover": singular directions; "vanilla": coordinates as they are, in the order of the product of the
            norms on both sides.
        calibration: batches, keyword arguments of the model, or from `calibrate`. With them moments of activations
            take the place of the weights that compute them: of a value those of what the output projection reads, of a
            key the centred ones.
        target_modules: which of them, see `select_pairs`.

    Returns:
        Name -> the pair and its directions.

    Raises:
        ValueError: if there is no such pair (queries and keys that are rotated are none), or no such method.
    """
    pairs = select_pairs(model, find_pairs(model), kinds, target_modules)
    return decompose_pairs(pairs, method, measure(model, pairs, calibration).moments)


def decompose_pairs(pairs: Iterable[Pair], method: Method, moments: Mapping[str, Moments]) -> Found:
    """The same of these pairs; `moments` by the names of `probes`, none for directions by weights alone."""
    if method not in ("clover", "vanilla"):
        raise ValueError(f"method: expected 'clover' or 'vanilla', found {method!r}")
    found = {}
    for pair in pairs:
        try:
            found[pair.name] = (pair, decompose_pair(pair, method, moments))
        except ValueError as error:
            raise ValueError(f"{pair.name}: {error}") from error
    return found


def decompose_pair(pair: Pair, method: Method, moments: Mapping[str, Moments]) -> Directions:
    """Directions of one pair; `moments` by the names of `probes`."""
    size, model = pair.heads.dim, pair.attention.model
    reader = base_weight(model, pair.path)
    with reader.whole():  # a key's bias drops out of softmax, a value's adds a constant
        g_in, own_bias = gram(pair.heads.blocks(reader.transposed(), size)), reader.bias
        if own_bias is not None:
            own_bias = pair.heads.blocks(own_bias, size).to(g_in)
    with partner_weight(model, pair.partner) as (rows, query_bias):
        heads = pair.partner.heads
        added = None if query_bias is None else heads.blocks(query_bias, size)
        g_out = gram(heads.blocks(rows, size), added)
    bias = None
    if pair.kind == "vo" and own_bias is not None and _takes_bias(pair):
        bias = own_bias.repeat_interleave(pair.groups, dim=0)
    g_in, g_out, read = pair_grams(
        g_in,
        g_out,
        pair.heads.count,
        reads=pair.partner.reads,
        own=moments.get(pair.name),
        partner=moments.get(beside_name(pair)),
        constant=bias,  # The bias is known from the weights; the mean of these data is not that of later ones.
    )
    if read is not None:
        g_in = g_in / pair.groups  # The mean over the group, because `g_out` is the sum.
    if method == "vanilla":
        return replace(_coordinates(g_in, g_out), bias=bias)
    bases = pair_bases(g_in, g_out)
    assert bases.back is not None  # a pair's never is the identity
    root = bases.singular_values.sqrt()
    down, back = root.unsqueeze(-1) * bases.coordinates, bases.back * root.unsqueeze(-2)
    return Directions(bases.singular_values, down, back, read if pair.groups > 1 else None, bias)


def _takes_bias(pair: Pair) -> bool:
    """Whether a constant in the values can go into the output's bias: attention adds up to one (with sinks it does
    not), and there is a bias or may be one (Multi-head Latent Attention stays what its class says)."""
    if pair.attention.fact("sinks") is not None:
        return False
    return pair.attention.family.positions != "decoupled" or pair.partner_projection.bias is not None


def _coordinates(g_in: Tensor, g_out: Tensor) -> Directions:
    """The coordinates themselves, by the product of the norms on both sides."""
    norms = (g_in.diagonal(dim1=-2, dim2=-1) * g_out.diagonal(dim1=-2, dim2=-1)).sqrt()
    values, order = norms.sort(dim=-1, descending=True)
    down = nn.functional.one_hot(order, norms.shape[-1]).to(g_in)
    return Directions(values, down, down.mT)


Factors = dict[str, tuple[Tensor, Tensor]]  # name of a pair -> C (H, d, d), E (G, d, d)


def cut(found: Mapping[str, tuple[Pair, Directions]], ranks: Mapping[str, Tensor]) -> Factors:
    """The factors of all pairs at these ranks, before any weight is changed.

    Args:
        found: from `decompose`.
        ranks: name -> (H,), directions that every head keeps.

    Raises:
        ValueError: if ranks are missing, or more than there are directions.
    """
    factors = {}
    for name, (pair, directions) in found.items():
        check_ranks(name, ranks.get(name), *directions.values.shape)
        factors[name] = directions.factors(ranks[name], pair.groups)
    return factors


def check_ranks(name: str, ranks: Sequence[int] | Tensor | None, count: int, size: int) -> None:
    """Raises ValueError if these are not ranks of so many heads of this size."""
    found = ranks.tolist() if isinstance(ranks, Tensor) else ranks
    if found is None or len(found) != count or not all(0 <= rank <= size for rank in found):
        raise ValueError(f"{name}: expected {count} ranks from 0 to {size}, found {found and list(found)}")


@torch.no_grad()
def mask(model: nn.Module, found: Mapping[str, tuple[Pair, Directions]], ranks: Mapping[str, Tensor]) -> None:
    """Leave out all but the leading directions, in place, with every shape as it was: for analysis.

    Output projections read, and query projections write, what `P = E C` leaves of a head. An output projection gets
    a bias where a constant is left over. All maps are made before any weight is changed.

    Args:
        model: the model that was decomposed.
        found: from `decompose`.
        ranks: name -> (H,), directions that every head keeps.

    Raises:
        ValueError: if ranks are missing, or more than there are directions.
    """
    for name, (down, back) in cut(found, ranks).items():
        pair, directions = found[name]
        module: Any = base_of(model.get_submodule(pair.partner.path))
        rows = base_weight(model, pair.partner.path).transposed()  # (in, out), a view
        heads = pair.partner.heads
        p = directions.product(down, back)
        constant = directions.constant(down, back)
        if constant is not None:
            lost = torch.einsum("ogd,gd->o", heads.blocks(rows.mT, pair.heads.dim).to(p), constant)
            add_bias(module, lost)
        for side in [rows.mT] if pair.partner.reads else [rows, *([module.bias] if module.bias is not None else [])]:
            changed = torch.einsum("...gd,gde->...ge", heads.blocks(side, pair.heads.dim).to(p), p)
            place = heads.heads(side)
            place.copy_(changed.reshape(place.shape))


def add_bias(module: Any, values: Tensor) -> None:
    """Add to the bias of a projection, which gets one if it has none and the values are not all zero."""
    if module.bias is None:
        if not bool(values.any()):
            return
        module.bias = nn.Parameter(torch.zeros_like(values, dtype=module.weight.dtype), module.weight.requires_grad)
    module.bias.add_(values.to(module.bias))
