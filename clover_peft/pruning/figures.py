"""Pictures of pruning: the ranks of all heads, and the spectra that they are chosen by (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from ..io.figures import canvas, find_pyplot
from .report import PruningReport
from .spectra import PairSpectra, labels

_TICKS = 40  # rows of a heat map that are named, at most


def plot_report(report: PruningReport, path: str | PathLike[str]) -> None:
    """Draws a heat map, layer x key-value head, for each kind of pair: the share of directions that each head keeps,
    and below it the share of its energy (sum of squared singular values).

    Args:
        report: from `prune`.
        path: the picture, of any type that matplotlib writes.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    pyplot = find_pyplot()
    kinds = sorted({pair.kind for pair in report.pairs.values()})
    most = max(sum(pair.kind == kind for pair in report.pairs.values()) for kind in kinds)
    figure, grid = pyplot.subplots(2, len(kinds), figsize=(5 * len(kinds), 2 * _height(most)), squeeze=False)
    for column, kind in zip(grid.T, kinds, strict=True):
        pairs = {name: pair for name, pair in report.pairs.items() if pair.kind == kind}
        names = labels([name.rpartition(" (")[0] for name in pairs])
        kept = [[rank / pair.size for rank in pair.kept] for pair in pairs.values()]
        _heat(column[0], kept, names, f"{kind}: directions kept, {1 - report.removed(kind):.1%} in all", 1)
        _heat(column[1], [pair.energy for pair in pairs.values()], names, f"{kind}: energy kept", 1)
    data = "with data" if report.calibrated else "by weights alone"
    figure.suptitle(f"{report.method}, {data}, {report.rule['ranks']} ranks")
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
    """Draws singular values of each head beside the norms of its coordinates in some layers (the paper's figures 2, 7
    and 8) as `spectra_qk.png` and `spectra_vo.png`, and a heat map of ranks, layer x key-value head, as `ranks.png`.

    Args:
        found: from `measure_spectra`.
        folder: for the pictures.
        ranks: name of a pair -> (H,), for the heat map.
        titles: kind of pair -> what ranks these are.
        layers: pairs of each kind to draw, counted from 0; None: the first, the middle and the last.

    Returns:
        The pictures.

    Raises:
        ValueError: if matplotlib is not installed, or there is no such layer.
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
                # A log scale has no zero; what rounding leaves of one would stretch it.
                shown = values.clamp(min=1e-6 * float(values.max()))
                lines = axes.plot(shown.T, style, alpha=0.6, linewidth=1)
                lines[0].set_label(text)
            axes.set(title=f"{kind}, layer {names[layer]}", xlabel="direction", yscale="log")
        grid[0][0].set_ylabel("size, a line a head")
        grid[0][-1].legend()
        save(f"spectra_{kind}", figure)
    figure, grid = pyplot.subplots(
        1, len(kinds), figsize=(5 * len(kinds), _height(max(map(len, of_kind.values())))), squeeze=False
    )
    for axes, (kind, pairs) in zip(grid[0], of_kind.items(), strict=True):
        rows = [ranks[each.pair.name].tolist() for each in pairs]
        size = max(each.pair.heads.dim for each in pairs)
        _heat(axes, rows, labels([each.pair.path for each in pairs]), f"{kind}: {titles[kind]}", size)
    figure.tight_layout()
    save("ranks", figure)
    return made


def _height(rows: int) -> float:
    return min(12.0, 1.8 + 0.22 * rows)


def _heat(axes: Any, rows: Sequence[Sequence[float]], names: Sequence[str], title: str, most: float) -> None:
    """A heat map of rows, which may have unequal lengths, from 0 to `most`."""
    width = max(map(len, rows))
    padded = [[*row, *[float("nan")] * (width - len(row))] for row in rows]
    image = axes.imshow(padded, aspect="auto", interpolation="nearest", vmin=0, vmax=most)
    axes.figure.colorbar(image, ax=axes)
    step = -(-len(names) // _TICKS)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize="small")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=title, xlabel="key-value head", ylabel="layer")
