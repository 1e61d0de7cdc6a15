"""Generation by a call's arguments alone."""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch import Tensor
from transformers import GenerationConfig


def generate_plainly(model: Any, **arguments: Any) -> Tensor:
    """Generate as the arguments say: the model's own generation config, such as a repetition penalty, does not count.

    Args:
        model: a language model, or peft's around one.
        **arguments: those of `generate`.

    Returns:
        The token ids, (B, prompt tokens + new tokens) int64.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain = GenerationConfig()  # peft's `generate` copies that of its own model to the inner one
    with mock.patch.object(model, "generation_config", plain), mock.patch.object(inner, "generation_config", plain):
        ids: Tensor = model.generate(**arguments)
    return ids
