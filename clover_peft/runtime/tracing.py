"""Whether torch records or transforms what runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_traced() -> bool:
    """Whether torch records or transforms what runs (`torch.compile`, `torch.jit.trace`, `torch.func`, forward mode).

    It does not take writing in place then, and fuses plain operations by itself.
    """
    if torch.compiler.is_compiling() or is_transformed() or torch.jit.is_tracing():
        return True
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    transform: object = torch._C._functorch.peek_interpreter_stack()
    return transform is not None


def is_captured(tensor: Tensor) -> bool:
    """Whether what is done with the tensor goes into a CUDA graph, which will read the same addresses again."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
