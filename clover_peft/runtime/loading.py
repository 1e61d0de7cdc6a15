"""How an adapter is being made: to be loaded from a file, on the meta device."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from types import FrameType

import transformers
from peft import PeftModel
from torch import empty, nn
from transformers.integrations import PeftAdapterMixin

# The functions that make an adapter and then load its weights. Peft gives a tuner no sign of them: no argument, and
# `get_peft_model` makes a new adapter from a config that was read from a file as well.
_TRANSFORMERS = getattr(PeftAdapterMixin.load_adapter, "__code__", None)
_LOADERS = {
    _TRANSFORMERS,
    *(getattr(function, "__code__", None) for function in (PeftModel.from_pretrained, PeftModel.load_adapter)),
}
_SOURCE = "peft_model_id"  # the variable of transformers' `load_adapter` that holds the adapter's name or folder


def _callers() -> Iterator[FrameType]:
    """The frames on the call stack, from the innermost one."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def weights_follow() -> bool:
    """Whether a function that loads adapters is on the call stack.

    Other callers get False. Their bases are then computed although a file may replace them, which costs time only.
    """
    return any(frame.f_code in _LOADERS for frame in _callers())


def loaded_by_transformers() -> str | None:
    """The name or folder of the adapter that transformers loads next, without letting the tuner see its weights.

    None if something else loads, or if transformers was given a state dict. Read from the local variable `_SOURCE` of
    transformers' `load_adapter`: a warning tells if that has no such variable.
    """
    for frame in _callers():
        if frame.f_code is _TRANSFORMERS:
            if _SOURCE not in frame.f_locals:
                warnings.warn(
                    f"transformers {transformers.__version__}: expected a variable {_SOURCE} in "
                    f"{frame.f_code.co_name}, found none, so the adapter's file is not checked before it is "
                    "loaded; load it with PeftModel.from_pretrained, or use a version that clover_peft is tested on",
                    stacklevel=2,
                )
            return frame.f_locals.get(_SOURCE)
    return None


def makes_meta_tensors() -> bool:
    """Whether new parameters are created on the meta device (`low_cpu_mem_usage`)."""
    # A layer would draw random numbers for its initialisation, and change those of the user.
    parameters = nn.ParameterList([empty(0)])
    return next(parameters.parameters()).is_meta
