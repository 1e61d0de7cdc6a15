"""Whether an adapter that is made now gets its weights from a file next."""

from __future__ import annotations

import traceback

from peft import PeftModel
from torch import empty, nn
from transformers.integrations import PeftAdapterMixin

# The functions that make an adapter and load its weights into it. Peft tells a tuner neither by an argument nor by the
# config: `get_peft_model` makes a new adapter from a config that was read from a file as well.
_LOADERS = {
    getattr(function, "__code__", None)
    for function in (PeftModel.from_pretrained, PeftModel.load_adapter, PeftAdapterMixin.load_adapter)
}


def weights_follow() -> bool:
    """Whether one of the functions that load adapters is at work, by the call stack.

    For another caller the answer is False, and bases are computed that a file may then replace: that costs time, and
    changes no result.
    """
    return any(frame.f_code in _LOADERS for frame, _ in traceback.walk_stack(None))


def makes_meta_tensors() -> bool:
    """Whether new parameters are created on the meta device (`low_cpu_mem_usage`)."""
    probe = nn.ParameterList([empty(0)])  # no layer: its initialisation would draw random numbers
    return next(probe.parameters()).is_meta
