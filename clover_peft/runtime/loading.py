"""How an adapter is being made: new or to be loaded from a file, with tensors here or on the meta device.

And what transformers reports of a load, without the keys that an adapter's file leaves out on purpose:
`PeftAdapterMixin.load_adapter` reports every missing and unexpected key and has no argument to name exceptions.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from functools import wraps
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import transformers
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, empty, nn
from transformers.integrations import PeftAdapterMixin
from transformers.integrations import peft as integration
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
# Models whose next report leaves keys out, with the patterns of missing and of unexpected keys.
_NEXT: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()


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


def leave_out_of_report(model: nn.Module, missing: str, unexpected: str) -> None:
    """Keep keys out of the next report of transformers' `load_adapter` on this model, and of what it returns.

    The first call wraps the function that reports, for the process. Reports of other models stay as they are.

    Args:
        model: the model of transformers that loads an adapter now.
        missing: a regular expression, searched for in the keys that the file lacks.
        unexpected: a regular expression, searched for in the keys that the model lacks.
    """
    _NEXT[model] = (missing, unexpected)
    report = getattr(integration, "log_state_dict_report", None)
    if report is not None and not hasattr(report, "leaves_out"):
        integration.log_state_dict_report = _leaving_out(report)


def _leaving_out(report: Any) -> Any:
    """The function `report`, called with the same arguments after the keys of a marked model are taken out.

    Arguments are found by their names `model` and `loading_info`. A report without them runs unchanged.
    """
    signature = inspect.signature(report)

    @wraps(report)
    def of_the_rest(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # the report itself then names the argument that does not fit
            given = {}
        if "loading_info" in given and given.get("model") in _NEXT:
            info, patterns = given["loading_info"], _NEXT.pop(given["model"])
            for name, pattern in zip(("missing_keys", "unexpected_keys"), patterns, strict=True):
                setattr(info, name, {key for key in getattr(info, name) if not re.search(pattern, key)})
        return report(*args, **kwargs)

    of_the_rest.leaves_out = True  # type: ignore[attr-defined]
    return of_the_rest
