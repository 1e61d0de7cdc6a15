"""The pairs of projections that meet inside a model's heads, and what data can say of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
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
        kind: "vo" (value and output) or "qk" (query and key, or the part of them that no position is put into).
        path: the value or key projection.
        heads: its features, H heads of d.
        partner: the output or query projection, with G heads, a multiple of H.
        attention: the attention block that both belong to, shared by all its pairs.
    """

    kind: Kind
    path: str
    heads: HeadSlice
    partner: Partner
    attention: AttentionBlock = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """Unique in a model: a fused projection has both kinds."""
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
        """Whether its path is matched by a regular expression, or has one of several ends; None names all."""
        if isinstance(target_modules, str):
            try:
                return re.fullmatch(target_modules, self.path) is not None
            except re.error as error:
                raise ValueError(
                    f"target_modules={target_modules!r}: expected a regular expression, found one that says: {error}"
                ) from error
        ends = target_modules
        return ends is None or any(self.path == end or self.path.endswith("." + end) for end in ends)


def find_pairs(model: nn.Module) -> list[Pair]:
    """All pairs of a model that the table of architectures knows, modules that layers share once."""
    attentions: dict[str, AttentionBlock] = {}
    pairs: dict[tuple[int, str], Pair] = {}
    for path, name in default_targets(model).items():
        attention = attention_block(model, path)
        if attention is None:  # an up-projection
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
    there: Sequence[Pair],
    kinds: Iterable[Kind] | None = None,
    target_modules: str | Sequence[str] | None = None,
) -> list[Pair]:
    """The pairs of these kinds.

    Args:
        model: a model of a known family, without adapters.
        there: all its pairs, from `find_pairs`.
        kinds: "qk", "vo" or both; None for those that the model has and `target_modules` names.
        target_modules: which pairs, by the path of the key or value projection: a regular expression that matches all
            of it, or ends of paths; None for all.

    Raises:
        ValueError: if there is none of some kind (queries and keys that are rotated are none).
    """
    present = {pair.kind for pair in there}
    wanted = present if kinds is None else set(kinds)
    if not present or wanted - present:
        absent = ", ".join(sorted(wanted - present)) or type(model).__name__
        raise ValueError(
            f"{absent}: expected pairs of projections, found none in {type(model).__name__}"
            + ("; its queries and keys are rotated by their position" if absent == "qk" else "")
        )
    chosen = [pair for pair in there if pair.kind in wanted and pair.is_named(target_modules)]
    missing = sorted(wanted - {pair.kind for pair in chosen})
    if missing and (kinds is not None or not chosen):
        first = [f"{next(p.path for p in there if p.kind == kind)}, ... ({kind})" for kind in missing]
        raise ValueError(
            f"target_modules={target_modules!r}: expected it to name a pair, found none; they are called "
            + ", ".join(first)
        )
    return chosen


def beside_name(pair: Pair) -> str:
    """The name of a pair's partner among its probes."""
    return f"{pair.name} with {pair.partner.path}"


def probes(pairs: Iterable[Pair]) -> dict[str, Probe]:
    """What data can say of pairs: of each what its partner reads or computes, of a key what it computes itself."""
    found = {}
    for pair in pairs:
        size, partner = pair.heads.dim, pair.partner
        found[beside_name(pair)] = Probe(pair.partner_projection, partner.reads, partner.heads, size)
        if pair.kind == "qk":
            found[pair.name] = Probe(pair.projection, False, pair.heads, size)
    return found


def check_plain(model: nn.Module) -> None:
    """Raises TypeError if this is no model, and ValueError if it has adapters, or weights that are not in memory."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, found {type(model).__name__}; load the model first")
    for path, module in model.named_modules():  # the model itself comes first
        if isinstance(module, (PeftModel, BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise ValueError(
                f"{path or 'model'}: expected a model without adapters, found {type(module).__name__}; call "
                "merge_and_unload() or unload() first"
            )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__}: expected all weights in memory, found some offloaded or on the meta device; "
            "load it without offloading"
        )
