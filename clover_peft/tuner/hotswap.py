"""Swaps a loaded adapter for another one in place."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from peft import PeftConfig, PeftModel

from .config import CloverConfig
from .layers import clover_layers

# The adapter's function does not depend on these fields, or the names and shapes in its file show a difference.
_FREE = {
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "head_dim",
    "num_heads",
    "clover_dropout",
    "save_bases",
    "init_weights",
    "check_base",
    "base_precision",
    "max_condition",
    *(field.name for field in fields(PeftConfig)),
}
# Neither order nor repetition counts: peft adds the names of a task's head again whenever it loads an adapter of it.
_NAMES = {"modules_to_save", "target_parameters"}


def hotswap_adapter(model: PeftModel, model_name_or_path: str, adapter_name: str = "default", **kwargs: Any) -> None:
    """Load another adapter's numbers into the tensors of a loaded one; a compiled model is not compiled again.

    It corresponds to `peft.utils.hotswap.hotswap_adapter`, which supports LoRA only.

    Args:
        model: the model; `torch.compile` may have wrapped it.
        model_name_or_path: the adapter to swap in, as for `PeftModel.load_adapter`.
        adapter_name: the loaded adapter, which keeps its name.
        **kwargs: passed to `load_adapter` (`subfolder`, `revision`, `torch_device`, ...).

    Raises:
        ValueError: if the adapters differ in structure, the file does not fit, or the loaded adapter is merged; then
            nothing is changed.
    """
    known = model.peft_config.get(adapter_name)
    if not isinstance(known, CloverConfig):
        found = "none" if known is None else f"one with a {type(known).__name__}"
        raise ValueError(
            f"adapter {adapter_name!r}: expected a loaded CLOVER adapter, found {found}; pass the name of one of "
            f"{list(model.peft_config)} that is CLOVER's, or load it first with load_adapter"
        )
    if merged := [name for name, layer in clover_layers(model) if adapter_name in layer.merged_adapters]:
        raise ValueError(f"{merged[0]}: adapter {adapter_name!r} is merged; call unmerge_adapter before swapping it")
    hub = {key: kwargs[key] for key in ("subfolder", "revision", "cache_dir", "token") if key in kwargs}
    other = PeftConfig.from_pretrained(model_name_or_path, **hub)
    if not isinstance(other, CloverConfig):
        raise ValueError(
            f"{model_name_or_path}: expected a CLOVER adapter, found {type(other).__name__}; load it under a name of "
            "its own with load_adapter"
        )
    for name in (field.name for field in fields(CloverConfig) if field.name not in _FREE):
        values = [getattr(config, name) for config in (known, other)]
        if name in _NAMES:
            values = [set(names or ()) for names in values]
        if values[0] != values[1]:
            raise ValueError(
                f"{model_name_or_path}: expected {name}={getattr(known, name)!r} as in the loaded adapter, found "
                f"{getattr(other, name)!r}; load it under a name of its own with load_adapter"
            )
    layers = [layer for _, layer in clover_layers(model, adapter_name)]
    before = [layer.specs[adapter_name] for layer in layers]
    recorded = {name: getattr(known, name) for name in ("base_precision", "max_condition")}
    try:
        for name in recorded:
            setattr(known, name, getattr(other, name))
        for layer in layers:
            layer.specs[adapter_name] = tuple(  # `max_condition` limits the bases of whole blocks alone
                replace(spec, max_condition=other.max_condition)
                if spec.basis != "folded" and spec.r == spec.size
                else spec
                for spec in layer.specs[adapter_name]
            )
        model.load_adapter(model_name_or_path, adapter_name, **kwargs)
    except BaseException:
        for name, value in recorded.items():
            setattr(known, name, value)
        for layer, specs in zip(layers, before, strict=True):
            layer.specs[adapter_name] = specs
        raise
