"""What an adapter's file holds, and the checks made before any of it is loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .adapter_tensors import BASES_CHECKSUM, WHOLE, tensor_keys
from .base_check import check_fingerprint, fingerprint
from .bases import frozen_tensors, inner_model
from .block_spec import BlockSpec, BlockTensors
from .config import CloverConfig
from .file_check import check_tensors
from .layer import CloverLayer

# Largest relative difference of a probe of the bases that is put down to rounding.
PROBE_TOLERANCE = 1e-2


def select_for_saving(name: str, layer: CloverLayer, adapter_name: str, config: CloverConfig, state: dict) -> None:
    """Leave in `state` what `config.save_bases` asks for, for one layer: bases and S, S alone, or one folded map.

    Raises:
        ValueError: if the adapter's bases were never computed or loaded.
    """
    layer.check_bases(adapter_name, "save")
    bias = f"{name}.base_layer.bias" if name else "base_layer.bias"
    if bias in state and layer.merged and layer.base_weight.bias is not None:
        state[bias] = layer.base_weight.bias.detach()
    for spec in layer.specs[adapter_name]:
        keys = tensor_keys(name, adapter_name, spec.name)
        if keys["clover_S"] in state:  # where the model's own state dict leaves the bases out (`SliceTensors`)
            for attribute in spec.base_shapes:
                if keys[attribute] not in state:
                    state[keys[attribute]] = getattr(layer, attribute)[adapter_name].get(spec.name)
        if config.save_bases is True or spec.basis == "folded" or keys["clover_S"] not in state:
            continue
        tensors = BlockTensors.of({attribute: state.get(key) for attribute, key in keys.items()})
        for attribute in ("clover_U", "clover_V"):
            state.pop(keys[attribute], None)
        if config.save_bases == "folded":
            del state[keys["clover_S0"]]
            state[keys["clover_S"]] = spec.residual_map(tensors)
        elif tensors.u is not None:
            state[keys[BASES_CHECKSUM]] = _probe(tensors.u)


def name_bases(name: str, layer: CloverLayer, adapter_name: str, state: dict[str, Tensor]) -> None:
    """Give the bases in a file the model's keys where the model's own state dict leaves them out (`SliceTensors`), for
    one layer: peft names what it finds there. In the file they are without the adapter's name, and with the prefix of
    a `PeftModel` also where the model is a bare one."""
    for spec in layer.specs[adapter_name]:
        for attribute, key in tensor_keys(name, adapter_name, spec.name).items():
            in_file = f"{name}.{attribute}.{spec.name}".removeprefix(".")
            for found in (in_file, f"base_model.model.{in_file}"):
                if attribute in spec.base_shapes and key not in state and found in state:
                    state[key] = state.pop(found)


def take_checkpoint(
    model: nn.Module,
    name: str,
    layer: CloverLayer,
    adapter_name: str,
    config: CloverConfig,
    state: dict[str, Tensor],
) -> None:
    """Compare what a file holds for one layer with the layer, and add to it the bases that were not saved.

    Nothing is loaded here.

    Args:
        model: the model that is loaded into.
        name: path of the layer in it, as in the keys of `state`.
        layer: the layer.
        adapter_name: the adapter.
        config: its config.
        state: the file's tensors by the model's keys; changed in place.

    Raises:
        ValueError: naming the module, what was expected, what was found and what to do.
    """
    inner, computed = inner_model(model), None
    if beside := {a: tuple(t[WHOLE].shape) for a, t in layer.trained_tensors(adapter_name).items() if a != "clover_S"}:
        check_tensors(layer, config, tensor_keys(name, adapter_name, WHOLE), beside, state)
    for spec in layer.specs[adapter_name]:
        keys = tensor_keys(name, adapter_name, spec.name)
        probe = _take_probe(name, spec, state)
        expected = {"clover_S": spec.s_shape, **spec.base_shapes}
        if probe is not None:
            expected = {a: shape for a, shape in expected.items() if a not in ("clover_U", "clover_V")}
        check_tensors(layer, config, keys, expected, state, folded=spec.basis == "folded")
        if config.check_base and (here := fingerprint(inner, layer.base_weight, spec)) is not None:
            check_fingerprint(layer.base_weight, spec, config, here, state[keys["clover_norm"]].to(here))
        if probe is None:
            continue
        tensors = layer.tensors(adapter_name, spec)
        u, v = tensors.u, tensors.v
        if u is None or not layer.has_bases(adapter_name):
            computed = computed or frozen_tensors(inner, layer, layer.specs[adapter_name])
            if computed is None:
                readable = layer.base_weight.is_readable
                without = "a base model without weights; load it first"
                raise ValueError(
                    f"{layer.name}: the adapter was saved without its bases, and they cannot be computed from "
                    f"{without if readable else layer.base_weight.precision + ' weights'}, or save the adapter with "
                    "save_bases=True"
                )
            u, v = computed[spec.name]["clover_U"], computed[spec.name].get("clover_V")
        if config.check_base:
            _check_probe(layer, spec, u, probe.to(u))
        dtype = state[keys["clover_S0"]].dtype
        state[keys["clover_U"]] = u.to(dtype)
        if v is not None:
            state[keys["clover_V"]] = v.to(dtype)


def is_untouched(layers: dict[str, CloverLayer], adapter_name: str) -> bool:
    """Whether the adapter is still as it was made: nothing loaded, nothing trained."""
    return not any(layer.is_trained(adapter_name) for layer in layers.values())


def _take_probe(name: str, spec: BlockSpec, state: dict[str, Tensor]) -> Tensor | None:
    """The probe of one slice. It is no tensor of the layer, so its key is still the file's: without an adapter's name,
    and with the prefix of a `PeftModel` also where the adapter is loaded into a bare model."""
    key = f"{name}.{BASES_CHECKSUM}.{spec.name}" if name else f"{BASES_CHECKSUM}.{spec.name}"
    found = [state.pop(k) for k in (key, f"base_model.model.{key}") if k in state]
    return found[0] if found else None


def _probe(coordinates: Tensor) -> Tensor:
    """(H, r): C times a fixed vector; tells whether other bases are the same, signs and order included."""
    d = coordinates.shape[-1]
    return coordinates @ torch.cos(torch.arange(1, d + 1, dtype=coordinates.dtype, device=coordinates.device))


def _check_probe(layer: CloverLayer, spec: BlockSpec, coordinates: Tensor, there: Tensor) -> None:
    here = _probe(coordinates)
    scale = torch.linalg.vector_norm(coordinates, dim=-1).clamp(min=1e-30)
    if float(((here - there).abs() / scale).max()) > PROBE_TOLERANCE:
        raise ValueError(
            f"{layer.name} ({spec.part}): the adapter was saved with save_bases=False, and the bases computed here "
            "are not those it was trained with (equal singular values, or a base in another precision); load it on "
            "the base it was trained on and save it with save_bases=True"
        )
