"""Merging: adapters written into the base weight, `W <- (I + E dS C) W + B A`, and into the bias."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from .adapter_tensors import WHOLE, AdapterTensors
from .fused_maps import apply_maps


def check_truncation(layer: AdapterTensors, adapter_names: Iterable[str], use: str) -> None:
    """Refuse to use two adapters together that both replace their input.

    Args:
        layer: the layer.
        adapter_names: the adapters.
        use: what they are to be, "active" or "merged".

    Raises:
        ValueError: naming them.
    """
    truncating = [n for n in dict.fromkeys(adapter_names) if any(spec.truncate for spec in layer.specs.get(n, ()))]
    if len(truncating) > 1:
        raise ValueError(
            f"{layer.name}: expected at most one {use} adapter with truncate=True, found {truncating}; use one of "
            "them alone, or make one permanent with merge_and_unload first"
        )


def check_merge(layer: AdapterTensors, adapter_names: list[str]) -> None:
    """Raise what merging these adapters would, short of computing the result.

    Raises:
        ValueError: if two of them truncate, one has no bases, or another tuner's update lies below.
    """
    check_truncation(layer, adapter_names, "merged")
    below = layer.base_layer
    if isinstance(below, BaseTunerLayer) and not below.merged:
        raise ValueError(
            f"{layer.name}: expected a plain projection to merge into, found {type(below).__name__} with an update "
            "beside its weight, which the merge would leave out; merge that adapter first"
        )
    for adapter_name in adapter_names:
        layer.check_bases(adapter_name, "merge")


@torch.no_grad()
def map_constant(layer: AdapterTensors, z: Tensor, adapter_names: list[str]) -> Tensor:
    """The map of a weight or bias, (..., out_features), in at least float32 and outside of autocast.

    The function that maps activations maps the transposed weight and the bias: merging is this map of the weight.
    """
    z = z.detach().to(torch.promote_types(z.dtype, torch.float32))
    with torch.autocast(device_type=z.device.type, enabled=False):
        return apply_maps(z, layer.maps(adapter_names))


@torch.no_grad()
def map_weight(layer: AdapterTensors, transposed: Tensor, adapter_names: list[str]) -> Tensor:
    """What adapters make of a transposed weight, (in_features, out_features), in at least float32."""
    result = map_constant(layer, transposed, adapter_names)
    for name in adapter_names:
        if name in layer.clover_A:
            a, b = (getattr(layer, part)[name].get(WHOLE) for part in ("clover_A", "clover_B"))
            with torch.autocast(device_type=result.device.type, enabled=False):
                result = result + (b.to(result) @ a.to(result)).mT
    return result


@torch.no_grad()
def delta_weight(layer: AdapterTensors, adapter_name: str) -> Tensor:
    """What the adapter adds to the base weight, in the base weight's layout and at least float32."""
    layer.check_bases(adapter_name, "merge")
    with layer.base_weight.whole():
        weight = layer.base_weight.transposed()
        return layer.base_weight.as_stored(map_weight(layer, weight, [adapter_name]) - weight)


@torch.inference_mode(False)  # what is merged stays in the model, where it may be trained
@torch.no_grad()
def merged_tensors(
    layer: AdapterTensors, adapter_names: list[str], safe_merge: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Weight (base layout and dtype) and bias with the adapters merged; nothing is changed.

    Raises:
        ValueError: with `safe_merge`, if a merged number is not finite; and see `check_merge`.
    """
    check_merge(layer, adapter_names)
    base = layer.base_weight
    dtype = base.stored.dtype if base.stored.is_floating_point() else torch.float32
    weight = base.as_stored(map_weight(layer, base.transposed(), adapter_names).to(dtype))
    bias = base.bias
    if bias is not None:
        bias = map_constant(layer, bias, adapter_names).to(bias.dtype)
    if safe_merge and not all(torch.isfinite(t).all() for t in (weight, bias) if t is not None):
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken: it "
            f"would make {layer.name} NaN or infinite; nothing was merged here"
        )
    return weight.contiguous(), bias
