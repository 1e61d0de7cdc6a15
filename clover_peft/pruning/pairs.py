"""The pairs of projections that meet inside a model's heads, and the activations to measure for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from ..base_model.activations import Probe
from ..base_model.attention import AttentionBlock
from ..base_model.resolve import attention_block, default_targets
from ..base_model.slices import HeadSlice, Partner
from ..base_model.weight import base_of

Kind = Literal["qk", "vo"]


@dataclass(frozen=True)
class Pair:
    """Two projections that meet inside a head with nothing between them.

    Attributes:
        kind: "vo" (value and output) or "qk" (query and key; under partial rotation their unrotated part).
        path: path of the value or key projection.
        heads: its features, H heads of d.
        partner: the output or query projection, with G heads, a multiple of H.
        attention: the attention block of both projections; all pairs of a block share it.
    """

    kind: Kind
    path: str
    heads: HeadSlice
    partner: Partner
    attention: AttentionBlock = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """Unique in a model; the kind tells the two pairs of a fused projection apart."""
        return f"{self.path} ({self.kind})"

    @property
    def groups(self) -> int:
        """Query heads that share a key-value head, G / H."""
        return self.partner.heads.count // self.heads.count

    @property
    def projection(self) -> Any:
        """The value or key projection itself."""
        return base_of(self.attention.model.get_submodule(self.path))

    @property
    def partner_projection(self) -> Any:
        """The output or query projection itself."""
        return base_of(self.attention.model.get_submodule(self.partner.path))

    def is_named(self, target_modules: str | Sequence[str] | None) -> bool:
        """Whether `target_modules` selects this pair.

        Args:
            target_modules: a regular expression for the whole path, or several ends of paths; None selects all pairs.

        Raises:
            ValueError: if the regular expression is invalid.
        """
        if isinstance(target_modules, str):
            try:
                return re.fullmatch(target_modules, self.path) is not None
            except re.error as error:
                raise ValueError(
                    f"target_modules={target_modules!r}: expected a regular expression, found an invalid one: {error}"
                ) from error
        ends = target_modules
        return ends is None or any(self.path == end or self.path.endswith("." + end) for end in ends)


def find_pairs(model: nn.Module) -> list[Pair]:
    """All pairs of a model of a known family. A projection that several layers share is listed once."""
    attentions: dict[str, AttentionBlock] = {}
    pairs: dict[tuple[int, str], Pair] = {}
    for path, name in default_targets(model).items():
        attention = attention_block(model, path)
        if attention is None:  # An up-projection has no heads.
            continue
        attention = attentions.setdefault(attention.path, attention)
        for part, heads in attention.layout(path, name).items():
            for target in attention.slices(part, heads) if part in ("k", "v") else ():
                if target.partner is not None:
                    kind: Kind = "vo" if part == "v" else "qk"
                    pair = Pair(kind, path, target.heads, target.partner, attention)
                    pairs.setdefault((id(pair.projection), kind), pair)
    return list(pairs.values())


def select_pairs(
    model: nn.Module,
    pairs: Sequence[Pair],
    kinds: Iterable[Kind] | None = None,
    target_modules: str | Sequence[str] | None = None,
) -> list[Pair]:
    """The pairs of these kinds that `target_modules` names.

    Args:
        model: a model of a known family, without adapters.
        pairs: all its pairs, from `find_pairs`.
        kinds: "qk", "vo" or both; None for the kinds that the model has and `target_modules` names.
        target_modules: selects pairs by the path of their key or value projection: a regular expression for the whole
            path, or a list of ends of paths; None selects all.

    Raises:
        ValueError: if a kind has no pair. Rotated queries and keys are no pair.
    """
    present = {pair.kind for pair in pairs}
    wanted = present if kinds is None else set(kinds)
    if not present or wanted - present:
        absent = ", ".join(sorted(wanted - present)) or type(model).__name__
        raise ValueError(
            f"{absent}: expected pairs of projections, found none in {type(model).__name__}"
            + ("; its queries and keys are rotated by their position, or normed" if absent == "qk" else "")
        )
    chosen = [pair for pair in pairs if pair.kind in wanted and pair.is_named(target_modules)]
    missing = sorted(wanted - {pair.kind for pair in chosen})
    if missing and (kinds is not None or not chosen):
        first = [f"{next(p.path for p in pairs if p.kind == kind)}, ... ({kind})" for kind in missing]
        raise ValueError(
            f"target_modules={target_modules!r}: expected it to name a pair, found none; they are called "
            + ", ".join(first)
        )
    return chosen


def beside_name(pair: Pair) -> str:
    """The name of a pair's partner among its probes."""
    return f"{pair.name} with {pair.partner.path}"


def probes(pairs: Iterable[Pair]) -> dict[str, Probe]:
    """The activations to measure for these pairs, by name.

    They are the input of an output projection, with all heads in one block, or the outputs of a query and of its key,
    head by head. Tokens are enough if they are enough for a head: `joint_moments` leaves out
    what heads may have in common by chance.
    """
    found = {}
    for pair in pairs:
        size, partner = pair.heads.dim, pair.partner
        heads = partner.heads.count if partner.reads else 1
        found[beside_name(pair)] = Probe(pair.partner_projection, partner.reads, partner.heads, heads * size, heads)
        if pair.kind == "qk":
            found[pair.name] = Probe(pair.projection, False, pair.heads, size)
    return found
