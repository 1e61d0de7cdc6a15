"""Rules that choose how many directions every head keeps: pure functions from singular values to ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Spectra = Mapping[str, Tensor]  # name of a pair -> (H, d) singular values, descending
Ranks = dict[str, Tensor]  # name of a pair -> (H,) int64


def uniform(spectra: Spectra, ratio: float) -> Ranks:
    """Remove the same share of directions from every head.

    No rule counts directions of value 0, which only pad a head that was pruned before.

    Args:
        spectra: singular values of every pair.
        ratio: share to remove; 0 removes none.

    Raises:
        ValueError: unless 0 <= ratio < 1.
    """
    check_share("ratio", ratio)
    return {name: there - (ratio * there).round().long() for name, there in _there(spectra).items()}


def global_ratio(spectra: Spectra, ratio: float) -> Ranks:
    """Remove this share of all directions by one threshold for all heads of all layers.

    Args:
        spectra: singular values of every pair.
        ratio: share to remove; 0 removes none.

    Raises:
        ValueError: unless 0 <= ratio < 1.
    """
    check_share("ratio", ratio)
    values = torch.cat([part.flatten().cpu() for part in spectra.values()])
    kept = values > 0
    there = int(kept.sum())
    kept[values.argsort(stable=True)[: len(values) - there + round(ratio * there)]] = False
    parts = kept.split([part.numel() for part in spectra.values()])
    return {name: part.view(spectra[name].shape).sum(1) for name, part in zip(spectra, parts, strict=True)}


def by_layer(spectra: Spectra, ratio: float) -> Ranks:
    """Remove this share of all directions, with one rank for all heads of a layer, so that no head is padded.

    One threshold for all layers compares the mean square of the k-th singular values of a layer's heads. A head that
    was pruned before keeps at most the directions that it has.

    Args:
        spectra: singular values of every pair.
        ratio: share of all directions to remove; it is met to within one direction of each head of a layer.

    Raises:
        ValueError: unless 0 <= ratio < 1.
    """
    check_share("ratio", ratio)
    squares = {name: values.double().square().mean(0).cpu() for name, values in spectra.items()}
    values = torch.cat(list(squares.values()))
    heads = torch.cat([(part > 0).sum(0).to(values) for part in spectra.values()])  # that have a k-th direction
    place = torch.cat([torch.arange(len(part)) for part in squares.values()])
    last_first = place.argsort(descending=True, stable=True)
    order = last_first[values[last_first].argsort(stable=True)]  # of equal directions of a layer, the last goes first
    removed = torch.zeros_like(values, dtype=torch.bool)
    removed[order] = heads[order].cumsum(0) <= ratio * float(heads.sum()) + heads[order] / 2
    parts = (~removed & (values > 0)).split([len(part) for part in squares.values()])
    there = _there(spectra)
    return {name: there[name].clamp(max=int(part.sum())) for name, part in zip(spectra, parts, strict=True)}


def _there(spectra: Spectra) -> Ranks:
    """The number of directions that every head has."""
    return {name: (values > 0).sum(1).cpu() for name, values in spectra.items()}


def threshold(spectra: Spectra, smallest: float) -> Ranks:
    """Keep the directions whose singular value is at least `smallest` (the paper's rule for Whisper)."""
    return {name: ((values >= smallest) & (values > 0)).sum(1).cpu() for name, values in spectra.items()}


def energy(spectra: Spectra, share: float) -> Ranks:
    """Keep the fewest leading directions of each head that hold this share of its sum of squares.

    Raises:
        ValueError: unless 0 <= share <= 1.
    """
    check_share("share", share, whole=True)
    result = {}
    for name, values in spectra.items():
        squares = values.double().square()
        total = squares.sum(1, keepdim=True)
        before = squares.cumsum(1) - squares  # sum over the directions before each one
        result[name] = (before < share * total * (1 - 1e-12)).sum(1).cpu()
    return result


def rounded(ranks: Ranks, spectra: Spectra, multiple: int) -> Ranks:
    """Round ranks to the nearest multiple, up to the width of a head.

    No rank is rounded down to 0, and a head that keeps all its directions keeps them.

    Raises:
        ValueError: if `multiple` is not positive.
    """
    if multiple < 1:
        raise ValueError(f"multiple: expected a positive number, found {multiple}")
    result, there = {}, _there(spectra)
    for name, kept in ranks.items():
        near = ((kept + multiple // 2) // multiple * multiple).clamp(min=multiple, max=spectra[name].shape[1])
        result[name] = torch.where((kept == 0) | (kept >= there[name]), kept, near)
    return result


def check_share(name: str, share: float, whole: bool = False) -> None:
    """Raises ValueError unless 0 <= share < 1; `whole` permits 1."""
    if not (0 <= share < 1 or (whole and share == 1)):
        raise ValueError(f"{name}: expected a share from 0 to {'' if whole else 'below '}1, found {share}")
