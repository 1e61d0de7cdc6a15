"""The rule for ranks that `prune`'s arguments describe: checked, and applied to singular values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from ..base_model.resolve import attention_blocks
from . import ranks as rules
from .directions import Found, check_ranks
from .pairs import Kind, Pair

Rule = Literal["global", "gradient", "layer", "uniform"]
SPREADS: tuple[Rule, ...] = get_args(Rule)
_RULES: dict[str, Callable[[rules.Spectra, Any], rules.Ranks]] = {
    "global": rules.global_ratio,
    "gradient": rules.by_layer,  # applied to weighted values; a kind without weights is treated as by "layer"
    "layer": rules.by_layer,  # applied to values relative to the layer's
    "uniform": rules.uniform,
    "threshold": rules.threshold,
    "energy": rules.energy,
}


@dataclass(frozen=True)
class RankRule:
    """A rule for ranks.

    Attributes:
        name: one of `Rule`, or "threshold", "energy" or "given".
        figures: the ratio, threshold or share, one for all kinds of pairs or one for each.
        given: name of a pair -> its ranks.
    """

    name: str
    figures: float | Mapping[Kind, float] | None = None
    given: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def kinds(self) -> list[Kind] | None:
        """The kinds of pairs that the rule names; None for all."""
        if self.name == "given":
            return sorted({cast(Kind, name.rpartition("(")[2].rstrip(")")) for name in self.given})
        return sorted(self.figures) if isinstance(self.figures, Mapping) else None

    def ranks(self, kind: Kind, spectra: rules.Spectra) -> rules.Ranks:
        """Ranks of all heads of one kind of pair."""
        if self.name == "given":
            return {name: torch.tensor(list(self.given[name])) for name in spectra}
        figure = self.figures[kind] if isinstance(self.figures, Mapping) else self.figures
        return _RULES[self.name](spectra, figure)

    def ratios(self, kinds: Iterable[Kind]) -> dict[Kind, float]:
        """Kind of pair -> the share to remove; empty if the rule does not state shares."""
        if self.name not in SPREADS or self.figures is None:
            return {}
        return {k: self.figures[k] if isinstance(self.figures, Mapping) else self.figures for k in kinds}

    def to_dict(self) -> dict[str, Any]:
        """The rule for the report and the model's config."""
        if self.name == "given":
            return {"ranks": "given"}
        return {
            "ranks": self.name,
            "figure": dict(self.figures) if isinstance(self.figures, Mapping) else self.figures,
        }


def default_spread(model: nn.Module) -> Rule:
    """The rule that `prune` spreads a ratio by where none is named.

    Values of a causal language model's heads grow from layer to layer, so that one threshold removes whole layers:
    SmolLM2-135M without half of V-O has 22 times its perplexity by "global", and 1.3 times by "layer". In encoders and
    encoder-decoders they do not, and "global" is best or close to it (benchmarks/results/pruning_smollm2-7,
    pruning_minilm-7 and pruning_whisper-8).
    """
    causal = any(block.is_causal for block in attention_blocks(model).values())
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return "layer" if causal and not both else "global"


def choose_rule(
    ratio: float | Mapping[Kind, float] | None,
    ranks: Rule | Mapping[str, Sequence[int]],
    threshold: float | Mapping[Kind, float] | None,
    energy: float | Mapping[Kind, float] | None,
) -> RankRule:
    """The rule that `prune`'s arguments of these names describe.

    Raises:
        ValueError: if an argument is not a valid number, or they describe more than one rule.
    """
    figures = {n: _plain(n, figure) for n, figure in (("ratio", ratio), ("threshold", threshold), ("energy", energy))}
    given = [name for name, figure in figures.items() if figure is not None]
    if not isinstance(ranks, str):
        given.append("ranks by name")
    if len(given) > 1:
        raise ValueError(f"expected one rule for ranks, found {' and '.join(given)}; pass one of them")
    check_figures(figures)
    if not isinstance(ranks, str):
        for name, each in ranks.items() if isinstance(ranks, Mapping) else [("ranks", ranks)]:
            whole = isinstance(each, Sequence) and all(map(_is_count, each))
            if not whole or not isinstance(name, str):
                raise ValueError(f"ranks: expected whole numbers by name of a pair, found {name!r}: {each!r}")
        if not ranks:
            raise ValueError("ranks: expected ranks by name of a pair, found none")
        return RankRule("given", given=ranks)
    if ranks not in SPREADS:
        raise ValueError(f"ranks: expected {', '.join(map(repr, SPREADS))} or ranks by name, found {ranks!r}")
    if ranks != "global" and (threshold is not None or energy is not None):
        raise ValueError(f"ranks={ranks!r}: expected a ratio to spread, found {given[0]}")
    for name in ("threshold", "energy"):
        if figures[name] is not None:
            return RankRule(name, figures[name])
    return RankRule(ranks, 0.5 if ratio is None else figures["ratio"])


def check_figures(figures: Mapping[str, float | Mapping[Kind, float] | None]) -> None:
    """Raises ValueError if a "ratio", "threshold" or "energy" is out of its range."""
    for name, figure in figures.items():
        if isinstance(figure, Mapping) and (not figure or set(figure) - {"qk", "vo"}):
            raise ValueError(f"{name}: expected a figure for 'qk', for 'vo' or for both, found {dict(figure)}")
        shares = figure.values() if isinstance(figure, Mapping) else [] if figure is None else [figure]
        for share in shares:
            if name == "threshold" and not 0 <= share < float("inf"):
                raise ValueError(f"threshold: expected a singular value, found {share}")
            if name != "threshold":
                rules.check_share(name, share, whole=name == "energy")


def _plain(name: str, figure: Any) -> float | dict[Kind, float] | None:
    """A number, or numbers by kind of pair, as Python's own floats, which a config can hold."""
    try:
        if isinstance(figure, Mapping):
            return {kind: _number(value) for kind, value in figure.items()}
        return None if figure is None else _number(figure)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected a number, or one for each kind of pair, found {figure!r}") from error


def _is_count(rank: Any) -> bool:
    return isinstance(rank, Integral) and not isinstance(cast(Any, rank), bool)


def _number(figure: Any) -> float:
    if isinstance(figure, (str, bytes)):
        raise TypeError("a number in quotes")
    return float(figure)


def check_pairs(rule: RankRule, pairs: Iterable[Pair], multiple: int) -> None:
    """Check a rule against the heads of these pairs, before any data are read.

    Raises:
        ValueError: if the given ranks, or the multiple to round to, exceed the heads' directions.
    """
    if rule.given and multiple > 1:
        raise ValueError(f"multiple={multiple}: expected ranks that a rule chooses, found given ones; round those")
    for pair in pairs:
        if multiple > pair.heads.dim:
            raise ValueError(
                f"multiple: expected at most the {pair.heads.dim} directions of {pair.name}, found {multiple}"
            )
        if pair.name in rule.given:
            check_ranks(pair.name, rule.given[pair.name], pair.heads.count, pair.heads.dim)


def choose_ranks(found: Found, rule: RankRule, multiple: int, weights: Mapping[str, float]) -> rules.Ranks:
    """The ranks of all heads by a rule.

    Args:
        found: from `decompose`.
        rule: from `choose_rule`.
        multiple: see `ranks.rounded`.
        weights: name of a value-output pair -> factor of its values, for "gradient".

    Returns:
        Name of a pair -> (H,) ranks.

    Raises:
        ValueError: if a kind of pair would keep no direction.
    """
    kept: rules.Ranks = {}
    for kind in sorted({pair.kind for pair, _ in found.values()}):
        spectra = {
            name: directions.values * weights.get(name, 1.0)
            for name, (pair, directions) in found.items()
            if pair.kind == kind
        }
        if rule.name == "layer" or (rule.name == "gradient" and not weights.keys() & spectra.keys()):
            spectra = {name: values / values.norm().clamp(min=1e-300) for name, values in spectra.items()}
        of_kind = rules.rounded(rule.ranks(kind, spectra), spectra, multiple)
        if rule.name != "given" and not any(bool(part.any()) for part in of_kind.values()):
            raise ValueError(f"{kind}: expected a rule that keeps some direction, found none kept by {rule.to_dict()}")
        kept |= of_kind
    return {name: kept[name] for name in found}
