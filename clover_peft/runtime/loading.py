"""Tells how an adapter is being made: new or to be loaded from a file, with tensors here or on the meta device."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from types import FrameType

import transformers
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, empty, nn
from transformers.integrations import PeftAdapterMixin
from transformers.utils import cached_file

# The functions that make an adapter and then load its weights. Peft gives a tuner no sign of them: no argument, and
# `get_peft_model` makes a new adapter from a config that was read from a file as well.
_TRANSFORMERS = getattr(PeftAdapterMixin.load_adapter, "__code__", None)
_LOADERS = {
    _TRANSFORMERS,
    *(getattr(function, "__code__", None) for function in (PeftModel.from_pretrained, PeftModel.load_adapter)),
}
# These variables of transformers' `load_adapter` hold what it loads.
_SOURCES = {"peft_model_id", "adapter_state_dict", "load_config"}


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


def transformers_loads() -> bool:
    """Whether transformers' `load_adapter` is on the call stack."""
    return any(frame.f_code is _TRANSFORMERS for frame in _callers())


def loaded_by_transformers() -> dict[str, Tensor]:
    """The tensors that transformers loads next, without letting the tuner see them; downloaded if they are on the hub.

    The result is empty if something else loads. The tensors are found through the local variables `_SOURCES` of
    transformers' `load_adapter`: a warning tells if that has no such variables.
    """
    for frame in _callers():
        if frame.f_code is _TRANSFORMERS:
            found = frame.f_locals
            if missing := sorted(_SOURCES - found.keys()):
                warnings.warn(
                    f"transformers {transformers.__version__}: expected the variables {missing} in "
                    f"{frame.f_code.co_name}, found none, so the adapter's file is not checked before it is loaded, "
                    "and packed bases are not loaded; load it with PeftModel.from_pretrained, or use a version that "
                    "clover_peft is tested on",
                    stacklevel=2,
                )
                return {}
            if found["adapter_state_dict"] is not None:
                return found["adapter_state_dict"]
            options = {**found["load_config"].download_kwargs, "_raise_exceptions_for_missing_entries": False}
            file = cached_file(found["peft_model_id"], SAFETENSORS_WEIGHTS_NAME, **options)
            return {} if file is None else load_file(file)
    return {}


def makes_meta_tensors() -> bool:
    """Whether new parameters are created on the meta device (`low_cpu_mem_usage`)."""
    # A layer would draw random numbers for its initialisation, and change those of the user.
    parameters = nn.ParameterList([empty(0)])
    return next(parameters.parameters()).is_meta
