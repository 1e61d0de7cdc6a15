"""The report of a pruning: a table for people, and JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from ..io.report import Report
from ..io.tables import markdown_table
from .directions import Method
from .figures import HeatMap, plot_heat_maps
from .pairs import Kind

_LEGEND = (
    "qk: query-key pairs, vo: value-output pairs. Padding: zeros that give all heads of a layer one width. Energy: "
    "the sum of a head's squared singular values."
)


@dataclass(frozen=True)
class PrunedPair:
    """The change to one pair of projections.

    Attributes:
        kind: "qk" or "vo".
        size: width of a head before pruning.
        before: directions that every key-value head had, without padding.
        kept: directions that every key-value head keeps.
        width: width of all heads after pruning; heads with fewer directions are padded to it.
        energy: share of its sum of squared singular values that each head keeps.
    """

    kind: Kind
    size: int
    before: list[int]
    kept: list[int]
    width: int
    energy: list[float]


@dataclass(frozen=True)
class PruningReport(Report):
    """The result of `prune`.

    Attributes:
        method: "clover" or "vanilla".
        rule: the rule that chose the ranks, and its number for each kind of pair.
        calibrated: whether moments of activations were used.
        masked: whether directions were zeroed and all shapes kept.
        pairs: name of a pair -> the change to it.
        skipped: kind of pair -> the reason why it was not pruned.
        parameters: number of the model's parameters, before and after.
        cache_bytes: bytes of keys and values for a token, in the dtype of the weights, before and after.
        seconds: duration; it includes calibration if `prune` was given batches.
    """

    method: Method
    rule: dict[str, Any]
    calibrated: bool
    masked: bool
    pairs: dict[str, PrunedPair]
    skipped: dict[Kind, str]
    parameters: tuple[int, int]
    cache_bytes: tuple[int, int]
    seconds: float

    def summary(self) -> str:
        """A Markdown table of the rule for the ranks, the directions and the sizes before and after; and a legend."""
        rows = [
            [
                f"{self.method}, {_rule(self.rule)}, {'with data' if self.calibrated else 'by weights alone'}",
                "",
                "",
                "",
            ]
        ]
        rows.append(["parameters", *_change(*self.parameters)])
        if any(self.cache_bytes):
            rows.append(["KV cache, bytes a token", *_change(*self.cache_bytes)])
        for kind in sorted({pair.kind for pair in self.pairs.values()}):
            pairs = [pair for pair in self.pairs.values() if pair.kind == kind]
            before = sum(sum(pair.before) for pair in pairs)
            rows.append([f"{kind} directions", *_change(before, sum(sum(pair.kept) for pair in pairs))])
            sizes = (sum(pair.size * len(pair.kept) for pair in pairs), sum(p.width * len(p.kept) for p in pairs))
            rows.append([f"{kind} directions with padding", *_change(*sizes)])
            widths = (_span(pair.size for pair in pairs), _span(pair.width for pair in pairs))
            rows.append([f"{kind} width of a head, with padding", *widths, ""])
            energy = [share for pair in pairs for share in pair.energy]
            rows.append([f"{kind} energy that heads keep, mean", "100%", f"{sum(energy) / len(energy):.1%}", ""])
            rows.append([f"{kind} energy that heads keep, least", "100%", f"{min(energy):.1%}", ""])
        return f"{markdown_table(['', 'before', 'after', 'removed'], rows)}\n\n{_LEGEND}"

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw heat maps, layer x key-value head, for each kind of pair (needs matplotlib).

        The upper one shows the share of directions that each head keeps, the lower one the share of its energy, the
        sum of squared singular values.

        Args:
            path: the picture, in any format that matplotlib writes.

        Raises:
            ValueError: if matplotlib is not installed.
        """
        columns = []
        for kind in sorted({pair.kind for pair in self.pairs.values()}):
            pairs = {name: pair for name, pair in self.pairs.items() if pair.kind == kind}
            paths = [name.rpartition(" (")[0] for name in pairs]
            kept = [[rank / pair.size for rank in pair.kept] for pair in pairs.values()]
            energy = [pair.energy for pair in pairs.values()]
            title = f"{kind}: directions kept, {1 - self.removed(kind):.1%} in all"
            columns.append([HeatMap(title, paths, kept), HeatMap(f"{kind}: energy kept", paths, energy)])
        data = "with data" if self.calibrated else "by weights alone"
        plot_heat_maps(columns, f"{self.method}, {data}, {self.rule['ranks']} ranks", path)

    def removed(self, kind: Kind) -> float:
        """The share of directions of this kind that was removed; 0 if the kind was not pruned.

        Padding counts as removed although it takes space; `parameters` and `cache_bytes` show what is saved.

        Args:
            kind: "qk" or "vo".

        Raises:
            ValueError: if the kind is unknown.
        """
        if kind not in ("qk", "vo"):
            raise ValueError(f"kind: expected 'qk' or 'vo', found {kind!r}")
        return share_removed(self.pairs, kind)


def share_removed(pairs: Mapping[str, PrunedPair], kind: Kind) -> float:
    """The share of the directions of a kind's pairs that goes; 0 without any."""
    of_kind = [pair for pair in pairs.values() if pair.kind == kind]
    before = sum(sum(pair.before) for pair in of_kind)
    return 1 - sum(sum(pair.kept) for pair in of_kind) / before if before else 0.0


def _rule(rule: dict[str, Any]) -> str:
    """The rule for the ranks as text, such as "ratio vo=0.25, ranks by layer"."""
    if rule["ranks"] == "given":
        return "ranks given"
    figure = rule["figure"]
    shown = ", ".join(f"{kind}={value}" for kind, value in figure.items()) if isinstance(figure, dict) else str(figure)
    return (
        f"{rule['ranks']} {shown}"
        if rule["ranks"] in ("threshold", "energy")
        else f"ratio {shown}, ranks by {rule['ranks']}"
    )


def _span(sizes: Iterable[int]) -> str:
    low, *_, high = sorted([*sizes] * 2)
    return str(low) if low == high else f"{low} to {high}"


def _change(before: int, after: int) -> list[str]:
    return [f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}" if before else "-"]
