"""Weights that bitsandbytes has repacked."""

from __future__ import annotations

from torch import nn


def keep_unpacked(model: nn.Module) -> None:
    """Let 4-bit modules alone stay in training mode, in which bitsandbytes does not repack them for the CPU."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.training = True


def check_packing(module: nn.Module, name: str) -> None:
    """Refuse a 4-bit weight that bitsandbytes repacked for the CPU: it is read wrongly, and so are its gradients."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        raise TypeError(
            f"{name}: expected a 4-bit weight that can be dequantised and trained through, found one that "
            "bitsandbytes repacked for the CPU in its first evaluation forward; load the base model again and set "
            "module.support_avx512bf16_for_cpu = False on its Linear4bit modules before running it"
        )
