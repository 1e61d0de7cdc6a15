"""The report of a conversion to latent attention: a table for people, JSON, and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from ..io.figures import find_pyplot
from ..io.report import Report
from ..io.tables import markdown_table
from .rotary import Method


@dataclass(frozen=True)
class ConvertedLayer:
    """The change to one layer's attention.

    Errors are relative: the norm of the change of the attention block's output over the output's norm, on calibration
    data, with the original model's hidden states as input.

    Attributes:
        rotation_error: of the rotation of keys across heads, which is exact but for rounding.
        selection_error: after most pairs lost their rotation.
        latent_error: of the final layer. With "clover" it is fitted to what the narrow layers before it return, which
            is not the original's.
        worth: of each component, what its rotation is worth: the squared scores that are lost without it, or with
            "transmla" the energy of its keys.
    """

    rotation_error: float
    selection_error: float
    latent_error: float
    worth: list[float]


@dataclass(frozen=True)
class ConversionReport(Report):
    """The result of `convert_to_mla`.

    Attributes:
        method: "clover" or "transmla".
        rope_dims: dimensions of the shared rotary key.
        kv_lora_rank: dimensions of the latent.
        rotated: the components of keys that keep a rotation, counted through all frequencies, fast to slow.
        frequencies: inverse frequency of each, in radians a token.
        rope_type: of the result; servers with code of their own may know "default" alone.
        layers: what happened to each layer.
        parameters: number of the model's parameters, before and after.
        cache_bytes: bytes of the key-value cache for a token, measured in the cache that each model fills.
        tokens: of calibration data.
        seconds: duration of each stage.
    """

    method: Method
    rope_dims: int
    kv_lora_rank: int
    rotated: list[int]
    frequencies: list[float]
    rope_type: str
    layers: list[ConvertedLayer]
    parameters: tuple[int, int]
    cache_bytes: tuple[int, int]
    tokens: int
    seconds: dict[str, float]

    def summary(self) -> str:
        """A Markdown table: the sizes before and after, and the error of each stage."""
        rows = [[f"{self.method}, {self.rope_dims} rotary dimensions, latent of {self.kv_lora_rank}", "", "", ""]]
        for name, (before, after) in (("parameters", self.parameters), ("KV cache, bytes a token", self.cache_bytes)):
            rows.append([name, f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}"])
        for name in ("rotation", "selection", "latent"):
            errors = [getattr(layer, f"{name}_error") for layer in self.layers]
            rows.append(
                [f"{name} error, mean and most", "", f"{sum(errors) / len(errors):.2g}, {max(errors):.2g}", ""]
            )
        rows.append(["seconds", "", f"{sum(self.seconds.values()):.1f}", ""])
        return markdown_table(["", "before", "after", "removed"], rows)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw which pairs kept their rotation, and the error of each stage (needs matplotlib).

        The heat map shows what the rotation of each component of the keys is worth in each layer. Components are
        ordered by frequency, and at one frequency by worth; a dot shows that a component keeps a rotation.

        Args:
            path: the picture, in any format that matplotlib writes.

        Raises:
            ValueError: if matplotlib is not installed.
        """
        pyplot = find_pyplot()
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 1.8 + 0.16 * len(self.layers)), width_ratios=[3, 1])
        rows = [[max(worth, 1e-12) for worth in layer.worth] for layer in self.layers]
        image = left.imshow(rows, aspect="auto", interpolation="nearest", norm="log", vmin=max(map(max, rows)) * 1e-6)
        figure.colorbar(image, ax=left)
        dots = [(x, y) for y in range(len(self.layers)) for x in self.rotated]
        left.plot(*zip(*dots, strict=True), "r.", markersize=3)
        title = f"worth of rotation; the {self.rope_dims // 2} of {len(rows[0])} that keep one"
        left.set(title=title, xlabel="component, fast to slow", ylabel="layer")
        for name in ("rotation", "selection", "latent"):
            errors = [max(getattr(layer, f"{name}_error"), 1e-9) for layer in self.layers]
            right.plot(errors, range(len(errors)), label=name)
        right.invert_yaxis()
        right.set(title="relative error of attention", xscale="log", xlabel="error", ylabel="layer")
        right.legend()
        figure.suptitle(f"{self.method}: {self.rope_dims} rotary dimensions, latent of {self.kv_lora_rank}")
        figure.tight_layout()
        figure.savefig(Path(path), dpi=150, bbox_inches="tight")
        pyplot.close(figure)
