"""From a quantised base to plain weights: under an adapter, or onto another copy of the base model.

The effect of a CLOVER map, `E dS C W`, depends on the weights. In another precision of W, rounding times the head's
condition number changes the directions of small singular values. So either the base is dequantised under the adapter,
or the trained update is added to the other weights unchanged.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from ..base_model.weight import BaseWeight
from .base_check import check_fingerprint, fingerprint
from .config import CloverConfig
from .experts import refuse_experts
from .layer import CloverLayer
from .layers import clover_layers, inner_model, layers_with
from .merging import map_base_tensor
from .tied_weights import untie_config

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
            weight.check_not_repacked()
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
    targets = [(layer, _target(base, path, layer, adapter_name, config)) for path, layer in layers]
    copied = _trained_beside(inner, adapter_name, config)
    _check_tensors(base, copied)
    for layer, target in targets:
        with layer.base_weight.whole():
            delta = layer.get_delta_weight(adapter_name)
            if layer.base_weight.fan_in_fan_out != target.fan_in_fan_out:  # Quantisation turns a Conv1D around.
                delta = delta.mT
            module = target.module
            changed = module.weight + delta.to(module.weight.device)
            # A new parameter: another module of base may share the old one.
            module.weight = nn.Parameter(changed.to(module.weight.dtype), requires_grad=module.weight.requires_grad)
            if (own := module.bias) is not None:
                # Biases are never quantised, and may have been trained.
                trained: Any = layer.base_weight.bias
                module.bias = nn.Parameter(
                    map_base_tensor(layer, trained, [adapter_name]).to(own), requires_grad=own.requires_grad
                )
    _copy(base, copied)
    untie_config(base)
    return base


def _copy(base: nn.Module, values: dict[str, Tensor]) -> None:
    """Write tensors by name. A parameter that others share gets a copy of its own, unless all get the same value."""
    sharing = defaultdict(list)
    for name, parameter in base.named_parameters(remove_duplicate=False):
        sharing[id(parameter)].append(name)
    state = base.state_dict(keep_vars=True)
    for name, value in values.items():
        own = state[name]
        if all(other in values and torch.equal(values[other], value) for other in sharing[id(own)]):
            own.copy_(value)
        else:
            path, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(path), leaf, nn.Parameter(value.to(own, copy=True), own.requires_grad))


def _trained_beside(inner: nn.Module, adapter_name: str, config: CloverConfig) -> dict[str, Tensor]:
    """What an adapter has trained beside its targets: name of a tensor of the base model -> its value."""
    found: dict[str, Tensor] = {}
    for path, module in inner.named_modules():
        mine: Any = module
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in mine.modules_to_save:
            of_module = mine.modules_to_save[adapter_name].state_dict()
            found |= {f"{path}.{name}": value for name, value in of_module.items()}
        elif isinstance(module, TrainableTokensWrapper) and adapter_name in mine.token_adapter.trainable_tokens_delta:
            found[f"{path}.weight"] = mine.token_adapter.get_merged_weights([adapter_name])
    if config.bias == "all":
        biases = inner.named_parameters()
        found |= {name: value for name, value in biases if name.endswith(".bias") and ".base_layer." not in name}
    return found


def _check_tensors(base: nn.Module, values: dict[str, Tensor]) -> None:
    """Refuse a base that lacks one of these tensors."""
    state = base.state_dict()
    for name, value in values.items():
        there = state.get(name)
        if there is None or there.shape != value.shape:
            shape = "none" if there is None else f"one of shape {tuple(there.shape)}"
            raise ValueError(
                f"{name}: expected a tensor of shape {tuple(value.shape)} in base, found {shape}; pass the same model"
            )


def _target(base: nn.Module, path: str, layer: CloverLayer, adapter_name: str, config: CloverConfig) -> BaseWeight:
    """The projection that the adapter was trained on, in plain weights; another one is refused."""
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
    return reader
