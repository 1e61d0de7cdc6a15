"""Weighted sums of adapters whose maps have the same blocks and the same bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_tensors import WHOLE
from .config import CloverConfig
from .layer import CloverLayer
from .layers import clover_layers

Sources = dict[str, tuple[CloverLayer, list[str]]]


def find_sources(
    model: nn.Module, configs: Mapping[str, CloverConfig], adapters: Sequence[str], weights: Sequence[float]
) -> Sources:
    """Path -> layer and its adapters, for all layers of the adapters to combine; `configs` holds all configs."""
    if missing := set(adapters) - set(configs):
        raise ValueError(
            f"adapters: expected some of {list(configs)}, found {sorted(missing)}; correct the names, or load these "
            "adapters first with load_adapter"
        )
    if not adapters or len(set(adapters)) != len(adapters) or len(adapters) != len(weights):
        raise ValueError(
            f"weights: expected one for each of several different adapters, found {len(weights)} for "
            f"{list(adapters)}; pass each adapter once and as many weights"
        )
    for name in adapters:
        if configs[name].modules_to_save or configs[name].trainable_token_indices:
            raise ValueError(
                f"adapter {name!r} trains whole modules or tokens, which cannot be added up; combine adapters "
                "without modules_to_save and trainable_token_indices"
            )
    needs_input = configs[adapters[0]].clover_dropout or any(configs[name].low_rank for name in adapters)
    if needs_input and (stacks := [name for name in adapters if configs[name].target_parameters]):
        raise ValueError(
            f"adapters: expected none of experts beside low-rank parts or dropout, found {stacks} among "
            f"{list(adapters)}; combine the adapters of modules and those of experts apart"
        )
    sources = {}
    for path, layer in clover_layers(model):
        names = [name for name in adapters if name in layer.specs]
        for name in names:
            layer.check_bases(name, "combine")
            if name != names[0] and not have_same_bases(layer, names[0], name):
                raise ValueError(
                    f"{path}: adapters {names[0]!r} and {name!r} have different bases, in which their S cannot be "
                    "added up; combine adapters of one configuration and one base model, or merge them one after "
                    "the other"
                )
        if any(spec.truncate and spec.basis == "folded" for name in names for spec in layer.specs[name]):
            total = sum(weights[adapters.index(name)] * layer.scaling[name] for name in names)
            if abs(total - 1) > 1e-6:  # each map has the loss of the dropped directions in it
                raise ValueError(
                    f"{path}: adapters {names} were trained with truncate=True and saved folded, so they are added up "
                    f"only with weights whose sum is 1, found {total:g}; change the weights, or load adapters that "
                    "were saved with their bases"
                )
        if names:
            sources[path] = (layer, names)
    return sources


def have_same_bases(layer: CloverLayer, one: str, other: str) -> bool:
    """Whether two adapters have the same slices, C, E and S0. Their fingerprints may differ by rounding."""
    if layer.specs[one] != layer.specs[other]:
        return False
    pairs = ((layer.tensors(one, spec)[1:4], layer.tensors(other, spec)[1:4]) for spec in layer.specs[one])
    return all(a is None or b is None or torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


@torch.no_grad()
def add_up(sources: Sources, adapter_name: str, weights: Mapping[str, float]) -> None:
    """Copy the adapters' bases and the weighted sum of their offsets dS into a new adapter.

    Low-rank parts stand side by side: `w_1 B_1 A_1 + w_2 B_2 A_2 = [w_1 B_1, w_2 B_2] [A_1; A_2]`. Where a module has
    not all of the adapters, the rest of the new part stays as a new adapter's, with zeros in B.

    Raises:
        ValueError: if the new adapter has other slices.
    """
    for path, (layer, names) in sources.items():
        if layer.specs[adapter_name] != layer.specs[names[0]]:
            raise ValueError(
                f"{path}: the adapters {list(weights)} were made with different options; combine adapters of one "
                "configuration"
            )
        for spec in layer.specs[adapter_name]:
            new, first = layer.tensors(adapter_name, spec), layer.tensors(names[0], spec)
            frozen: Any = zip(new[1:], first[1:], strict=True)
            for mine, theirs in frozen:
                if mine is not None and theirs is not None:
                    mine.copy_(theirs)
            new.s.zero_()
            for name in names:
                new.s.add_(layer.tensors(name, spec).s, alpha=weights[name] * layer.scaling[name])
        if adapter_name in layer.clover_A:
            a, b = _low_rank(layer, adapter_name)
            b.zero_()
            filled = 0
            for name in names:
                if name in layer.clover_A:
                    a_one, b_one = _low_rank(layer, name)
                    places = slice(filled, filled := filled + len(a_one))
                    a[places] = a_one
                    b[:, places] = weights[name] * layer.scaling[name] * b_one


def _low_rank(layer: CloverLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    trained = layer.trained_tensors(adapter_name)
    return trained["clover_A"][WHOLE], trained["clover_B"][WHOLE]
