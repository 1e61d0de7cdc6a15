"""The start of the low-rank part: directions that the new data have and the model's own text has not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..base_model.activations import Probe, TokenReader, collect_moments, evaluating, read_batches
from ..base_model.slices import HeadSlice
from ..linalg.contrast import contrast_directions
from ..linalg.moments import SecondMoment
from .activation_bases import check_at_start
from .layer import CloverLayer
from .layers import inner_model, layers_with

ENERGY = 4.0  # of the rows of A on new data, relative to that of LoRA's random start
_BYTES = 4 * 2**30  # of the moments that are in memory at a time


def initialize_from_contrast(
    model: nn.Module,
    new: Iterable[Mapping[str, Any]],
    known: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
) -> None:
    """Let A of the low-rank parts read what is new in the data, instead of random directions (ours).

    The rows of A become the directions of a projection's input x that have most energy `E[(a^T x)^2]` on new data
    relative to known data, see `linalg.contrast.contrast_directions`. So a change of B changes the model little on
    what it knows. On the new data `A x` is twice as large as with LoRA's random rows: steps of one learning rate then
    turn A less and move B's part more. `own_text` gives text that a language model knows. B stays zero and the model's
    outputs stay equal, bit for bit. Call it before training, in any order with `initialize_from_activations`. It costs
    a pass over both data sets for each 4 GiB of moments.

    Args:
        model: a model with a CLOVER adapter with `low_rank` that is not trained yet.
        new: batches of the data to be trained on, as keyword arguments for `model`.
        known: batches of what the model should keep, alike.
        adapter_name: the adapter.

    Raises:
        ValueError: the adapter is not there, has no low-rank part, is trained or merged, or others are active, or the
            data do not reach a target or have too few directions; then nothing is changed.
    """
    layers = dict(layers_with(inner_model(model), adapter_name))
    check_at_start(model, adapter_name, list(layers.items()))
    for path, layer in layers.items():
        if "clover_A" not in layer.trained_tensors(adapter_name):
            raise ValueError(
                f"{path}: expected a low-rank part, whose A is made here, found none; set CloverConfig(low_rank=...)"
            )
    modules = {path: (layer, layer.base_weight.in_features) for path, layer in layers.items()}
    (rank,) = {len(_a_of(layer, adapter_name)) for layer in layers.values()}  # the config has one for all
    starts = contrast_starts(model, modules, rank, new, known)
    with torch.no_grad():
        for path, layer in layers.items():
            _a_of(layer, adapter_name).copy_(starts[path])


def contrast_starts(
    model: nn.Module,
    modules: Mapping[str, tuple[nn.Module, int]],
    rank: int,
    new: Iterable[Mapping[str, Any]],
    known: Iterable[Mapping[str, Any]],
) -> dict[str, Tensor]:
    """Compute the start of A for any low-rank adapter, see `initialize_from_contrast`.

    `modules` are those that are adapted, by path, with the features of their inputs. Returns path -> A (rank,
    in_features) float64; modules that read one tensor have one A.
    """
    data = {"new": read_batches(new, "new"), "known": read_batches(known, "known")}
    first_of = _readers_of_one_input(model, {path: module for path, (module, _) in modules.items()}, data["new"][0])
    made: dict[str, Tensor] = {}
    for paths in _groups({path: modules[path][1] for path in dict.fromkeys(first_of.values())}):
        whole = ((path, *modules[path]) for path in paths)
        probes = {path: Probe(module, True, HeadSlice.plain(1, size), size) for path, module, size in whole}
        found = {name: collect_moments(model, probes, batches, SecondMoment, 1) for name, batches in data.items()}
        for path in paths:
            new_moment, known_moment = (found[name].pop(path).second[0] for name in ("new", "known"))
            made[path] = _directions(path, new_moment, known_moment, rank)
    return {path: made[first] for path, first in first_of.items()}


def _a_of(layer: CloverLayer, adapter_name: str) -> Tensor:
    (a,) = layer.trained_tensors(adapter_name)["clover_A"].values()
    return a


def _directions(path: str, new: Tensor, known: Tensor, rank: int) -> Tensor:
    """A of one input, (rank, in_features); LoRA's random start has a variance of 1 / (3 D)."""
    try:
        directions = contrast_directions(new, known, rank)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return directions * (ENERGY * new.trace() / (3 * len(new))).sqrt()


@torch.no_grad()
def _readers_of_one_input(
    model: nn.Module, modules: Mapping[str, nn.Module], batch: Mapping[str, Any]
) -> dict[str, str]:
    """Every module's path -> the first one that reads the same tensor, as queries, keys and values do."""
    read: dict[str, list[Tensor]] = {path: [] for path in modules}  # kept, so that no other tensor gets one's place

    with evaluating(model), ExitStack() as hooked:
        for path, module in modules.items():
            hook = module.register_forward_pre_hook(lambda _, inputs, path=path: read[path].append(inputs[0]))
            hooked.enter_context(hook)
        model(**TokenReader(model).start_without_logits(batch)[0])
    first: dict[tuple[int, ...], str] = {}
    return {path: first.setdefault(tuple(map(id, inputs)) or (id(path),), path) for path, inputs in read.items()}


def _groups(features: Mapping[str, int]) -> Iterator[list[str]]:
    """The paths, in groups whose moments of both data sets fit into `_BYTES`; one path at least."""
    group: list[str] = []
    taken = 0
    for path, count in features.items():
        size = 2 * 4 * count**2
        if group and taken + size > _BYTES:
            yield group
            group, taken = [], 0
        group.append(path)
        taken += size
    yield group
