"""Weights that accelerate has offloaded, or DeepSpeed's ZeRO-3 has sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils.integrations import gather_params_ctx
from torch import nn


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Bring an offloaded weight to its device, or gather a sharded one, for the duration of the context.

    Contexts may be nested: the inner one leaves the weight for the outer one to take away.
    """
    parameters = list(module.parameters(recurse=False))
    if sharded := [p for p in parameters if hasattr(p, "ds_shape") and not p.numel()]:
        with gather_params_ctx(sharded, modifier_rank=None):
            yield
        return
    hook: Any = getattr(module, "_hf_hook", None)
    if not getattr(hook, "offload", False) or not any(p.is_meta for p in parameters):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
