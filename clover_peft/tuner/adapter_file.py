"""The tensors in an adapter's file: which ones are saved, and the checks before any of them is loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.linalg import matrix_norm, pinv

from ..io.adapters import embedding_of
from ..io.user_warning import warn
from ..linalg.triangles import pack, unpack
from ..runtime.loading import weights_follow
from .adapter_tensors import BASES_CHECKSUM, FROZEN, PACKED, TRAINED, WHOLE, file_key, tensor_keys
from .base_check import MUCH_CHANGED, check_fingerprint, error_from_rounding, fingerprint
from .bases import compute_frozen_tensors
from .block_spec import BlockSpec, BlockTensors
from .config import CloverConfig
from .layer import CloverLayer
from .layers import inner_model

# The largest relative difference between checksums of equal bases, by rounding.
CHECKSUM_TOLERANCE = 1e-2
# The largest relative error of a map by rounding of S to float32; 2e-6 was measured with condition numbers of 10,000.
ROUNDING = 1e-5


def select_for_saving(name: str, layer: CloverLayer, adapter_name: str, config: CloverConfig, state: dict) -> None:
    """Leave in `state`, for one layer, the tensors that `config.save_bases` asks for.

    True: bases and S; of a C that is lower triangular, the triangles. False: S and a checksum of the bases. "folded":
    the map of each block, in the place of S.
    """
    layer.check_bases(adapter_name, "save")
    bias = f"{name}.base_layer.bias" if name else "base_layer.bias"
    if bias in state and layer.merged and layer.base_weight.bias is not None:
        state[bias] = layer.base_weight.bias.detach()
    for spec in layer.specs[adapter_name]:
        keys = tensor_keys(name, adapter_name, spec.name)
        if keys["clover_S"] in state:  # the model's own state dict may leave out the bases (`GuardedTensors`)
            for attribute, tensor in layer.frozen_tensors(adapter_name, spec).items():
                state.setdefault(keys[attribute], tensor)
        if spec.basis == "folded" or keys["clover_S"] not in state:
            continue
        if config.save_bases is True:
            if spec.packed_shape and (packed := pack(state[keys["clover_U"]])) is not None:
                del state[keys["clover_U"]]
                state[keys[PACKED]] = packed
            continue
        tensors = BlockTensors.of({attribute: state.get(key) for attribute, key in keys.items()})
        for attribute in ("clover_U", "clover_V"):
            state.pop(keys[attribute], None)
        if config.save_bases == "folded":
            del state[keys["clover_S0"]]
            state[keys["clover_S"]] = spec.residual_map(tensors)
        elif tensors.c is not None:
            state[keys[BASES_CHECKSUM]] = _checksum(tensors.c)


def check_and_complete(
    model: nn.Module, layers: dict[str, CloverLayer], adapter_name: str, config: CloverConfig, state: dict[str, Tensor]
) -> None:
    """Check a file's tensors against the model, and add the bases that were not saved. Nothing is loaded here.

    `layers` holds the adapter's layers by their paths, as in the keys of `state`, which is changed in place.

    A state dict of trained tensors alone, which no file is, gets the bases that the adapter has here.

    Warns of a base in another precision than in training, if rounding is much of the adapter's effect on it.
    """
    _unpack(layers, adapter_name, state)
    _check_finite(state)
    if not (config.awaits_weights or weights_follow()):
        _complete(layers, adapter_name, state)
    for name, layer in layers.items():
        _take_layer(model, name, layer, adapter_name, config, state)
    _check_nothing_left(layers, adapter_name, state)
    _check_no_base_weights(model, adapter_name, state)
    if (error := error_from_rounding(layers, adapter_name, config, state)) > MUCH_CHANGED:
        warn(
            f"adapter {adapter_name!r} was trained on {config.base_precision} weights; on this base, whose "
            f"weights are {next(iter(layers.values())).base_weight.precision}, about {error:.0%} of its effect is "
            "rounding (a LoRA, whose update does not depend on the weights, has no such error); load it onto the "
            "weights it was trained on and use clover_peft.dequantize(model) or "
            "clover_peft.merge_onto(model, base)",
        )


def has_same_bases(layers: dict[str, CloverLayer], adapter_name: str, state: dict[str, Tensor]) -> bool:
    """Whether a file's bases are those that the adapter has here, up to rounding, as in a checkpoint of its training.

    The arguments are those of `check_and_complete`.
    """
    _unpack(layers, adapter_name, state)
    for name, layer in layers.items():
        for spec in layer.specs[adapter_name]:
            here = layer.tensors(adapter_name, spec).c
            there = state.get(tensor_keys(name, adapter_name, spec.name)["clover_U"])
            if here is None or here.is_meta or there is None or there.shape != here.shape:
                return False
            difference, size = (torch.linalg.vector_norm(tensor) for tensor in (here - there.to(here), here))
            if not difference <= CHECKSUM_TOLERANCE * size:
                return False
    return True


def _unpack(layers: dict[str, CloverLayer], adapter_name: str, state: dict[str, Tensor]) -> None:
    """Put whole matrices in the places of a file's triangles; one of another shape is left for the check of shapes."""
    for name, layer in layers.items():
        for spec in layer.specs[adapter_name]:
            if (packed := _take(state, name, PACKED, spec.name)) is not None:
                whole = unpack(packed, spec.size) if packed.shape == spec.packed_shape else packed
                state[tensor_keys(name, adapter_name, spec.name)["clover_U"]] = whole


def _complete(layers: dict[str, CloverLayer], adapter_name: str, state: dict[str, Tensor]) -> None:
    """Add the adapter's own tensors to trained tensors alone.

    A folded adapter has none: S of another adapter cannot be told from its maps.
    """
    for layer in layers.values():
        if not layer.has_bases(adapter_name) or any(spec.basis == "folded" for spec in layer.specs[adapter_name]):
            return
    own, frozen = _own_tensors(layers, adapter_name), {*FROZEN, BASES_CHECKSUM}
    if own.keys() & state.keys() and not any(frozen & set(key.split(".")) for key in state):
        for key, tensor in own.items():
            state.setdefault(key, tensor)


def _own_tensors(layers: dict[str, CloverLayer], adapter_name: str) -> dict[str, Tensor]:
    """The adapter's tensors in the model by their keys."""
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for spec in layer.specs[adapter_name]:
            keys = tensor_keys(name, adapter_name, spec.name)
            found |= {keys[a]: tensor for a, tensor in layer.frozen_tensors(adapter_name, spec).items()}
        for a, tensors in layer.trained_tensors(adapter_name).items():
            found |= {tensor_keys(name, adapter_name, part)[a]: tensor.detach() for part, tensor in tensors.items()}
    return found


def _take_layer(
    model: nn.Module, name: str, layer: CloverLayer, adapter_name: str, config: CloverConfig, state: dict[str, Tensor]
) -> None:
    inner, computed = inner_model(model), None
    trained = layer.trained_tensors(adapter_name)
    if low_rank := {a: tuple(tensors[WHOLE].shape) for a, tensors in trained.items() if a != "clover_S"}:
        _check_tensors(layer, config, tensor_keys(name, adapter_name, WHOLE), low_rank, state)
    for spec in layer.specs[adapter_name]:
        keys = tensor_keys(name, adapter_name, spec.name)
        for attribute in spec.base_shapes:
            found = None if keys[attribute] in state else _take(state, name, attribute, spec.name)
            if found is not None:
                state[keys[attribute]] = found
        checksum = _take(state, name, BASES_CHECKSUM, spec.name)
        expected = {"clover_S": spec.s_shape, **spec.base_shapes}
        is_folded = config.unfolds and spec.basis != "folded" and keys["clover_S0"] not in state and checksum is None
        if is_folded:
            expected = {"clover_S": (spec.blocks, spec.size, spec.size), "clover_norm": expected["clover_norm"]}
        elif checksum is not None:
            expected = {a: shape for a, shape in expected.items() if a not in ("clover_U", "clover_V")}
        _check_tensors(layer, config, keys, expected, state, folded=spec.basis == "folded")
        if config.check_base and (here := fingerprint(inner, layer.base_weight, spec)) is not None:
            check_fingerprint(layer.base_weight, spec, config, here, state[keys["clover_norm"]].to(here))
        if checksum is None and not is_folded:
            continue
        frozen = layer.tensors(adapter_name, spec)
        if frozen.c is None or not layer.has_bases(adapter_name):
            computed = computed or compute_frozen_tensors(inner, layer.base_weight, layer.specs[adapter_name])
            if computed is None:
                source = "a base model without weights; load it first"
                if not layer.base_weight.is_readable:
                    source = f"{layer.base_weight.precision} weights"
                raise ValueError(
                    f"{layer.name}: the adapter was saved without its bases, and they cannot be computed from "
                    f"{source}, or save the adapter with save_bases=True"
                )
            frozen = BlockTensors.of({"clover_S": state[keys["clover_S"]], **computed[spec.name]})
        dtype = state[keys["clover_norm"]].dtype
        if is_folded:
            frozen = unfolded(layer.name, spec, state[keys["clover_S"]].to(dtype), frozen)
            state[keys["clover_S"]] = frozen.s
        bases = {"clover_U": frozen.c, "clover_V": frozen.e, **({"clover_S0": frozen.s0} if is_folded else {})}
        if checksum is not None and config.check_base and frozen.c is not None:
            _check_checksum(layer, spec, frozen.c, checksum.to(frozen.c))
        state |= {keys[a]: tensor.to(dtype) for a, tensor in bases.items() if tensor is not None}


def _take(state: dict[str, Tensor], name: str, attribute: str, part: str) -> Tensor | None:
    """Remove a tensor by its key in the file and return it.

    Peft renames only keys of the model's own state dict. Others have no adapter's name, and may have the prefix of a
    `PeftModel` although the model is a bare one.
    """
    key = file_key(f"{name}.{attribute}.{part}".removeprefix("."))
    found = [state.pop(k) for k in (key, f"base_model.model.{key}") if k in state]
    return found[0] if found else None


def _checksum(coordinates: Tensor) -> Tensor:
    """(H, r): C times a fixed vector. Bases with other signs or another order have another checksum."""
    d = coordinates.shape[-1]
    return coordinates @ torch.cos(torch.arange(1, d + 1, dtype=coordinates.dtype, device=coordinates.device))


def _check_checksum(layer: CloverLayer, spec: BlockSpec, coordinates: Tensor, there: Tensor) -> None:
    scale = torch.linalg.vector_norm(coordinates, dim=-1).clamp(min=1e-30)
    if float(((_checksum(coordinates) - there).abs() / scale).max()) > CHECKSUM_TOLERANCE:
        raise ValueError(
            f"{layer.name} ({spec.part}): the adapter was saved with save_bases=False, and the bases computed here "
            "are not those it was trained with (equal singular values, or a base in another precision); load it on "
            "the base it was trained on and save it with save_bases=True"
        )


def _check_tensors(
    layer: CloverLayer,
    config: CloverConfig,
    keys: dict[str, str],
    expected: dict[str, tuple[int, ...]],
    state: dict[str, Tensor],
    folded: bool = False,
) -> None:
    """Check that `state` has the expected attributes, with their shapes."""
    if any(keys[attribute] not in state for attribute in expected) or (folded and keys["clover_S0"] in state):
        raise ValueError(
            f"{layer.name}: expected {sorted(expected)} in the adapter's file, found "
            f"{sorted(a for a in keys if keys[a] in state)}; it belongs to another configuration, or was saved folded "
            "and can then only be loaded with its own adapter_config.json (checkpoints to resume from are saved with "
            "save_bases=True)"
        )
    for attribute, shape in expected.items():
        value = state[keys[attribute]]
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{layer.name}: expected {attribute} of shape {shape}, found {tuple(value.shape)} in the adapter's "
                f"file; load it onto the base model it was trained on ({config.base_model_name_or_path})"
            )


def _check_finite(state: dict[str, Tensor]) -> None:
    """Refuse numbers that are not finite, also in modules that are saved whole."""
    for key, value in state.items():
        has_numbers = value.is_floating_point() and value.numel() and not value.is_meta
        if has_numbers and not torch.isfinite(torch.stack(torch.aminmax(value.detach()))).all():
            path = key.removeprefix("base_model.model.").replace(".clover_", ": clover_")
            raise ValueError(
                f"{path} in the adapter's file has NaN or infinite values; the file is damaged or its training "
                "diverged, use an earlier checkpoint"
            )


def _check_nothing_left(layers: dict[str, CloverLayer], adapter_name: str, state: dict[str, Tensor]) -> None:
    """Refuse tensors of an adapter that have no place in the model."""
    known, attributes = _own_tensors(layers, adapter_name), {*TRAINED, *FROZEN}
    if left := sorted(key for key in state if key not in known and attributes & set(key.split("."))):
        module, _, tensor = left[0].removeprefix("base_model.model.").rpartition(".clover_")
        raise ValueError(
            f"{module}: expected only tensors that the adapter's configuration targets, found clover_{tensor} and "
            f"{len(left) - 1} more tensors in its file without a place in this model; load it with its own "
            "adapter_config.json (a folded one takes folded files only) onto the base model it was trained on"
        )


def _check_no_base_weights(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> None:
    """Refuse weights of the base model. Peft does save resized embeddings and biases under the base's own names."""
    if all(adapter_name in key.split(".") for key in state):
        return
    found = (embedding_of(model, side) for side in ("input", "output"))
    embeddings = {inner for embedding in found if embedding is not None for inner in embedding.modules()}
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            key = f"{path}.{name}".removeprefix(".")
            if key in state and not (adapter_name in key.split(".") or module in embeddings or name == "bias"):
                raise ValueError(
                    f"{key}: expected no weights of the base model in the adapter's file, found some, which would "
                    "replace its own; the file was not written by save_pretrained, take a copy that was"
                )


def unfolded(name: str, spec: BlockSpec, whole: Tensor, frozen: BlockTensors) -> BlockTensors:
    """The tensors of a slice whose map is `whole` (ours): `dS = E^+ M C^+`, which is `S0 C M E S0` where `E S0 C = I`.

    Args:
        name: the layer, for messages.
        spec: the slice.
        whole: (H, d, d), M of every block.
        frozen: the slice's bases, in any dtype; its S is not used.

    Returns:
        The tensors, in the dtype and on the device of `whole`. Costs H d^3, in float64.

    Raises:
        ValueError: if M is not a map of these bases, so that a map in them would be another one.
    """
    tensors = BlockTensors._make(None if tensor is None else tensor.to(whole) for tensor in frozen)
    exact = BlockTensors._make(None if tensor is None else tensor.double() for tensor in tensors)
    assert exact.c is not None
    s = whole.double() @ pinv(exact.c)
    if exact.e is not None:
        s = pinv(exact.e) @ s
    if spec.s_matrix == "diagonal":
        s = s.diagonal(dim1=-2, dim2=-1)
    tensors = tensors._replace(s=s.to(whole))
    error = matrix_norm(spec.residual_map(exact._replace(s=tensors.s.double())) - whole)
    error = error / matrix_norm(whole.double()).clamp(min=1e-30)
    if not float(error.max()) <= ROUNDING:
        block = int(error.argmax())
        raise ValueError(
            f"{name} ({spec.part}, block {block}): expected a map that {spec.r} of {spec.size} directions with a "
            f"{spec.s_matrix} S{' that truncates' if spec.truncate else ''} can express in this base model's bases, "
            f"found one of which {float(error[block]):.1%} is outside; load the adapter with its own "
            "adapter_config.json, or for inference with is_trainable=False"
        )
    return tensors
