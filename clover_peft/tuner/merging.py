"""Merging: adapters written into the base weight, `W <- (I + E dS C) W + B A`, and into the bias."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..base_model.activations import evaluating
from ..base_model.weight import is_projection, refuse_computed
from .adapter_tensors import AdapterTensors
from .fused_maps import apply_maps


def check_truncation(layer: AdapterTensors, adapter_names: str | Iterable[str], use: str) -> None:
    """Refuse two truncating adapters together, because each replaces its input; `use` is "active" or "merged"."""
    names = [adapter_names] if isinstance(adapter_names, str) else dict.fromkeys(adapter_names)
    truncating = [n for n in names if any(spec.truncate for spec in layer.specs.get(n, ()))]
    if len(truncating) > 1:
        raise ValueError(
            f"{layer.name}: expected at most one {use} adapter with truncate=True, found {truncating}; use one of "
            "them alone, or make one permanent with merge_and_unload first"
        )


def check_merge(layer: AdapterTensors, adapter_names: list[str]) -> None:
    """Refuse adapters that cannot be merged, without computing the result; it may run the projection on two rows.

    Raises:
        ValueError: if two of them truncate, one has no bases, another tuner has an unmerged update below, or the
            projection is one whose weight no merge fits.
        TypeError: if the weight can only be run, as in some quantised formats.
    """
    check_truncation(layer, adapter_names, "merged")
    base = layer.base_weight
    if not base.is_readable:
        raise TypeError(
            f"{layer.name}: expected a weight to merge into, found {base.precision} in a form that can only be run; "
            "leave the adapter unmerged, or merge it into the unquantised model"
        )
    refuse_computed(base.module, layer.name)
    below: Any = getattr(layer.below, "token_adapter", layer.below)
    if isinstance(below, BaseTunerLayer) and not below.merged:
        raise ValueError(
            f"{layer.name}: expected a plain projection to merge into, found {type(below).__name__} with an update "
            "beside its weight, which the merge would leave out; merge that adapter first"
        )
    for adapter_name in adapter_names:
        layer.check_bases(adapter_name, "merge")
    base.check_unchanged()
    with base.whole():
        _refuse_other_forward(layer, adapter_names)


@torch.no_grad()
def _refuse_other_forward(layer: AdapterTensors, adapter_names: list[str]) -> None:
    """Refuse a projection that computes something else than `c (x W^T + b)`; c must be 1 beside a low-rank part.

    A class with a forward method of its own may mask, round or normalise its weight in each pass. It runs once, on
    two random rows.
    """
    base = layer.base_weight
    module, stored = base.module, base.stored
    is_other = is_projection(module) and type(module).forward not in (nn.Linear.forward, Conv1D.forward)
    if base.backend is not None or not is_other or stored.is_meta or isinstance(stored, DTensor):
        return
    x = torch.randn(2, base.in_features, generator=torch.Generator().manual_seed(0)).to(stored)
    with evaluating(module):
        found: Any = module(x)
    expected = x @ (stored if base.fan_in_fan_out else stored.mT)
    if (bias := getattr(module, base.names[1], None)) is not None:
        expected = expected + bias
    difference = float("nan")
    if isinstance(found, Tensor) and found.shape == expected.shape:
        y, z, tiny = found.double(), expected.double(), torch.finfo(torch.float64).tiny
        adds = any(name in layer.clover_A for name in adapter_names)
        scale = 1.0 if adds else (y * z).sum() / (z * z).sum().clamp(min=tiny)
        difference = float((y - scale * z).norm() / y.norm().clamp(min=tiny))
    if not difference <= torch.finfo(stored.dtype).eps ** 0.5:
        raise ValueError(
            f"{layer.name}: expected a projection that computes x W^T + b, found that {type(module).__name__}.forward "
            "does something else, so that the merged model would differ from the adapted one; leave the adapter "
            "unmerged"
        )


@torch.no_grad()
def map_base_tensor(layer: AdapterTensors, tensor: Tensor, adapter_names: list[str]) -> Tensor:
    """`y` of a transposed weight or a bias, (..., out_features), in at least float32.

    The maps are linear in z, so merging applies them to the weight and the bias as the forward pass does to z.
    """
    z = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    return apply_maps(z, layer.maps(adapter_names))


@torch.no_grad()
def map_weight(layer: AdapterTensors, transposed: Tensor, adapter_names: list[str]) -> Tensor:
    """A transposed weight, (in_features, out_features), with maps and low-rank parts, in at least float32."""
    result = map_base_tensor(layer, transposed, adapter_names)
    with torch.autocast(device_type=result.device.type, enabled=False):
        return layer.add_low_rank(result, None, adapter_names)


@torch.inference_mode(False)  # the results stay in the model, where they may be trained
@torch.no_grad()
def merged_tensors(
    layer: AdapterTensors, adapter_names: list[str], safe_merge: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Weight (base layout and dtype) and bias with the adapters merged; the layer is not changed.

    With `safe_merge`, results that are not finite are refused.
    """
    check_merge(layer, adapter_names)
    base = layer.base_weight
    weight = base.as_stored(map_weight(layer, base.transposed(), adapter_names).to(base.merge_dtype))
    bias = base.bias
    if bias is not None:
        bias = map_base_tensor(layer, bias, adapter_names).to(bias.dtype)
    if safe_merge and not all(torch.isfinite(t).all() for t in (weight, bias) if t is not None):
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken: it "
            f"would make {layer.name} NaN or infinite, so nothing was merged here; load it again from a sound file"
        )
    return weight.contiguous(), bias
