"""Weights that are elsewhere: spread over processes, or offloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate.utils import parse_flag_from_env
from peft.utils.integrations import gather_params_ctx
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.integrations import is_fsdp_enabled

ResultT = TypeVar("ResultT")


def filled_by_rank_0() -> bool:
    """Whether accelerate loads weights in the first process only and sends them to the others later."""
    return all(parse_flag_from_env(name) for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"))


def only_rank_0_has_weights() -> bool:
    """Whether, for now, only the first process may have the weights (`fsdp_cpu_ram_efficient_loading`)."""
    return is_fsdp_enabled() and dist.get_world_size() > 1


def computed_on_rank_0(compute: Callable[[], ResultT]) -> ResultT:
    """Compute in the first process; all processes return its result, or raise its `ValueError`."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [compute()]
        except ValueError as error:  # the other processes wait for a message
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], ValueError):
        raise found[0]
    return found[0]


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape; one that DeepSpeed's ZeRO-3 has sharded is itself empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


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


def refuse_sharded(model: nn.Module) -> None:
    """Refuse weights that tensor parallelism spreads over processes, because bases need whole weights."""
    for path, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{path}: expected a whole weight, found one sharded over {parameter.device_mesh}; load the model "
                "without tp_plan and distributed_config, and add the adapter before the model is sharded, as "
                "`accelerate launch` with FSDP2 does"
            )


def spare_broadcasts(model: nn.Module, buffers: Iterable[str]) -> None:
    """Keep DistributedDataParallel from sending constant buffers to all processes in each forward pass.

    DistributedDataParallel may wrap the bare model, the tuner or a `PeftModel`; each has other names for a buffer.
    `buffers` are names in the bare model, and replace those of an earlier call.
    """
    before: list[str] = getattr(model, _IGNORED, [])
    others = {name for name in before if "clover_" not in name}
    wrapped = {prefix + name for name in buffers for prefix in ("", "model.", "base_model.model.")}
    if names := sorted(others | wrapped):
        setattr(model, _IGNORED, names)
    elif before:
        delattr(model, _IGNORED)


_IGNORED = "_ddp_params_and_buffers_to_ignore"  # torch's name
