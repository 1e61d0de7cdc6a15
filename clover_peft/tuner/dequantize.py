"""From a quantised base to plain weights: under an adapter, or onto another copy of the base model.

The effect of a CLOVER map, `E dS C W`, depends on the weights. In another precision of W, rounding times the head's
condition number changes the directions of small singular values. So either the base is dequantised under the adapter,
or the trained update is added to the other weights unchanged.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn

from ..base_model.weight import BaseWeight
from .base_check import check_fingerprint, fingerprint
from .config import CloverConfig
from .experts import refuse_experts
from .layer import CloverLayer
from .layers import clover_layers, inner_model, layers_with
from .merging import map_base_tensor

ModelT = TypeVar("ModelT", bound=nn.Module)


@torch.no_grad()
def dequantize(model: ModelT, dtype: torch.dtype | None = None) -> ModelT:
    """Replace every quantised projection by an `nn.Linear` with the dequantised weights, in place.

    Adapters stay in place and compute the same. Merging afterwards loses only the rounding of `dtype`.

    Args:
        model: a `PeftModel`, or a model with injected adapters or without any.
        dtype: dtype of the new weights; None for the dtype of the model's other weights.

    Returns:
        `model`.

    Raises:
        ValueError: if nothing is quantised, adapters are merged, or a quantised weight cannot be read; then nothing is
            changed.
        TypeError: if bitsandbytes has repacked a 4-bit weight.
    """
    inner: Any = inner_model(model)
    quantised, options = {}, get_quantization_kwargs(inner)
    for path, module in inner.named_modules(remove_duplicate=False):
        if isinstance(module, BaseTunerLayer):
            if module.merged:
                raise ValueError(f"{path}: an adapter is merged; call unmerge_adapter first, and merge afterwards")
        elif resolve_quantization_backend(module, **options) is not None:
            quantised[path] = weight = BaseWeight(module, path, options)
            if not weight.is_readable:
                raise ValueError(
                    f"{path}: expected weights that can be dequantised, found {weight.precision}, which can only "
                    "be run; load the unquantised model and use clover_peft.merge_onto(model, base)"
                )
            weight.check_trainable()
    if not quantised:
        raise ValueError(
            "dequantize: expected a model with quantised projections, found none; use the model as it is, and "
            "model.to(dtype) for another precision"
        )
    dtype = dtype or inner.dtype
    shared: dict[int, Any] = {}  # id of a module or weight -> what replaces it, wherever else it is
    for path, weight in quantised.items():
        module, packed = weight.module, weight.stored
        parent, _, name = path.rpartition(".")
        if id(module) in shared:
            setattr(inner.get_submodule(parent), name, shared[id(module)])
            continue
        plain = nn.Linear(weight.in_features, weight.out_features, bias=module.bias is not None, device="meta")
        if id(packed) not in shared:
            dense = weight.as_stored(weight.transposed())
            shared[id(packed)] = nn.Parameter(dense.to(dtype), requires_grad=False)
        plain.weight = shared[id(packed)]
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.to(dtype), requires_grad=module.bias.requires_grad)
        plain.train(module.training)
        shared[id(module)] = plain
        setattr(inner.get_submodule(parent), name, plain)
    for _, layer in clover_layers(inner):
        layer.base_weight.backend = None  # the projection below is an `nn.Linear` now
    quantizer = getattr(inner, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(inner)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(inner, flag):
            setattr(inner, flag, False)
    return model


@torch.no_grad()
def merge_onto(model: nn.Module, base: ModelT, adapter_name: str = "default") -> ModelT:
    """Add an adapter's update to another copy of the base model, such as the weights before quantisation.

    `W <- W + E dS C W'`, where W' are the weights that the adapter was trained on. This keeps the update exactly;
    loading the adapter onto `base` does not.

    Args:
        model: the model with the adapter, on the base it was trained on.
        base: the same model in plain weights of any floating dtype, without adapters; changed in place.
        adapter_name: the adapter.

    Returns:
        `base`.

    Raises:
        ValueError: if the adapter is not there, or `base` is another model, quantised or adapted; then nothing is
            changed.
    """
    inner = inner_model(model)
    layers = layers_with(inner, adapter_name)
    refuse_experts(layers, "merge_onto")
    config: CloverConfig = model.peft_config[adapter_name]  # type: ignore[index,assignment]
    if inner_model(base) is not base or any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError("base: expected a model without adapters, found some; merge or unload them first")
    for path, layer in layers:
        _check_target(base, path, layer, adapter_name, config)
    for path, layer in layers:
        target: Any = base.get_submodule(path)
        with layer.base_weight.whole():
            own: Any = target.weight
            changed = own + layer.get_delta_weight(adapter_name).to(own.device)
            # A new parameter: another module of base may share the old one.
            target.weight = nn.Parameter(changed.to(own.dtype), requires_grad=own.requires_grad)
            if (own := target.bias) is not None:
                # Biases are never quantised, and may have been trained.
                trained: Any = layer.base_weight.bias
                target.bias = nn.Parameter(
                    map_base_tensor(layer, trained, [adapter_name]).to(own), requires_grad=own.requires_grad
                )
    for path, module in inner.named_modules():
        mine: Any = module
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in mine.modules_to_save:
            base.get_submodule(path).load_state_dict(mine.modules_to_save[adapter_name].state_dict())
        elif isinstance(module, TrainableTokensWrapper) and adapter_name in mine.token_adapter.trainable_tokens_delta:
            base.get_parameter(f"{path}.weight").copy_(mine.token_adapter.get_merged_weights([adapter_name]))
    if config.bias == "all":
        for name, parameter in inner.named_parameters():
            if name.endswith(".bias") and ".base_layer." not in name:
                base.get_parameter(name).copy_(parameter)
    return base


def _check_target(base: nn.Module, path: str, layer: CloverLayer, adapter_name: str, config: CloverConfig) -> None:
    """Refuse a projection that is not the one the adapter was trained on, in plain weights."""
    try:
        target: Any = base.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{path}: expected this projection in base, found none; pass the same model") from None
    reader = BaseWeight(target, path, get_quantization_kwargs(base))
    if reader.backend is not None or not target.weight.is_floating_point():
        raise ValueError(f"{path}: expected plain weights in base, found {reader.precision}; load it unquantised")
    if (reader.in_features, reader.out_features) != (layer.in_features, layer.out_features):
        raise ValueError(
            f"{path}: expected a projection from {layer.in_features} to {layer.out_features} features in base, found "
            f"{reader.in_features} to {reader.out_features}; pass the same model"
        )
    for spec in layer.specs[adapter_name] if config.check_base else ():
        here, there = fingerprint(base, reader, spec), layer.tensors(adapter_name, spec).norm
        if here is not None and there is not None:
            check_fingerprint(reader, spec, config, here, there.to(here))
