"""Whether torch records or transforms the operations that run now."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def is_traced() -> bool:
    """Whether torch records or transforms operations: `torch.compile`, `jit.trace`, `torch.func`, forward mode.

    Operations must not write in place then; compilers fuse plain ones themselves.
    """
    if torch.compiler.is_compiling() or is_transformed() or torch.jit.is_tracing():
        return True
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether `torch.func` (`vmap`, `grad`, ...) transforms operations."""
    transform: object = torch._C._functorch.peek_interpreter_stack()
    return transform is not None


def takes_writes() -> bool:
    """Whether a result may be written to; under `torch.func` it may lack the batch dimension of the written values."""
    return torch.compiler.is_compiling() or not is_transformed()


def is_captured(tensor: Tensor) -> bool:
    """Whether operations on the tensor go into a CUDA graph, which reads the same addresses again when it runs."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


# Private, so it may be missing in another version of torch.
_hooks_of_saved_tensors = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
KNOWS_SAVED_TENSORS_HOOKS = _hooks_of_saved_tensors is not None


def saved_tensors_hooks() -> object:
    """The functions that pack and unpack what autograd saves now, which gradient checkpointing sets; None for none."""
    return None if _hooks_of_saved_tensors is None else _hooks_of_saved_tensors(True)


def stream_of(tensor: Tensor) -> object:
    """The stream that operations on the tensor go to; None on a CPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def shares_state(module: nn.Module) -> bool:
    """Whether the module is a replica of `nn.DataParallel`, whose plain attributes are those of the original."""
    return bool(module.__dict__.get("_is_replica"))
