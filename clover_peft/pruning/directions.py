"""The directions of attention heads in the order of their singular values, and the maps that keep the leading ones.

A head computes `W_o W_v x = V S U^T x` (Eq. 3, arXiv 2411.17426). Keeping r of its directions is a map of the head's
own features z (ours): `P = E_r C_r`, where `C z = S^1/2 U^T x`, `W_o E = V S^1/2` and `E C = I` at full rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..base_model.weight import base_of, base_weight, partner_weight
from ..io.user_warning import warn
from ..linalg.decomposition import gram, pair_bases
from ..linalg.moments import Moments, pair_grams
from .across_heads import balance, fit_back, fit_down, joint_moments
from .calibration import Calibration, measure
from .pairs import Kind, Pair, beside_name, find_pairs, select_pairs

Method = Literal["clover", "vanilla"]


@dataclass(frozen=True)
class OutputFit:
    """What an output projection reads and writes, to which C and E of all its heads are fitted together.

    Attributes:
        own: (G, d, d) float64, second moments about the values' bias of the features that it reads from every query
            head, drawn towards the weights.
        together: moments of these features with all heads in one block of n = G d, as they were collected.
        point: (1, n) float64, the values' bias; zeros without one.
        gram: computes its Gram, (n, n) float64; None if the directions stay, and only E is fitted.
    """

    own: Tensor
    together: Moments
    point: Tensor
    gram: Callable[[], Tensor] | None

    def factors(self, down: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """C (H, d, d), from one whose removed rows are zero, and E (G, d, G, d)."""
        (joint,), tokens = self.together.about(self.point).to(self.own), self.together.tokens
        half = self.together.half
        part = None if half is None else (half.about(self.point).to(self.own)[0], half.tokens)
        moments = joint_moments(self.own, joint, tokens, part)
        if self.gram is None:
            return down, fit_back(down.repeat_interleave(groups, dim=0), moments)
        gram = self.gram().to(moments)
        down = fit_down(down, moments, gram, groups)
        back = fit_back(down.repeat_interleave(groups, dim=0), moments)
        return balance(down, back, moments, gram, groups)


@dataclass(frozen=True)
class Directions:
    """The directions of a pair's heads, most important first.

    Attributes:
        values: (H, d) float64, descending: singular values, or importances of coordinates.
        down: (H, d, d) float64, C: maps a head's features to their coordinates along its directions.
        back: (H, d, d) float64, E: maps these coordinates back to features; `back @ down = I`.
        bias: (G, d) float64, the bias of the value projection for every query head. It is a constant in the features
            that the output projection reads, so the part along removed directions moves into the output's bias. None
            if there is no bias, or it cannot move.
        fit: what C and E of a value and output are fitted to; None for queries and keys, and without moments.
    """

    values: Tensor
    down: Tensor
    back: Tensor
    bias: Tensor | None = None
    fit: OutputFit | None = None

    def factors(self, ranks: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """C and E, with the trailing directions zeroed.

        Under grouped-query attention the query heads of a group share one C. With moments, C and E of a value and
        output are those of all heads together that change the output least: one head makes up for directions that
        another has lost (`across_heads`, ours).

        Args:
            ranks: (H,), the number of directions that every head keeps.
            groups: query heads that share a key-value head.

        Returns:
            C (H, d, d), whose rows beyond a head's rank are zero, and E (G, d, d), or (G, d, G, d) if all heads are
            fitted together, whose columns beyond it are zero; float64. C is the identity for a head that keeps all its
            directions, and E leaves its features as they are.
        """
        size = self.values.shape[1]
        eye = torch.eye(size, dtype=self.down.dtype, device=self.down.device)
        whole = (ranks.to(eye.device) == size).view(-1, 1, 1)
        kept = (torch.arange(size, device=self.down.device) < ranks.to(self.down.device).unsqueeze(1)).to(self.down)
        down = torch.where(whole, eye, kept.unsqueeze(-1) * self.down)
        if self.fit is not None and bool(kept.any()) and not bool(whole.all()):
            return self.fit.factors(down, groups)
        back = torch.where(whole, eye, self.back * kept.unsqueeze(1))
        return down, back.repeat_interleave(groups, dim=0)

    @staticmethod
    def product(down: Tensor, back: Tensor) -> Tensor:
        """`P = E C`, in E's shape: maps the features of every query head to what the kept directions tell of them."""
        each = down[:, : back.shape[-1]].repeat_interleave(len(back) // len(down), dim=0)
        return back @ each if back.ndim == 3 else torch.einsum("gdhr,hre->gdhe", back, each)

    def constant(self, down: Tensor, back: Tensor) -> Tensor | None:
        """(G, d), the part of the bias along removed directions, `(I - E C) b`; None without a bias."""
        if self.bias is None:
            return None
        p = self.product(down, back)
        kept = torch.einsum("gde,ge->gd" if p.ndim == 3 else "gdhe,he->gd", p, self.bias)
        return self.bias - kept

    def energy(self, ranks: Tensor) -> Tensor:
        """(H,), the leading directions' share of the sum of squared values; 1 if all values are zero."""
        squares = self.values.square()
        kept = torch.arange(squares.shape[1], device=squares.device) < ranks.to(squares.device).unsqueeze(1)
        total = squares.sum(1)
        return torch.where(total > 0, (squares * kept).sum(1) / total.clamp(min=1e-300), torch.ones_like(total))


def through(rows: Tensor, factor: Tensor) -> Tensor:
    """Rows (..., G, d) of an output projection times E, (G, d, r) or (G, d, G, r): (..., G, r)."""
    return torch.einsum("...gd,gdr->...gr" if factor.ndim == 3 else "...gd,gdhr->...hr", rows, factor)


Found = dict[str, tuple[Pair, Directions]]  # name of a pair -> the pair and its directions


@torch.inference_mode(False)
@torch.no_grad()
def decompose(
    model: nn.Module,
    kinds: Iterable[Kind] | None = None,
    method: Method = "clover",
    calibration: Iterable[Mapping[str, Any]] | Calibration | None = None,
    target_modules: str | Sequence[str] | None = None,
) -> Found:
    """The directions of a model's pairs.

    Args:
        model: a model of a known family, without adapters.
        kinds: "qk", "vo" or both; None for the kinds that the model has.
        method: "clover" uses singular directions; "vanilla" uses the coordinates themselves, ordered by the product of
            their norms on both sides.
        calibration: batches, each of the model's keyword arguments, or the result of `calibrate`. With it, moments of
            activations replace the Grams of the weights that compute them (`pair_grams`), and output projections are
            fitted to what stays (`Directions.factors`).
        target_modules: selects pairs, see `select_pairs`.

    Returns:
        Name of a pair -> the pair and its directions.

    Raises:
        ValueError: if no such pair exists (rotated queries and keys are no pair), or the method is unknown.
    """
    pairs = select_pairs(model, find_pairs(model), kinds, target_modules)
    return decompose_pairs(pairs, method, measure(model, pairs, calibration).moments)


def decompose_pairs(pairs: Iterable[Pair], method: Method, moments: Mapping[str, Moments]) -> Found:
    """The directions of these pairs.

    Args:
        pairs: from `find_pairs`.
        method: "clover" or "vanilla", see `decompose`.
        moments: moments by the names of `probes`; empty for directions by weights alone.

    Returns:
        Name of a pair -> the pair and its directions.

    Raises:
        ValueError: if the method is unknown, or a weight is not finite.
    """
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
    """The directions of one pair; see `decompose_pairs`."""
    size, model = pair.heads.dim, pair.attention.model
    reader = base_weight(model, pair.path)
    with reader.whole():  # The Gram has no bias: softmax ignores a key's, and a value's adds a constant.
        g_in, own_bias = gram(pair.heads.blocks(reader.transposed(), size)), reader.bias
        if own_bias is not None:
            own_bias = pair.heads.blocks(own_bias, size).to(g_in)
    with partner_weight(model, pair.partner) as other:
        g_out = other.gram(pair.partner.heads, size)
    bias = None
    if pair.kind == "vo" and own_bias is not None and _takes_bias(pair):
        bias = own_bias.repeat_interleave(pair.groups, dim=0)
    beside = moments.get(beside_name(pair))
    g_in, g_out, read = pair_grams(
        g_in,
        g_out,
        pair.heads.count,
        reads=pair.partner.reads,
        own=moments.get(pair.name),
        partner=beside.parts(pair.partner.heads.count) if beside is not None and pair.partner.reads else beside,
        constant=bias,  # The bias is known from the weights; the mean of these data is not that of later ones.
    )
    if read is not None:
        g_in = g_in / pair.groups  # The mean over the group, because `g_out` is the sum.
    fit = None
    if read is not None and beside is not None:
        point = torch.zeros_like(beside.mean) if bias is None else bias.to(beside.mean).view_as(beside.mean)
        fit = OutputFit(read, beside, point, partial(_output_gram, pair) if method == "clover" else None)
    if method == "vanilla":
        return replace(_coordinates(g_in, g_out), bias=bias, fit=fit)
    bases = pair_bases(g_in, g_out)
    assert bases.e is not None  # Only the basis of a single projection is the identity.
    root = bases.singular_values.sqrt()
    down, back = root.unsqueeze(-1) * bases.c, bases.e * root.unsqueeze(-2)
    return Directions(bases.singular_values, down, back, bias, fit)


def _takes_bias(pair: Pair) -> bool:
    """Whether a constant in the values can move into the output's bias.

    With attention sinks it cannot, because the attention weights do not add up to one. Multi-head Latent Attention
    gets no new bias, so that its own class still describes it.
    """
    if pair.attention.fact("sinks") is not None:
        return False
    return pair.attention.family.positions != "decoupled" or pair.partner_projection.bias is not None


def _coordinates(g_in: Tensor, g_out: Tensor) -> Directions:
    """The coordinates themselves, ordered by the product of their norms on both sides."""
    norms = (g_in.diagonal(dim1=-2, dim2=-1) * g_out.diagonal(dim1=-2, dim2=-1)).sqrt()
    values, order = norms.sort(dim=-1, descending=True)
    down = nn.functional.one_hot(order, norms.shape[-1]).to(g_in)
    return Directions(values, down, down.mT)


Factors = dict[str, tuple[Tensor, Tensor]]  # name of a pair -> C and E, see `Directions.factors`


def compute_factors(found: Found, ranks: Mapping[str, Tensor], release: bool = False) -> Factors:
    """The factors C and E of all pairs at these ranks; E only as wide as the widest head where it is (G, d, G, r).

    Args:
        found: from `decompose`.
        ranks: name of a pair -> (H,), the number of directions that every head keeps.
        release: give up the moments of every pair of `found` when its factors are made; without them, none can be
            made again.

    Raises:
        ValueError: if a pair has no ranks, or a rank exceeds the number of directions.
    """
    for name, (_, directions) in found.items():
        check_ranks(name, ranks.get(name), *directions.values.shape)
    factors = {}
    for name, (pair, directions) in tqdm(found.items(), desc="CLOVER directions", unit=" pairs", delay=3, leave=False):
        down, back = directions.factors(ranks[name], pair.groups)
        if back.ndim == 4:
            back = back[..., : int(ranks[name].max())].clone()
        factors[name] = (down, back)
        if release:
            found[name] = (pair, replace(directions, fit=None))
    return factors


def _output_gram(pair: Pair) -> Tensor:
    """(n, n) float64, the Gram of the output projection over all heads."""
    with partner_weight(pair.attention.model, pair.partner) as output:
        return output.gram(pair.partner.heads, pair.partner.heads.features)[0]


def check_ranks(name: str, ranks: Sequence[int] | Tensor | None, count: int, size: int) -> None:
    """Raises ValueError unless there is one rank from 0 to `size` for each of `count` heads."""
    found = ranks.tolist() if isinstance(ranks, Tensor) else ranks
    if found is None or len(found) != count or not all(0 <= rank <= size for rank in found):
        raise ValueError(f"{name}: expected {count} ranks from 0 to {size}, found {found and list(found)}")


def write_masks(model: nn.Module, found: Found, factors: Factors) -> None:
    """What `mask` writes, from the factors of all pairs."""
    constants = {name: found[name][1].constant(*both) for name, both in factors.items()}
    for name, constant in constants.items():
        path = found[name][0].partner.path
        if constant is not None and bool(constant.any()) and base_of(model.get_submodule(path)).bias is None:
            warn(
                f"{path}: gets a bias for what removed directions leave, which the model's own class lacks, so that a "
                "saved model would lose it; use the masked model in memory alone"
            )
            break
    for name, (down, back) in factors.items():
        pair, directions = found[name]
        module: Any = base_of(model.get_submodule(pair.partner.path))
        rows = base_weight(model, pair.partner.path).transposed()  # (in, out), a view of the weight
        heads = pair.partner.heads
        p = directions.product(down, back)
        if (constant := constants[name]) is not None:
            lost = torch.einsum("ogd,gd->o", heads.blocks(rows.mT, pair.heads.dim).to(p), constant)
            _add_bias(module, lost)
        for side in [rows.mT] if pair.partner.reads else [rows, *([module.bias] if module.bias is not None else [])]:
            changed = through(heads.blocks(side, pair.heads.dim).to(p), p)
            place = heads.heads(side)
            place.copy_(changed.reshape(place.shape))


def _add_bias(module: Any, values: Tensor) -> None:
    """Add values to a projection's bias. A projection without a bias gets one, unless all values are zero."""
    if module.bias is None:
        if not bool(values.any()):
            return
        module.bias = nn.Parameter(torch.zeros_like(values, dtype=module.weight.dtype), module.weight.requires_grad)
    module.bias.add_(values.to(module.bias))
