"""Pictures of ranks and of the spectra that ranks are chosen by (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..io.figures import canvas, find_pyplot
from .spectra import PairSpectra, labels

_MAX_TICKS = 40  # A heat map names at most this many rows.


class HeatMap(NamedTuple):
    """A heat map, layer x key-value head.

    Attributes:
        title: the text above it.
        paths: the projection of each row.
        rows: numbers from 0 to `most`; rows may have unequal lengths.
        most: the end of the colour scale.
    """

    title: str
    paths: Sequence[str]
    rows: Sequence[Sequence[float]]
    most: float = 1


def plot_heat_maps(columns: Sequence[Sequence[HeatMap]], title: str, path: str | PathLike[str]) -> None:
    """Draw heat maps in columns of equal length.

    Args:
        columns: the heat maps, from top to bottom.
        title: the text above all of them.
        path: the picture, in any format that matplotlib writes.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    pyplot = find_pyplot()
    height = _height(max(len(heat_map.rows) for column in columns for heat_map in column))
    size = (5 * len(columns), len(columns[0]) * height)
    figure, grid = pyplot.subplots(len(columns[0]), len(columns), figsize=size, squeeze=False)
    for axes_of_column, column in zip(grid.T, columns, strict=True):
        for axes, heat_map in zip(axes_of_column, column, strict=True):
            _draw(axes, heat_map)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(Path(path), dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def plot_spectra(
    found: Mapping[str, PairSpectra],
    folder: Path,
    ranks: Mapping[str, Tensor],
    titles: Mapping[str, str],
    layers: Sequence[int] | None = None,
) -> list[Path]:
    """Draw the spectra of some layers and the ranks of all of them.

    `spectra_qk.png` and `spectra_vo.png` show the singular values of each head beside the norms of its coordinates
    (figures 2, 7 and 8 of arXiv 2411.17426). `ranks.png` is a heat map of ranks, layer x key-value head.

    Args:
        found: from `measure_spectra`.
        folder: where the pictures are written.
        ranks: name of a pair -> (H,), the ranks of the heat map.
        titles: kind of pair -> title of its heat map.
        layers: the pairs of each kind to draw, counted from 0; None draws the first, the middle and the last.

    Returns:
        The paths of the pictures.

    Raises:
        ValueError: if matplotlib is not installed, or a layer does not exist.
    """
    kinds = sorted({each.pair.kind for each in found.values()})
    of_kind = {kind: [each for each in found.values() if each.pair.kind == kind] for kind in kinds}
    for kind, pairs in of_kind.items():
        if wrong := [layer for layer in layers or () if not 0 <= layer < len(pairs)]:
            raise ValueError(f"layers: expected 0 to {len(pairs) - 1} for {kind}, found {wrong[0]}")
    pyplot, save, made = canvas(folder)
    for kind, pairs in of_kind.items():
        chosen = layers or sorted({0, len(pairs) // 2, len(pairs) - 1})
        names = labels([each.pair.path for each in pairs])
        figure, grid = pyplot.subplots(1, len(chosen), figsize=(4.5 * len(chosen), 3.5), squeeze=False, sharey=True)
        for axes, layer in zip(grid[0], chosen, strict=True):
            for method, style, text in (("vanilla", "C1--", "norms (vanilla)"), ("clover", "C0-", "singular values")):
                values = getattr(pairs[layer], method).values.cpu()
                # A log scale has no zero, and a zero that rounding has made tiny would stretch it.
                shown = values.clamp(min=1e-6 * float(values.max()))
                lines = axes.plot(shown.T, style, alpha=0.6, linewidth=1)
                lines[0].set_label(text)
            axes.set(title=f"{kind}, layer {names[layer]}", xlabel="direction", yscale="log")
        grid[0][0].set_ylabel("size, a line a head")
        grid[0][-1].legend()
        save(f"spectra_{kind}", figure)
    height = _height(max(map(len, of_kind.values())))
    figure, grid = pyplot.subplots(1, len(kinds), figsize=(5 * len(kinds), height), squeeze=False)
    for axes, (kind, pairs) in zip(grid[0], of_kind.items(), strict=True):
        rows = [ranks[each.pair.name].tolist() for each in pairs]
        most = max(each.pair.heads.dim for each in pairs)
        _draw(axes, HeatMap(f"{kind}: {titles[kind]}", [each.pair.path for each in pairs], rows, most))
    figure.tight_layout()
    save("ranks", figure)
    return made


def _height(rows: int) -> float:
    return min(12.0, 1.8 + 0.22 * rows)


def _draw(axes: Any, heat_map: HeatMap) -> None:
    title, paths, rows, most = heat_map
    names, width = labels(paths), max(map(len, rows))
    padded = [[*row, *[float("nan")] * (width - len(row))] for row in rows]
    image = axes.imshow(padded, aspect="auto", interpolation="nearest", vmin=0, vmax=most)
    axes.figure.colorbar(image, ax=axes)
    step = -(-len(names) // _MAX_TICKS)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize="small")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=title, xlabel="key-value head", ylabel="layer")
