"""Spectra of heads: singular values beside the norms of coordinates, and the ratios that keep a share of energy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..linalg.spectra import effective_rank
from .calibration import Calibration, measure
from .directions import Directions, Method, decompose_pair
from .pairs import Kind, Pair, find_pairs, select_pairs

SHARES = (0.99, 0.95, 0.9)  # shares of the energy for which thresholds are shown
METHODS: tuple[Method, ...] = ("clover", "vanilla")


@dataclass(frozen=True)
class Spectrum:
    """The directions of a pair's heads, in the order in which they are kept.

    Attributes:
        values: (H, d) float64, singular values ("clover") or products of the norms of coordinates ("vanilla"),
            descending.
        energy: (H, d) float64, the amount by which each direction raises the kept sum of squares of the head's product
            when the directions before it are kept. For singular directions it is the squared singular value.
            Coordinates are not orthogonal, so their amounts depend on the order and may be negative. The sum is the
            same for both.
    """

    values: Tensor
    energy: Tensor

    def needed(self, share: float) -> Tensor:
        """(H,), the number of directions that each head must keep for this share of its energy."""
        kept, total = self.energy.cumsum(1), self.energy.sum(1, keepdim=True)
        too_few = kept < share * total * (1 - 1e-12)
        places = torch.arange(1, kept.shape[1] + 1, device=kept.device)
        last = (too_few * places).amax(1)
        return torch.where(total.squeeze(1) > 0, last + 1, 0).clamp(max=kept.shape[1])


@dataclass(frozen=True)
class PairSpectra:
    """The spectra of a pair's heads by both methods."""

    pair: Pair
    clover: Spectrum
    vanilla: Spectrum

    def to_dict(self) -> dict[str, Any]:
        """The spectra for JSON.

        Returns:
            `kind`, `path`, `heads` and `size`; and for each method, by head, the singular `values`, the
            `effective_rank` and the `directions`: share of energy -> how many directions hold it.
        """
        heads, size = self.clover.values.shape
        found: dict[str, Any] = {"kind": self.pair.kind, "path": self.pair.path, "heads": heads, "size": size}
        for method in METHODS:
            spectrum = getattr(self, method)
            found[method] = {
                "values": [[float(f"{value:.6g}") for value in row] for row in spectrum.values.tolist()],
                "effective_rank": [effective_rank(row) for row in spectrum.values],
                "directions": {str(share): spectrum.needed(share).tolist() for share in SHARES},
            }
        return found


@torch.no_grad()
def measure_spectra(
    model: nn.Module,
    kinds: Iterable[Kind],
    calibration: Iterable[Mapping[str, Any]] | Calibration | None = None,
    target_modules: str | Sequence[str] | None = None,
) -> dict[str, PairSpectra]:
    """The spectra of a model's pairs by both methods, in one pass over the data.

    Args:
        model: a model of a known family, without adapters.
        kinds: "qk", "vo" or both.
        calibration: as in `decompose`.
        target_modules: as in `decompose`.

    Returns:
        Name of a pair -> its spectra.

    Raises:
        ValueError: if no such pair exists.
    """
    pairs = select_pairs(model, find_pairs(model), kinds, target_modules)
    moments = measure(model, pairs, calibration).moments
    found = {}
    for pair in pairs:
        clover, vanilla = (decompose_pair(pair, method, moments) for method in METHODS)
        by_value = Spectrum(clover.values, clover.values.square())
        found[pair.name] = PairSpectra(pair, by_value, _coordinates(clover, vanilla))
    return found


def _coordinates(clover: Directions, vanilla: Directions) -> Spectrum:
    """The spectrum of coordinates, measured on the product that the singular directions decompose.

    If the coordinates D are removed, a head's product lacks `sum_{i in D} o_i v_i^T`. The squared norm of that is the
    sum over D x D of the elementwise product `G_out * G_in`.
    """
    values = clover.values.unsqueeze(-1)
    g_in = (clover.back.mT * values).mT @ clover.back.mT  # E S E^T
    g_out = (clover.down * values).mT @ clover.down  # C^T S C
    both = vanilla.down @ (g_in * g_out) @ vanilla.down.mT  # in the order of the coordinates kept
    # The energy that is lost with a coordinate and all later ones.
    rest = both.flip(1, 2).cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2).flip(1)
    return Spectrum(vanilla.values, rest - torch.nn.functional.pad(rest[:, 1:], (0, 1)))


def by_energy(spectra: Iterable[Spectrum], share: float) -> dict[str, float]:
    """The largest share of all directions that one threshold for all heads may remove.

    Args:
        spectra: the spectra of all pairs of one kind.
        share: the share of their total energy to keep.

    Returns:
        `ratio`, the share to remove, and `threshold`, the smallest value that is kept.
    """
    # The order is reversed, so that the later of a head's equal values is removed first.
    pairs = [
        (spectrum.values.flip(1).flatten().cpu(), spectrum.energy.flip(1).flatten().cpu()) for spectrum in spectra
    ]
    values, energy = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    values, energy = values[values > 0], energy[values > 0]  # A value of 0 only pads its head.
    if not len(values):
        return {"ratio": 0.0, "threshold": 0.0}
    order = values.argsort(stable=True)
    kept = 1 - energy[order].cumsum(0) / energy.sum().clamp(min=1e-300)
    count = int((kept >= share).long().cumprod(0).sum())
    count = min(count, len(values) - 1)  # `prune` always keeps a direction.
    return {"ratio": count / len(values), "threshold": float(values[order[count]])}


def labels(paths: Sequence[str]) -> list[str]:
    """Short names of the layers of projections: their numbers, or the parts in which their paths differ."""
    blocks = [path.rpartition(".")[0] for path in paths]
    if len({re.sub(r"\d+", "*", block) for block in blocks}) == 1 and re.search(r"\d", blocks[0]):
        return [".".join(re.findall(r"\d+", block)) for block in blocks]
    parts = [block.split(".") for block in blocks]
    common = next((i for i, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1), 0)
    return [".".join(part[common:]) for part in parts]
