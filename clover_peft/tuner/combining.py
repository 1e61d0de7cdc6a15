"""Weighted sums of adapters: their maps add up where they were cut alike and stand in the same bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .bases import clover_layers
from .config import CloverConfig
from .layer import CloverLayer

Sources = dict[str, tuple[CloverLayer, list[str]]]


def find_sources(
    model: nn.Module, configs: Mapping[str, CloverConfig], adapters: Sequence[str], weights: Sequence[float]
) -> Sources:
    """The layers that adapters are added up in.

    Args:
        model: the model with the adapters.
        configs: adapter name -> config, of all its adapters.
        adapters: the adapters to combine.
        weights: one for each.

    Returns:
        Path -> the layer, and those of the adapters that it has.

    Raises:
        ValueError: naming the adapter or module, if the adapters cannot be added up.
    """
    if missing := set(adapters) - set(configs):
        raise ValueError(f"adapters: expected some of {list(configs)}, found {sorted(missing)}")
    if not adapters or len(set(adapters)) != len(adapters) or len(adapters) != len(weights):
        raise ValueError(
            f"expected one weight for each of several different adapters, found {len(weights)} for {list(adapters)}"
        )
    for name in adapters:
        if configs[name].low_rank:
            raise ValueError(f"adapter {name!r} has a low-rank part, which cannot be added up; merge it instead")
        if configs[name].modules_to_save or configs[name].trainable_token_indices:
            raise ValueError(
                f"adapter {name!r} trains whole modules or tokens, which cannot be added up; combine adapters "
                "without modules_to_save and trainable_token_indices"
            )
    sources = {}
    for path, layer in clover_layers(model):
        names = [name for name in adapters if name in layer.specs]
        for name in names:
            layer.check_bases(name, "combine")
            if not layer.has_same_bases(names[0], name):
                raise ValueError(
                    f"{path}: adapters {names[0]!r} and {name!r} have different bases, in which their S cannot be "
                    "added up; combine adapters of one configuration and one base model, or merge them one after "
                    "the other"
                )
        if names:
            sources[path] = (layer, names)
    return sources


@torch.no_grad()
def add_up(sources: Sources, adapter_name: str, weights: Mapping[str, float]) -> None:
    """Fill a new adapter with the weighted sum of others: their bases, and the sum of their offsets dS.

    Args:
        sources: from `find_sources`.
        adapter_name: the new adapter, which has layers there.
        weights: adapter name -> weight.

    Raises:
        ValueError: if the adapters were made with other options than the new one.
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
                new.s.add_(layer.tensors(name, spec).s, alpha=weights[name])
