"""What transformers reports of an adapter's load: without the keys that an adapter's file leaves out on purpose.

`PeftAdapterMixin.load_adapter` reports every missing and unexpected key and has no argument to name exceptions.
"""

from __future__ import annotations

import inspect
import re
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers.integrations import peft as integration

# Models whose next report leaves keys out, with the patterns of missing and of unexpected keys.
_NEXT: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()


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
