"""Directions of attention heads in the order of their singular values, and the maps that keep the leading ones.

With `W_o W_v = V S U^T` in a head (Eq. 3, arXiv 2411.17426) a head passes on `V S U^T x`. In the coordinates of the
head (ours) cutting it to r directions is the map `P = E_r C_r` of its own features, where `C z = S^1/2 U^T x`,
`W_o E = V S^1/2` and `E C = I` at full rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..architectures import HeadSlice, Partner, base_of, default_targets, resolve
from ..bases import partner_weight
from ..decomposition import gram, pair_bases, per_key_value_head
from ..layer import CloverLayer, onloaded
from ..moments import Moments, Probe, collect_moments, shrink

Kind = Literal["qk", "vo"]
Method = Literal["clover", "vanilla"]


@dataclass(frozen=True)
class Pair:
    """Two projections that meet inside a head with nothing between them.

    Attributes:
        kind: "vo" (value and output) or "qk" (query and key, or the part of them that no position is put into).
        path: the value or key projection.
        heads: its features, H heads of d.
        partner: the output or query projection, with G heads, a multiple of H.
    """

    kind: Kind
    path: str
    heads: HeadSlice
    partner: Partner

    @property
    def name(self) -> str:
        """Unique in a model: a fused projection has both kinds."""
        return f"{self.path} ({self.kind})"


def find_pairs(model: nn.Module) -> list[Pair]:
    """All pairs of a model that the table of architectures knows, modules that layers share once."""
    pairs: dict[tuple[int, str], Pair] = {}
    for path in default_targets(model):
        for target in resolve(model, path):
            if target.partner is not None and target.part in ("k", "v"):
                kind: Kind = "vo" if target.part == "v" else "qk"
                shared = (id(base_of(model.get_submodule(path))), kind)
                pairs.setdefault(shared, Pair(kind, path, target.heads, target.partner))
    return list(pairs.values())


@dataclass(frozen=True)
class Directions:
    """The directions of a pair's heads, most important first.

    Attributes:
        values: (H, d) float64, singular values, or importances of coordinates; descending.
        down: (H, d, d) float64, C: coordinates of a head's features in its directions.
        back: (H, d, d) float64, E: back from them; `back @ down = I`.
        seen: (G, d, d) float64, second moments of what every query head reads, if its own way back is to be fitted.
    """

    values: Tensor
    down: Tensor
    back: Tensor
    seen: Tensor | None = None

    def maps(self, ranks: Tensor, groups: int) -> Tensor:
        """What is left of the heads' features with the leading directions alone, `P = E_r C_r`.

        Under grouped-query attention C is one for all query heads of a group. Where it is known what each of them
        reads (moment A), each has its own `E = A C^T (C A C^T)^-1`, the best for it in the mean.

        Args:
            ranks: (H,), directions that every head keeps.
            groups: query heads that share a head.

        Returns:
            (H * groups, d, d) float64.
        """
        size = self.values.shape[1]
        kept = (torch.arange(size, device=ranks.device) < ranks.unsqueeze(1)).to(self.down)  # (H, d)
        down = kept.unsqueeze(-1) * self.down
        if self.seen is None:
            return ((self.back * kept.unsqueeze(1)) @ down).repeat_interleave(groups, dim=0)
        down = down.repeat_interleave(groups, dim=0)
        read = self.seen @ down.mT
        return read @ torch.linalg.pinv(down @ read, hermitian=True) @ down


@torch.no_grad()
def decompose(
    model: nn.Module,
    kinds: Iterable[Kind] = ("qk", "vo"),
    method: Method = "clover",
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> dict[str, tuple[Pair, Directions]]:
    """The directions of all pairs of a model.

    Args:
        model: a model of a known family, without adapters.
        kinds: which pairs.
        method: "clover": singular directions; "vanilla": coordinates as they are, in the order of the product of the
            norms on both sides.
        calibration: batches, keyword arguments of the model. With them moments of activations take the place of the
            weights that compute them: of a value those of what the output projection reads, of a key the centred ones.

    Returns:
        Name -> the pair and its directions.

    Raises:
        ValueError: if there is no such pair (queries and keys that are rotated are none).
    """
    wanted = set(kinds)
    pairs = [pair for pair in find_pairs(model) if pair.kind in wanted]
    for kind in wanted:
        if not any(pair.kind == kind for pair in pairs):
            raise ValueError(
                f"{kind}: expected pairs to decompose, found none in {type(model).__name__}"
                + ("; its queries and keys are rotated by their position" if kind == "qk" else "")
            )
    moments = {} if calibration is None else collect_moments(model, _probes(model, pairs), calibration)
    return {pair.name: (pair, _decompose(model, pair, method, moments)) for pair in pairs}


def _probes(model: nn.Module, pairs: list[Pair]) -> dict[str, Probe]:
    probes = {}
    for pair in pairs:
        partner = base_of(model.get_submodule(pair.partner.path))
        probes[f"{pair.name} beside"] = Probe(partner, pair.partner.reads, pair.partner.heads, pair.heads.dim)
        if pair.kind == "qk":
            own = base_of(model.get_submodule(pair.path))
            probes[pair.name] = Probe(own, False, pair.heads, pair.heads.dim)
    return probes


def _decompose(model: nn.Module, pair: Pair, method: Method, moments: Mapping[str, Moments]) -> Directions:
    module, size = base_of(model.get_submodule(pair.path)), pair.heads.dim
    reader = CloverLayer(module, "", pair.path)
    with onloaded(module):  # a key's bias drops out of softmax, a value's adds a constant
        g_in = gram(pair.heads.blocks(reader.transposed_weight(), size))
    with partner_weight(model, pair.partner) as (rows, bias):
        heads = pair.partner.heads
        g_out = gram(heads.blocks(rows, size), None if bias is None else heads.blocks(bias, size)).to(g_in.device)
    count, groups, seen = len(g_in), len(g_out) // len(g_in), None
    beside, own = moments.get(f"{pair.name} beside"), moments.get(pair.name)
    if pair.kind == "vo" and beside is not None:
        weight = g_in.repeat_interleave(groups, dim=0)
        seen = shrink(beside.second.to(g_in), weight, beside.tokens)
        g_in = per_key_value_head(seen, count, groups)
    elif beside is not None and own is not None:
        g_in = shrink(own.covariance.to(g_in), g_in, own.tokens)
        g_out = shrink(beside.second.to(g_in), g_out, beside.tokens)
    g_out = per_key_value_head(g_out, count, groups)
    if method == "vanilla":
        return _coordinates(g_in, g_out)
    bases = pair_bases(g_in, g_out)
    assert bases.back is not None  # a pair's never is the identity
    root = bases.singular_values.sqrt()
    down, back = root.unsqueeze(-1) * bases.coordinates, bases.back * root.unsqueeze(-2)
    return Directions(bases.singular_values, down, back, seen if groups > 1 else None)


def _coordinates(g_in: Tensor, g_out: Tensor) -> Directions:
    """The coordinates themselves, by the product of the norms on both sides."""
    norms = (g_in.diagonal(dim1=-2, dim2=-1) * g_out.diagonal(dim1=-2, dim2=-1)).sqrt()
    values, order = norms.sort(dim=-1, descending=True)
    down = nn.functional.one_hot(order, norms.shape[-1]).to(g_in)
    return Directions(values, down, down.mT)


@torch.no_grad()
def mask(model: nn.Module, found: Mapping[str, tuple[Pair, Directions]], ranks: Mapping[str, Tensor]) -> None:
    """Leave out all but the leading directions, in place, with every shape as it was: for analysis.

    Output projections read, and query projections write, what `Directions.maps` leaves of a head. All maps are made
    before any weight is changed.

    Args:
        model: the model that was decomposed.
        found: from `decompose`.
        ranks: name -> (H,), directions that every head keeps.

    Raises:
        ValueError: if ranks are missing, or more than there are directions.
    """
    maps = {}
    for name, (pair, directions) in found.items():
        kept, (count, size) = ranks.get(name), directions.values.shape
        if kept is None or kept.shape != (count,) or bool((kept < 0).any()) or bool((kept > size).any()):
            raise ValueError(f"{name}: expected {count} ranks from 0 to {size}, found {kept}")
        maps[name] = directions.maps(kept.to(directions.values.device), pair.partner.heads.count // count)
    for name, (pair, _) in found.items():
        module: Any = base_of(model.get_submodule(pair.partner.path))
        reader = CloverLayer(module, "", pair.partner.path)
        rows = reader.transposed_weight()  # (in, out), a view
        p = maps[name]
        sides = [rows.mT] if pair.partner.reads else [rows, *([module.bias] if module.bias is not None else [])]
        for side in sides:
            heads = pair.partner.heads.heads(side)
            flat = heads.reshape(*side.shape[:-1], pair.partner.heads.count, pair.heads.dim)
            changed = torch.einsum("...gd,gde->...ge", flat.to(p), p)
            heads.copy_(changed.reshape(heads.shape))
