"""How an adapter is being made: to be loaded from a file, on the meta device."""

from __future__ import annotations

import traceback

from peft import PeftModel
from torch import empty, nn
from transformers.integrations import PeftAdapterMixin

# The functions that make an adapter and then load its weights. Peft gives a tuner no sign of them: no argument, and
# `get_peft_model` makes a new adapter from a config that was read from a file as well.
_LOADERS = {
    getattr(function, "__code__", None)
    for function in (PeftModel.from_pretrained, PeftModel.load_adapter, PeftAdapterMixin.load_adapter)
}


def weights_follow() -> bool:
    """Whether a function that loads adapters is on the call stack.

    Other callers get False. Their bases are then computed although a file may replace them, which costs time only.
    """
    return any(frame.f_code in _LOADERS for frame, _ in traceback.walk_stack(None))


def makes_meta_tensors() -> bool:
    """Whether new parameters are created on the meta device (`low_cpu_mem_usage`)."""
    # A layer would draw random numbers for its initialisation, and change those of the user.
    parameters = nn.ParameterList([empty(0)])
    return next(parameters.parameters()).is_meta
