"""Weights that are not where they are used: offloaded by accelerate, sharded by DeepSpeed's ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils.integrations import gather_params_ctx
from torch import nn


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Within it, a weight that accelerate has offloaded is where it is used, and one that ZeRO-3 has sharded whole.

    It may be nested: the inner one leaves what the outer one brought.
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
