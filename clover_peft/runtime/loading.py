"""How an adapter is being made: to be loaded from a file, on the meta device."""

from __future__ import annotations

import traceback
from functools import wraps
from typing import Any

from peft import PeftModel
from torch import empty, nn
from transformers.integrations import PeftAdapterMixin
from transformers.integrations import peft as integration

# The functions that make an adapter and then load its weights. Peft gives a tuner no sign of them: no argument, and
# `get_peft_model` makes a new adapter from a config that was read from a file as well.
_TRANSFORMERS = getattr(PeftAdapterMixin.load_adapter, "__code__", None)
_LOADERS = {
    _TRANSFORMERS,
    *(getattr(function, "__code__", None) for function in (PeftModel.from_pretrained, PeftModel.load_adapter)),
}


def weights_follow() -> bool:
    """Whether a function that loads adapters is on the call stack.

    Other callers get False. Their bases are then computed although a file may replace them, which costs time only.
    """
    return any(frame.f_code in _LOADERS for frame, _ in traceback.walk_stack(None))


def loaded_by_transformers() -> str | None:
    """The name or folder of the adapter that transformers loads next, without letting the tuner see its weights.

    None if something else loads, or if transformers was given a state dict.
    """
    frames = (frame for frame, _ in traceback.walk_stack(None) if frame.f_code is _TRANSFORMERS)
    return next((frame.f_locals.get("peft_model_id") for frame in frames), None)


def leave_out_of_report(model: nn.Module, missing: str, unexpected: str) -> None:
    """Keep keys that match these regular expressions out of what transformers reports about loads of this model.

    Models of transformers have attributes for this, which its `from_pretrained` follows and its `load_adapter` does
    not.
    """
    for name, pattern in (("missing", missing), ("unexpected", unexpected)):
        attribute = f"_keys_to_ignore_on_load_{name}"
        setattr(model, attribute, {*(getattr(model, attribute, None) or ()), pattern})
    report: Any = getattr(integration, "log_state_dict_report", None)
    if report is not None and not hasattr(report, "__wrapped__"):

        @wraps(report)
        def of_the_rest(*args: Any, **kwargs: Any) -> None:
            kwargs["model"]._adjust_missing_and_unexpected_keys(kwargs["loading_info"])
            report(*args, **kwargs)

        integration.log_state_dict_report = of_the_rest


def makes_meta_tensors() -> bool:
    """Whether new parameters are created on the meta device (`low_cpu_mem_usage`)."""
    # A layer would draw random numbers for its initialisation, and change those of the user.
    parameters = nn.ParameterList([empty(0)])
    return next(parameters.parameters()).is_meta
