"""Swaps a loaded adapter for another one in place."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel

from .bases import clover_layers
from .config import CloverConfig

# What a file does not tell by the names and shapes of its tensors, but the function depends on.
_STRUCTURE = (
    "r",
    "s_matrix",
    "cross_layer",
    "block_size",
    "mlp_block_size",
    "basis",
    "truncate",
    "low_rank",
    "rank_pattern",
    "folded",
    "from_activations",
    "balanced_updates",
    "bias",
    "modules_to_save",
    "trainable_token_indices",
)


def hotswap_adapter(model: PeftModel, model_name_or_path: str, adapter_name: str = "default", **kwargs: Any) -> None:
    """Put another adapter's numbers into the tensors of a loaded one; a compiled model is not compiled again.

    The counterpart of `peft.utils.hotswap.hotswap_adapter`, which knows LoRA alone.

    Args:
        model: the model; `torch.compile` may have wrapped it.
        model_name_or_path: the adapter to swap in, as for `PeftModel.load_adapter`.
        adapter_name: the loaded adapter, whose name stays.
        **kwargs: passed to `load_adapter` (`subfolder`, `revision`, `torch_device`, ...).

    Raises:
        ValueError: if the adapters differ in structure, the file does not fit, or the loaded adapter is merged;
            nothing is changed then.
    """
    known = model.peft_config.get(adapter_name)
    if not isinstance(known, CloverConfig):
        raise ValueError(f"adapter {adapter_name!r}: expected a loaded CLOVER adapter, found {type(known).__name__}")
    merged = [name for name, layer in clover_layers(model) if adapter_name in layer.merged_adapters]
    if merged:
        raise ValueError(f"{merged[0]}: adapter {adapter_name!r} is merged; call unmerge_adapter before swapping it")
    hub = {key: kwargs[key] for key in ("subfolder", "revision", "cache_dir", "token") if key in kwargs}
    other = PeftConfig.from_pretrained(model_name_or_path, **hub)
    if not isinstance(other, CloverConfig):
        raise ValueError(f"{model_name_or_path}: expected a CLOVER adapter, found {type(other).__name__}")
    for name in _STRUCTURE:
        if getattr(known, name) != getattr(other, name):
            raise ValueError(
                f"{model_name_or_path}: expected {name}={getattr(known, name)!r} as in the loaded adapter, found "
                f"{getattr(other, name)!r}; load it under a name of its own with load_adapter"
            )
    model.load_adapter(model_name_or_path, adapter_name, **kwargs)
