"""Mixed batches, in which every sample has an adapter of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import CloverLayer


@contextmanager
def mixed_batch(model: Any, names: Sequence[str], call: Mapping[str, Any]) -> Iterator[None]:
    """Pass `names`, an adapter for every sample or "__base__" for none, to every adapted layer inside the context.

    `call` has the keyword arguments of the model's call, with the number of beams if it is a search.
    """
    beams = call.get("num_beams") or getattr(call.get("generation_config"), "num_beams", None) or 1
    encoder = model.get_encoder() if beams > 1 and hasattr(model, "get_encoder") else None
    # A beam search repeats every sample, but an encoder runs before the search.
    unrepeated = set() if encoder in (None, model) else set(encoder.modules())
    repeated = [name for name in names for _ in range(beams)]
    handles = [
        module.register_forward_pre_hook(
            partial(_pass_adapter_names, names=list(names) if module in unrepeated else repeated), with_kwargs=True
        )
        for module in model.modules()
        if isinstance(module, (CloverLayer, AuxiliaryTrainingWrapper))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict, names: list[str]) -> tuple[Any, dict]:
    return args, {**kwargs, "adapter_names": names}
