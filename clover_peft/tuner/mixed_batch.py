"""Mixed batches, in which every sample has an adapter of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .layer import CloverLayer

# Arguments with a row for every sample, the surest first.
_OF_SAMPLES = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "sample", "hidden_states")
_PLACEHOLDERS = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]


@contextmanager
def mixed_batch(model: Any, names: Sequence[str], call: Mapping[str, Any]) -> Iterator[None]:
    """Pass `names`, an adapter for every sample or "__base__" for none, to every adapted layer inside the context.

    `call` has the keyword arguments of the model's call, as far as peft passes them on.
    """
    batch = _MixedBatch(model, names, _repeats(model, call))
    with ExitStack() as hooked:
        hooked.enter_context(model.register_forward_pre_hook(batch.start, with_kwargs=True))
        for path, module in model.named_modules():
            if isinstance(module, (CloverLayer, AuxiliaryTrainingWrapper)):
                hook = partial(batch.pass_names, path=path)
                hooked.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


def _repeats(model: Any, call: Mapping[str, Any]) -> int:
    """How often `generate` repeats every sample."""
    sources = [
        call,
        *(vars(c) for c in (call.get("generation_config"), getattr(model, "generation_config", None)) if c),
    ]
    options = ("num_beams", "num_return_sequences")
    return max(next((source[name] for source in sources if source.get(name)), 1) for name in options)


class _MixedBatch:
    """Finds out which rows of a module's input belong to which sample.

    Args:
        model: the whole model.
        names: an adapter for every sample.
        repeats: how often `generate` repeats every sample, side by side; encoders run before that.
    """

    def __init__(self, model: Any, names: Sequence[str], repeats: int) -> None:
        self.names, self.repeats = list(names), {1, repeats}
        config = getattr(model, "config", None)
        ids = [getattr(config, name, None) for name in _PLACEHOLDERS]
        self.placeholders = [token for token in ids if isinstance(token, int)]
        self.problem: str | None = "the samples' tokens are not known"  # why rows of images belong to no sample
        self.text: set[nn.Module] = set()
        if self.placeholders:
            parts = (model.get_decoder(), model.get_output_embeddings())
            self.text = {module for part in parts if isinstance(part, nn.Module) for module in part.modules()}

    def start(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Check the call of the whole model, before it runs."""
        values = [*(kwargs.get(name) for name in _OF_SAMPLES), *args, *kwargs.values()]
        tensors = [value for value in values if isinstance(value, Tensor)]
        if tensors and len(tensors[0]) not in {len(self.names) * times for times in self.repeats}:
            raise ValueError(
                f"expected one name in adapter_names for each of the {len(tensors[0])} rows of the model's input, "
                f"found {len(self.names)}; pass one a sample"
            )
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(tokens, Tensor):
            counts = [(tokens == token).sum(-1).tolist() for token in self.placeholders]
            unequal = [count for count in counts if len(set(count)) > 1]
            self.problem = f"the samples have different numbers of image tokens, {unequal[0]}" if unequal else None

    def pass_names(self, module: nn.Module, args: tuple, kwargs: dict, path: str) -> tuple[Any, dict]:
        """Give a layer the names of its rows; one that cannot know them gets those of the samples, and refuses."""
        x = args[0] if args else next(iter(kwargs.values()))
        times, rest = divmod(len(x), len(self.names))
        if self.placeholders and module not in self.text:  # rows of images, which need not be one a sample
            if self.problem is not None:
                raise ValueError(
                    f"{path}: expected as many images in every sample of a mixed batch, because nothing else tells "
                    f"whose the rows of its input are, but {self.problem}; pass such samples one by one, or leave "
                    "this module out with exclude_modules"
                )
            known = rest == 0
        elif x.ndim > 2:
            known = rest == 0 and times in self.repeats
        else:  # maybe samples and tokens in one dimension, which experts get in an order of their own
            known = rest == 0 and re.search(r"(^|\.)experts\.", path) is None
        names = [name for name in self.names for _ in range(times)] if known else self.names
        return args, {**kwargs, "adapter_names": names}
