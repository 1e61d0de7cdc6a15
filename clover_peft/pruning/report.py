"""What `prune` did, for people and for JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..io.tables import markdown_table
from .directions import Method
from .pairs import Kind


@dataclass(frozen=True)
class PrunedPair:
    """What was done to one pair of projections.

    Attributes:
        kind: "qk" or "vo".
        size: width of a head before.
        before: directions that every key-value head had, without those that padded it.
        kept: directions that every key-value head keeps.
        width: of all its heads, after those with fewer directions were padded.
        energy: share of the sum of squared singular values that each head keeps.
    """

    kind: Kind
    size: int
    before: list[int]
    kept: list[int]
    width: int
    energy: list[float]


@dataclass(frozen=True)
class PruningReport:
    """What `prune` did.

    Attributes:
        method: "clover" or "vanilla".
        rule: how ranks were chosen, and its figure for each kind of pair.
        calibrated: whether moments of activations were used.
        sequential: whether each layer was fitted to what the pruned ones before it pass on.
        masked: whether directions were zeroed, with all shapes as they were.
        pairs: name of a pair -> what was done to it.
        skipped: kind of pair -> why nothing was done to it.
        parameters: of the model, before and after.
        cache_bytes: of keys and values, for a token, in the dtype of the weights, before and after.
        seconds: that it took, with calibration where batches were given.
    """

    method: Method
    rule: dict[str, Any]
    calibrated: bool
    sequential: bool
    masked: bool
    pairs: dict[str, PrunedPair]
    skipped: dict[Kind, str]
    parameters: tuple[int, int]
    cache_bytes: tuple[int, int]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """A Markdown table of how ranks were chosen, what was removed, and what that saves."""
        rule = ", ".join(f"{name} {value}" for name, value in self.rule.items())
        how = [self.method, rule, "calibrated" if self.calibrated else "by weights alone"]
        rows = [[", ".join([*how, *(["sequential"] if self.sequential else [])]), "", "", ""]]
        rows.append(["parameters", *_change(*self.parameters)])
        if any(self.cache_bytes):
            rows.append(["KV cache, bytes a token", *_change(*self.cache_bytes)])
        for kind in sorted({pair.kind for pair in self.pairs.values()}):
            pairs = [pair for pair in self.pairs.values() if pair.kind == kind]
            before = sum(sum(pair.before) for pair in pairs)
            rows.append([f"{kind} directions", *_change(before, sum(sum(pair.kept) for pair in pairs))])
            sizes = (sum(pair.size * len(pair.kept) for pair in pairs), sum(p.width * len(p.kept) for p in pairs))
            rows.append([f"{kind} directions, padding counted", *_change(*sizes)])
            energy = [share for pair in pairs for share in pair.energy]
            widths = (_span(pair.size for pair in pairs), _span(pair.width for pair in pairs))
            rows.append([f"{kind} width of a head", *widths, ""])
            least = f"{sum(energy) / len(energy):.1%}, {min(energy):.1%}"
            rows.append([f"{kind} energy, mean and least", "", least, ""])
        return markdown_table(["", "before", "after", "removed"], rows)

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the ranks of all heads (needs matplotlib)."""
        from .figures import plot_report

        plot_report(self, path)

    def removed(self, kind: Kind) -> float:
        """The share of directions of this kind that was removed; padding counts as removed, and costs as if it was not
        (`parameters` and `cache_bytes` say what is saved). 0 if the kind was not pruned.

        Raises:
            ValueError: if there is no such kind.
        """
        if kind not in ("qk", "vo"):
            raise ValueError(f"kind: expected 'qk' or 'vo', found {kind!r}")
        pairs = [pair for pair in self.pairs.values() if pair.kind == kind]
        before = sum(sum(pair.before) for pair in pairs)
        return 1 - sum(sum(pair.kept) for pair in pairs) / before if before else 0.0


def _span(sizes: Iterable[int]) -> str:
    low, *_, high = sorted([*sizes] * 2)
    return str(low) if low == high else f"{low} to {high}"


def _change(before: int, after: int) -> list[str]:
    return [f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}" if before else "-"]
