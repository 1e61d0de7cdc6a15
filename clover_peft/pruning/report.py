"""What `prune` did, for people and for JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from .directions import Method
from .pairs import Kind


@dataclass(frozen=True)
class PrunedPair:
    """What was done to one pair of projections.

    Attributes:
        kind: "qk" or "vo".
        size: directions of a head before.
        kept: directions that every key-value head keeps.
        width: of all its heads, after those with fewer directions were padded.
        energy: share of the sum of squared singular values that each head keeps.
    """

    kind: Kind
    size: int
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
        seconds: that it took, calibration included.
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
        rows = [["", "before", "after", "removed"], ["---", "---:", "---:", "---:"]]
        rows.append([", ".join([*how, *(["sequential"] if self.sequential else [])]), "", "", ""])
        rows.append(["parameters", *_change(*self.parameters)])
        if any(self.cache_bytes):
            rows.append(["KV cache, bytes a token", *_change(*self.cache_bytes)])
        for kind in sorted({pair.kind for pair in self.pairs.values()}):
            pairs = [pair for pair in self.pairs.values() if pair.kind == kind]
            before = sum(pair.size * len(pair.kept) for pair in pairs)
            rows.append([f"{kind} directions", *_change(before, sum(sum(pair.kept) for pair in pairs))])
            padded = sum(pair.width * len(pair.kept) for pair in pairs)
            rows.append([f"{kind} directions, padding counted", *_change(before, padded)])
            narrowest, widest = min(pair.width for pair in pairs), max(pair.width for pair in pairs)
            width = str(widest) if narrowest == widest else f"{narrowest} to {widest}"
            energy = [share for pair in pairs for share in pair.energy]
            rows.append([f"{kind} width of a head", str(pairs[0].size), width, ""])
            least = f"{sum(energy) / len(energy):.1%}, {min(energy):.1%}"
            rows.append([f"{kind} energy, mean and least", "", least, ""])
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the ranks of all heads (needs matplotlib)."""
        from .pictures import plot_report

        plot_report(self, path)

    def removed(self, kind: Kind) -> float:
        """The share of directions of this kind that was removed; padding counts as removed, and costs as if it was not
        (`parameters` and `cache_bytes` say what is saved). 0 if the kind was not pruned."""
        pairs = [pair for pair in self.pairs.values() if pair.kind == kind]
        if not pairs:
            return 0.0
        return 1 - sum(sum(p.kept) for p in pairs) / sum(p.size * len(p.kept) for p in pairs)


def _change(before: int, after: int) -> list[str]:
    return [f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}" if before else "-"]
