"""Checks made before any tensor of an adapter's file is loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .adapter_tensors import FROZEN, TRAINED, tensor_keys
from .config import CloverConfig
from .layer import CloverLayer


def check_nothing_left(
    model: nn.Module,
    layers: dict[str, CloverLayer],
    adapter_name: str,
    state: dict[str, Tensor],
) -> None:
    """Refuse a file that holds more than the adapter: maps without a place in the model, or weights of the base.

    Args:
        model: the model that is loaded into.
        layers: the adapter's layers by their paths, as in the keys of `state`.
        adapter_name: the adapter.
        state: the file's tensors by the model's keys.

    Raises:
        ValueError: naming the first tensor that is left over.
    """
    known = set()
    for name, layer in layers.items():
        parts = [(a, spec.name) for spec in layer.specs[adapter_name] for a in spec.base_shapes]
        parts += [(a, part) for a, tensors in layer.trained_tensors(adapter_name).items() for part in tensors]
        known |= {tensor_keys(name, adapter_name, part)[attribute] for attribute, part in parts}
    attributes = {*TRAINED, *FROZEN}
    left = sorted(key for key in state if key not in known and attributes & set(key.split(".")))
    if left:
        module, _, tensor = left[0].removeprefix("base_model.model.").rpartition(".clover_")
        raise ValueError(
            f"{module}: expected nothing but what the adapter's configuration targets, found clover_{tensor} and "
            f"{len(left) - 1} more tensors in its file without a place in this model; load it with its own "
            "adapter_config.json (a folded one takes folded files only) onto the base model it was trained on"
        )
    # Peft saves embeddings that were resized, and biases, under the base model's own names.
    found = (_embedding(model, side) for side in ("input", "output"))
    embeddings = {inner for embedding in found if embedding is not None for inner in embedding.modules()}
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            key = f"{path}.{name}".removeprefix(".")
            if key in state and not (adapter_name in key.split(".") or module in embeddings or name == "bias"):
                raise ValueError(
                    f"{key}: expected no weights of the base model in the adapter's file, found some, which would "
                    "replace its own; the file was not written by save_pretrained, take a copy that was"
                )


def _embedding(model: nn.Module, side: str) -> nn.Module | None:
    get = getattr(model, f"get_{side}_embeddings", None)  # not every model is transformers'
    try:
        return None if get is None else get()
    except NotImplementedError:  # of transformers' models not every one has embeddings
        return None


def check_tensors(
    layer: CloverLayer,
    config: CloverConfig,
    keys: dict[str, str],
    expected: dict[str, tuple[int, ...]],
    state: dict[str, Tensor],
    folded: bool = False,
) -> None:
    missing = [attribute for attribute in expected if keys[attribute] not in state]
    if missing or (folded and keys["clover_S0"] in state):
        raise ValueError(
            f"{layer.name}: expected {sorted(expected)} in the adapter's file, found "
            f"{sorted(a for a in keys if keys[a] in state)}; it belongs to another configuration, or was saved folded "
            "and can then only be loaded with its own adapter_config.json, for inference (checkpoints to resume "
            "from are saved with save_bases=True)"
        )
    for attribute, shape in expected.items():
        value = state[keys[attribute]]
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{layer.name}: expected {attribute} of shape {shape}, found {tuple(value.shape)} in the adapter's "
                f"file; load it onto the base model it was trained on ({config.base_model_name_or_path})"
            )
        if not value.is_meta and not torch.isfinite(torch.stack(torch.aminmax(value))).all():
            raise ValueError(
                f"{layer.name}: {attribute} in the adapter's file has NaN or infinite values; the file is damaged or "
                "its training diverged, use an earlier checkpoint"
            )
