"""The report of a slicing: a table for people, and JSON."""

from __future__ import annotations

from dataclasses import dataclass

from ..io.report import Report
from ..io.tables import markdown_table


@dataclass(frozen=True)
class SlicingReport(Report):
    """The result of `slice_hidden_size`.

    Attributes:
        rotation: "per_block" or "shared".
        stock: whether the model's own class describes the result, so that it loads without `clover_peft`.
        width: hidden size, before and after.
        energy: path of a norm -> share of the second moment of the normalised stream there that was kept.
        parameters: number of the model's parameters, before and after. The head is untied, which can add more than
            slicing removes.
        tokens: that the moments were made of.
        seconds: duration, calibration included.
    """

    rotation: str
    stock: bool
    width: tuple[int, int]
    energy: dict[str, float]
    parameters: tuple[int, int]
    tokens: int
    seconds: float

    def summary(self) -> str:
        """A Markdown table: sizes before and after, and the energy kept."""
        shares = list(self.energy.values())
        rows = [[f"{self.rotation}, {self.tokens:,} tokens", "", "", ""]]
        for name, (before, after) in {"hidden size": self.width, "parameters": self.parameters}.items():
            rows.append([name, f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}"])
        rows.append(
            ["energy, mean and least of all blocks", "", f"{sum(shares) / len(shares):.2%}, {min(shares):.2%}", ""]
        )
        return markdown_table(["", "before", "after", "removed"], rows)
