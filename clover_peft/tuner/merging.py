"""Merging: adapters written into the base weight, `W <- (I + E dS C) W + B A`, and into the bias."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from .adapter_tensors import AdapterTensors
from .fused_maps import apply_maps


def check_truncation(layer: AdapterTensors, adapter_names: Iterable[str], use: str) -> None:
    """Refuse two truncating adapters together, because each replaces its input; `use` is "active" or "merged".

    Raises:
        ValueError: naming the adapters.
    """
    truncating = [n for n in dict.fromkeys(adapter_names) if any(spec.truncate for spec in layer.specs.get(n, ()))]
    if len(truncating) > 1:
        raise ValueError(
            f"{layer.name}: expected at most one {use} adapter with truncate=True, found {truncating}; use one of "
            "them alone, or make one permanent with merge_and_unload first"
        )


def check_merge(layer: AdapterTensors, adapter_names: list[str]) -> None:
    """Refuse adapters that cannot be merged, without computing the result.

    Raises:
        ValueError: if two of them truncate, one has no bases, or another tuner has an unmerged update below.
    """
    check_truncation(layer, adapter_names, "merged")
    below = layer.below
    if isinstance(below, BaseTunerLayer) and not below.merged:
        raise ValueError(
            f"{layer.name}: expected a plain projection to merge into, found {type(below).__name__} with an update "
            "beside its weight, which the merge would leave out; merge that adapter first"
        )
    for adapter_name in adapter_names:
        layer.check_bases(adapter_name, "merge")


@torch.no_grad()
def map_constant(layer: AdapterTensors, z: Tensor, adapter_names: list[str]) -> Tensor:
    """The map of a transposed weight or a bias, (..., out_features), in at least float32 and outside of autocast.

    Merging applies the map to the weight and bias, as the forward pass applies it to activations.
    """
    z = z.detach().to(torch.promote_types(z.dtype, torch.float32))
    with torch.autocast(device_type=z.device.type, enabled=False):
        return apply_maps(z, layer.maps(adapter_names))


@torch.no_grad()
def map_weight(layer: AdapterTensors, transposed: Tensor, adapter_names: list[str]) -> Tensor:
    """A transposed weight, (in_features, out_features), with maps and low-rank parts, in at least float32."""
    result = map_constant(layer, transposed, adapter_names)
    with torch.autocast(device_type=result.device.type, enabled=False):
        return layer.add_low_rank(result, None, adapter_names)


@torch.no_grad()
def delta_weight(layer: AdapterTensors, adapter_name: str) -> Tensor:
    """The adapter's update of the base weight, in the base weight's layout and at least float32."""
    if adapter_name not in layer.specs:
        raise ValueError(f"{layer.name}: expected one of the adapters {list(layer.specs)}, found {adapter_name!r}")
    layer.check_bases(adapter_name, "merge")
    with layer.base_weight.whole():
        weight = layer.base_weight.transposed()
        adapted = map_weight(layer, weight, [adapter_name])
        return layer.base_weight.as_stored(adapted) - layer.base_weight.as_stored(weight)


@torch.inference_mode(False)  # the results stay in the model, where they may be trained
@torch.no_grad()
def merged_tensors(
    layer: AdapterTensors, adapter_names: list[str], safe_merge: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Weight (base layout and dtype) and bias with the adapters merged; the layer is not changed.

    Raises:
        ValueError: as `check_merge`, and with `safe_merge` if a result is not finite.
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
