"""What an adapter's file holds, and the checks made before any of it is loaded."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .bases import fingerprint, frozen_tensors, inner_model
from .blocks import BlockSpec, BlockTensors
from .layer import FROZEN, TRAINED, WHOLE, CloverLayer, onloaded

if TYPE_CHECKING:
    from .config import CloverConfig


# Largest relative difference of a fingerprint that rounding of the base's weights explains, by the coarser of the two
# precisions. Rounding averages out over a row: what is left of it is far below the precision itself.
ROUNDING = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3, "bnb 8bit": 1e-2}
COARSE = 0.1  # any other quantisation
# Root mean square of what rounding to a precision changes in normally distributed weights, relative to theirs.
ROUNDED = {"float64": 0.0, "float32": 0.0, "bfloat16": 1.7e-3, "float16": 2e-4, "bnb 8bit": 8e-3, "bnb 4bit": 0.092}
# Share of an adapter's effect that rounding of the base's weights may change without a word.
MUCH_CHANGED = 0.05
# Largest relative difference of a probe of the bases that is put down to rounding.
PROBE_TOLERANCE = 1e-2
_PROBE = "clover_probe"
_CARD_HEADING = "## How to load"
_AUTO_CLASSES = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}


def check_weight_file(path: str) -> None:
    """Check that an adapter's weight file, if it exists, can be read and is CLOVER's.

    Raises:
        ValueError: naming the file, what is wrong with it and what to do.
    """
    if not os.path.exists(path):
        return
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: expected a whole safetensors file, found one that cannot be read ({error}); it was probably cut "
            "short or overwritten: copy or download it again"
        ) from error
    if not any(".clover_S." in key or key.startswith("clover_S.") for key in keys):
        raise ValueError(
            f"{path}: expected a CLOVER adapter (keys with clover_S), found {len(keys)} keys such as "
            f"{keys[0] if keys else 'none'!r}; load it with the method named in its own adapter_config.json"
        )


def complete_model_card(path: str, base: str | None, task_type: str | None) -> None:
    """Add the loading recipe to the model card that peft wrote, once."""
    if not os.path.isfile(path):
        # Of an adapter that is not named "default", peft writes the card one folder up.
        path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
        if os.path.exists(os.path.join(os.path.dirname(path), SAFETENSORS_WEIGHTS_NAME)):
            return  # another adapter's card
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if _CARD_HEADING in text or "library_name: peft" not in text:
        return
    auto = f"AutoPeftModel{_AUTO_CLASSES.get(str(getattr(task_type, 'value', task_type)), '')}"
    recipe = (
        f"\n\n{_CARD_HEADING}\n\nThis is a CLOVER adapter (arXiv 2411.17426). Install `clover-peft` and import it "
        "before loading, or peft will not know the method:\n\n```python\nimport clover_peft  # registers CLOVER\n"
        f"from peft import {auto}\n\n"
        f'model = {auto}.from_pretrained("<this adapter>")  # base: {base or "<base model>"}\n```\n'
    )
    with open(path, "w", encoding="utf-8") as file:
        file.write(text.rstrip("\n") + recipe)


def select_for_saving(name: str, layer: CloverLayer, adapter_name: str, config: CloverConfig, state: dict) -> None:
    """Leave in `state` what `config.save_bases` asks for, for one layer: bases and S, S alone, or one folded map.

    Raises:
        ValueError: if the adapter's bases were never computed or loaded.
    """
    layer.check_bases(adapter_name, "save")
    bias = f"{name}.base_layer.bias" if name else "base_layer.bias"
    if bias in state and layer.merged and layer.original_bias is not None:
        state[bias] = layer.original_bias.detach()
    for spec in layer.specs[adapter_name]:
        keys = _keys(name, adapter_name, spec.name)
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
            state[keys[_PROBE]] = _probe(tensors.u)


def name_bases(name: str, layer: CloverLayer, adapter_name: str, state: dict[str, Tensor]) -> None:
    """Give the bases in a file the model's keys where the model's own state dict leaves them out (`SliceTensors`), for
    one layer: peft names what it finds there. In the file they are without the adapter's name, and with the prefix of
    a `PeftModel` also where the model is a bare one."""
    for spec in layer.specs[adapter_name]:
        for attribute, key in _keys(name, adapter_name, spec.name).items():
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
        _check_tensors(layer, config, _keys(name, adapter_name, WHOLE), beside, state)
    for spec in layer.specs[adapter_name]:
        keys = _keys(name, adapter_name, spec.name)
        probe = _take_probe(name, spec, state)
        expected = {"clover_S": spec.s_shape, **spec.base_shapes}
        if probe is not None:
            expected = {a: shape for a, shape in expected.items() if a not in ("clover_U", "clover_V")}
        _check_tensors(layer, config, keys, expected, state, folded=spec.basis == "folded")
        if config.check_base and (here := fingerprint(inner, layer, spec)) is not None:
            check_fingerprint(layer, spec, config, here, state[keys["clover_norm"]].to(here))
        if probe is None:
            continue
        tensors = layer.tensors(adapter_name, spec)
        u, v = tensors.u, tensors.v
        if u is None or not layer.has_bases(adapter_name):
            computed = computed or frozen_tensors(inner, layer, layer.specs[adapter_name])
            if computed is None:
                found = "a base model without weights; load it first"
                raise ValueError(
                    f"{layer.name}: the adapter was saved without its bases, and they cannot be computed from "
                    f"{found if layer.can_read_weight else layer.precision + ' weights'}, or save the adapter with "
                    "save_bases=True"
                )
            u, v = computed[spec.name]["clover_U"], computed[spec.name].get("clover_V")
        if config.check_base:
            _check_probe(layer, spec, u, probe.to(u))
        dtype = state[keys["clover_S0"]].dtype
        state[keys["clover_U"]] = u.to(dtype)
        if v is not None:
            state[keys["clover_V"]] = v.to(dtype)


@torch.no_grad()
def error_from_rounding(layers: dict[str, CloverLayer], adapter_name: str, config: CloverConfig, state: dict) -> float:
    """How much of an adapter's effect, `E dS C W`, changes because W here has another precision than in training.

    An estimate: what rounding changes in W is taken to be white, of the usual size for the coarser precision.

    Args:
        layers: the adapter's layers by their paths, as in the keys of `state`.
        adapter_name: the adapter.
        config: its config.
        state: the file's tensors by the model's keys.

    Returns:
        A relative error; 0 where the precisions are the same, or the weights cannot be read.
    """
    changed = effect = 0.0
    for name, layer in layers.items():
        precisions = {layer.precision, config.base_precision or layer.precision}
        rounded = max(ROUNDED.get(precision, COARSE) for precision in precisions)
        if len(precisions) == 1 or not rounded:
            continue
        with onloaded(layer.get_base_layer()):
            if layer.weight.is_meta or isinstance(layer.weight, DTensor) or not layer.can_read_weight:
                continue
            weight = layer.transposed_weight()
            weight = weight[:: 1 + weight.shape[0] // 512]  # some of the inputs are enough for an estimate
            for spec in layer.specs[adapter_name]:
                keys = _keys(name, adapter_name, spec.name)
                tensors = BlockTensors.of({attribute: state.get(key) for attribute, key in keys.items()})
                if tensors.s.is_meta:
                    continue
                folded = spec.residual_map(tensors).to(weight.device)
                blocks = spec.heads.blocks(weight, spec.size).to(folded.dtype).transpose(0, 1)  # (H, D, d)
                effect += float((blocks @ folded.mT).square().sum())
                energy = blocks.square().sum((1, 2)) * folded.square().sum((1, 2))
                changed += rounded**2 * float(energy.sum()) / spec.size
    return (changed / effect) ** 0.5 if effect else 0.0


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
        known |= {_keys(name, adapter_name, part)[attribute] for attribute, part in parts}
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


def check_source(config: CloverConfig, loads: bool) -> None:
    """Refuse to make an adapter whose weights are to be loaded from a folder that has none.

    Args:
        config: its config.
        loads: they are; an adapter that is not to be trained makes no sense without them either.

    Raises:
        ValueError: naming the folder.
    """
    if config.source and (loads or config.inference_mode) and os.path.isdir(config.source):
        found = sorted(os.listdir(config.source))
        if SAFETENSORS_WEIGHTS_NAME not in found:
            pickled = f" but {WEIGHTS_NAME}, a pickle, which is never read" if WEIGHTS_NAME in found else ""
            raise ValueError(
                f"{config.source}: expected the adapter's weights, {SAFETENSORS_WEIGHTS_NAME}, found no such file"
                f"{pickled}; copy the whole folder that save_pretrained wrote, with safe_serialization left on"
            )


def is_untouched(layers: dict[str, CloverLayer], adapter_name: str) -> bool:
    """Whether the adapter is still as it was made: nothing loaded, nothing trained."""
    return not any(layer.is_trained(adapter_name) for layer in layers.values())


def _take_probe(name: str, spec: BlockSpec, state: dict[str, Tensor]) -> Tensor | None:
    """The probe of one slice. It is no tensor of the layer, so its key is still the file's: without an adapter's name,
    and with the prefix of a `PeftModel` also where the adapter is loaded into a bare model."""
    key = f"{name}.{_PROBE}.{spec.name}" if name else f"{_PROBE}.{spec.name}"
    found = [state.pop(k) for k in (key, f"base_model.model.{key}") if k in state]
    return found[0] if found else None


def _keys(name: str, adapter_name: str, part: str) -> dict[str, str]:
    """Attribute -> key of what a layer holds by the name of a slice, or `WHOLE`."""
    prefix = f"{name}." if name else ""
    return {attribute: f"{prefix}{attribute}.{adapter_name}.{part}" for attribute in (*TRAINED, *FROZEN, _PROBE)}


def _probe(coordinates: Tensor) -> Tensor:
    """(H, r): C times a fixed vector; tells whether other bases are the same, signs and order included."""
    d = coordinates.shape[-1]
    return coordinates @ torch.cos(torch.arange(1, d + 1, dtype=coordinates.dtype, device=coordinates.device))


def _check_tensors(
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


def check_fingerprint(layer: CloverLayer, spec: BlockSpec, config: CloverConfig, here: Tensor, there: Tensor) -> None:
    """Compare the fingerprint of a layer's weights with that of those an adapter was trained on.

    Args:
        layer: the layer.
        spec: one of its slices.
        config: the adapter's.
        here: `bases.fingerprint`, of some features of every block.
        there: the adapter's `clover_norm`, (H, d).

    Raises:
        ValueError: naming the block that differs most, if rounding does not explain it.
    """
    there = there[:, : here.shape[1]]
    error = (here - there).abs() / torch.maximum(here, there).clamp(min=1e-30)
    precisions = (layer.precision, config.base_precision or layer.precision)
    allowed = max(ROUNDING.get(precision, COARSE) for precision in precisions)
    if float(error.max()) > allowed:
        block = int(error.amax(-1).argmax())
        raise ValueError(
            f"{layer.name} ({spec.part}, block {block}): expected the weights of the base model that the adapter was "
            f"trained on ({config.base_model_name_or_path}), found norms of their rows to differ by "
            f"{float(error.max()):.2g} where rounding explains {allowed:.2g}; load it onto that model (without "
            "an adapter merged into it), or pass config=c after c = PeftConfig.from_pretrained(<adapter>) and "
            "c.check_base = False"
        )


def _check_probe(layer: CloverLayer, spec: BlockSpec, coordinates: Tensor, there: Tensor) -> None:
    here = _probe(coordinates)
    scale = torch.linalg.vector_norm(coordinates, dim=-1).clamp(min=1e-30)
    if float(((here - there).abs() / scale).max()) > PROBE_TOLERANCE:
        raise ValueError(
            f"{layer.name} ({spec.part}): the adapter was saved with save_bases=False, and the bases computed here "
            "are not those it was trained with (equal singular values, or a base in another precision); load it on "
            "the base it was trained on and save it with save_bases=True"
        )
