"""How many directions every head keeps: rules from singular values to ranks, pure functions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Spectra = Mapping[str, Tensor]  # name of a pair -> (H, d) singular values, descending
Ranks = dict[str, Tensor]  # name of a pair -> (H,) int64


def uniform(spectra: Spectra, ratio: float) -> Ranks:
    """The same share of directions removed from every head.

    Directions whose value is 0, which pad a head that was pruned before, are none, here and below.

    Args:
        spectra: singular values of every pair.
        ratio: share to remove; 0 removes none.

    Raises:
        ValueError: if `ratio` is no share, 0 <= ratio < 1.
    """
    check_share("ratio", ratio)
    return {name: there - (ratio * there).round().long() for name, there in _there(spectra).items()}


def global_ratio(spectra: Spectra, ratio: float) -> Ranks:
    """One threshold over all heads of all layers, such that this share of all directions is removed.

    Args:
        spectra: singular values of every pair.
        ratio: share to remove; 0 removes none.

    Raises:
        ValueError: if `ratio` is no share, 0 <= ratio < 1.
    """
    check_share("ratio", ratio)
    values = torch.cat([part.flatten().cpu() for part in spectra.values()])
    kept = values > 0
    there = int(kept.sum())
    kept[values.argsort(stable=True)[: len(values) - there + round(ratio * there)]] = False
    parts = kept.split([part.numel() for part in spectra.values()])
    return {name: part.view(spectra[name].shape).sum(1) for name, part in zip(spectra, parts, strict=True)}


def by_layer(spectra: Spectra, ratio: float) -> Ranks:
    """One threshold over all layers, with one rank for all heads of a layer, so that no head is padded.

    The k-th directions of a layer's heads go together, by the mean of their squares.

    Args:
        spectra: singular values of every pair.
        ratio: share to remove, of all directions; kept to within one layer's heads.

    Raises:
        ValueError: if `ratio` is no share, 0 <= ratio < 1.
    """
    check_share("ratio", ratio)
    squares = {name: values.double().square().mean(0).cpu() for name, values in spectra.items()}
    values = torch.cat(list(squares.values()))
    heads = torch.cat([torch.full_like(part, len(spectra[name])) for name, part in squares.items()])
    heads = torch.where(values > 0, heads, 0)
    order = values.argsort(stable=True)
    removed = torch.zeros_like(values, dtype=torch.bool)
    removed[order] = heads[order].cumsum(0) <= ratio * float(heads.sum()) + heads[order] / 2
    parts = (~removed & (values > 0)).split([len(part) for part in squares.values()])
    return {name: part.sum().repeat(len(spectra[name])) for name, part in zip(spectra, parts, strict=True)}


def _there(spectra: Spectra) -> Ranks:
    """How many directions every head has."""
    return {name: (values > 0).sum(1).cpu() for name, values in spectra.items()}


def threshold(spectra: Spectra, smallest: float) -> Ranks:
    """The directions whose singular value is at least `smallest` (the paper's rule for Whisper)."""
    return {name: (values >= smallest).sum(1).cpu() for name, values in spectra.items()}


def energy(spectra: Spectra, share: float) -> Ranks:
    """As many leading directions of each head as hold this share of its sum of squares.

    Raises:
        ValueError: if `share` is no share, 0 <= share <= 1.
    """
    check_share("share", share, whole=True)
    result = {}
    for name, values in spectra.items():
        squares = values.double().square()
        total = squares.sum(1, keepdim=True)
        before = squares.cumsum(1) - squares  # held by those before each direction
        result[name] = (before < share * total * (1 - 1e-12)).sum(1).cpu()
    return result


def rounded(ranks: Ranks, spectra: Spectra, multiple: int) -> Ranks:
    """To the nearest multiple, at most the width of a head. What is left of a head is not rounded away, and one that
    is whole stays whole.

    Raises:
        ValueError: if `multiple` is no positive number.
    """
    if multiple < 1:
        raise ValueError(f"multiple: expected a positive number, found {multiple}")
    result = {}
    for name, kept in ranks.items():
        size = spectra[name].shape[1]
        near = ((kept + multiple // 2) // multiple * multiple).clamp(min=multiple, max=size)
        result[name] = torch.where((kept == 0) | (kept == size), kept, near)
    return result


def check_share(name: str, share: float, whole: bool = False) -> None:
    """Raises ValueError if it is none; 1 is one where the `whole` may be meant."""
    if not (0 <= share < 1 or (whole and share == 1)):
        raise ValueError(f"{name}: expected a share from 0 to {'' if whole else 'below '}1, found {share}")
