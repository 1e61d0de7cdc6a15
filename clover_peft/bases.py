"""From a model's weights to the frozen tensors of its CLOVER layers, to fingerprints and to the paper's factors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .architectures import Partner, base_of
from .blocks import BlockSpec
from .decomposition import (
    MUCH_AMPLIFIED,
    Bases,
    Factors,
    describe_dropped,
    factors,
    gram,
    norms,
    pair_bases,
    per_key_value_head,
    qr_bases,
    svd_bases,
)
from .layer import FROZEN, CloverLayer, onloaded
from .moments import Moments, Probe, centred, collect_moments, shrink

_COMPARED = 8  # features of every block


def clover_layers(model: nn.Module) -> list[tuple[str, CloverLayer]]:
    """Every CLOVER layer of a model and its path."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, CloverLayer)]


def inner_model(model: nn.Module) -> nn.Module:
    """The adapted model itself, inside a `PeftModel` or tuner; partners' paths are relative to it."""
    tuner = model if isinstance(model, BaseTuner) else getattr(model, "base_model", None)
    return tuner.model if isinstance(tuner, BaseTuner) else model


@torch.no_grad()
def frozen_tensors(
    model: nn.Module,
    layer: CloverLayer,
    specs: tuple[BlockSpec, ...],
    report: Callable[[CloverLayer, BlockSpec, Bases], None] | None = None,
) -> dict[str, dict[str, Tensor]] | None:
    """The frozen tensors of every slice of a layer, computed from the base weights.

    Args:
        model: the model that partners' paths are relative to.
        layer: the layer.
        specs: its slices.
        report: called with every slice's bases.

    Where only the first process has the weights, it computes the tensors and all processes return them.

    Returns:
        Slice name -> attribute -> tensor, as in `BlockSpec.base_shapes`; None where the weights are on the meta
        device, or a quantisation cannot be read.

    Raises:
        ValueError: naming the module, for weights that are not finite.
    """
    if not layer.loaded_by_rank_0:
        return _computed(model, layer, specs, report)
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [_computed(model, layer, specs, report)]
        except ValueError as error:  # the others wait to hear of it
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], ValueError):
        raise found[0]
    return found[0]


def broadcast_bases(model: nn.Module) -> None:
    """Give all processes the bases of the first one, where unlike machines train together under DDP.

    Processes compute equal bases on equal machines; other linear algebra may turn a singular vector around. All
    processes must call it, with the model on their devices.

    Args:
        model: a model with CLOVER adapters.
    """
    for _, layer in clover_layers(inner_model(model)):
        layer.forget_maps()
        for name, buffer in layer.named_buffers():
            if name.startswith(FROZEN):
                dist.broadcast(buffer, src=0)


def _computed(
    model: nn.Module,
    layer: CloverLayer,
    specs: tuple[BlockSpec, ...],
    report: Callable[[CloverLayer, BlockSpec, Bases], None] | None,
) -> dict[str, dict[str, Tensor]] | None:
    with onloaded(layer.get_base_layer()):
        if layer.weight.is_meta or not layer.can_read_weight:
            return None
        weight, bias = layer.transposed_weight(), layer.original_bias
        result = {}
        for spec in specs:
            tensors = {"clover_norm": _norms(model, spec, weight)}
            if spec.basis != "folded":
                try:
                    bases = _bases(model, spec, weight, bias)
                except ValueError as error:
                    raise ValueError(f"{layer.name}: {error}") from error
                tensors |= _stored(bases)
                if report is not None:
                    report(layer, spec, bases)
            result[spec.name] = tensors
    return result


@torch.no_grad()
def fingerprint(model: nn.Module, layer: CloverLayer, spec: BlockSpec) -> Tensor | None:
    """`clover_norm` of the first features of every block, (H, 8) or (H, d) if less; None without whole weights.

    It tells base models apart, and is hardly moved by rounding, which averages out over a row. Reading all rows would
    take longer than all the rest of loading.
    """
    with onloaded(layer.get_base_layer()):
        if layer.weight.is_meta or isinstance(layer.weight, DTensor) or not layer.can_read_weight:
            return None
        return _norms(model, spec, layer.transposed_weight(), _COMPARED)


def _norms(model: nn.Module, spec: BlockSpec, weight: Tensor, features: int | None = None) -> Tensor:
    """(H, d): norms of the weight's rows, for a pair times those of the partner's columns; of `features` of d."""
    own = norms(spec.heads.blocks(weight, spec.size)[..., :features])
    if spec.partner is None:
        return own
    heads = spec.partner.heads
    with partner_weight(model, spec.partner) as (rows, _):
        partner = norms(heads.blocks(rows, spec.size)[..., :features]).to(own)
    shared = partner.unflatten(0, (spec.heads.count, heads.count // spec.heads.count, -1))
    return own * torch.linalg.vector_norm(shared, dim=1).flatten(0, 1)


def _stored(bases: Bases) -> dict[str, Tensor]:
    """The tensors of bases that a layer holds; an identity is not stored."""
    found = {"clover_U": bases.coordinates, "clover_S0": bases.singular_values, "clover_V": bases.back}
    return {attribute: tensor for attribute, tensor in found.items() if tensor is not None}


def _bases(
    model: nn.Module,
    spec: BlockSpec,
    weight: Tensor,
    bias: Tensor | None,
    own: Moments | None = None,
    partner: Moments | None = None,
) -> Bases:
    """Bases of one slice: the pair's by the Grams of both sides, otherwise the projection's own.

    Moments of activations take the place of the Gram of the weights that compute them. Of a value they are those of
    what the output projection reads; of a key, which softmax does not mind being shifted, they are centred.
    """
    g_in = gram(spec.heads.blocks(weight, spec.size), None if bias is None else spec.heads.blocks(bias, spec.size))
    if spec.partner is None:
        if own is not None:
            g_in = shrink(own.second.to(g_in.device), g_in, own.tokens)
        bases = qr_bases(g_in) if spec.basis == "qr" else svd_bases(g_in)
        return bases if spec.r == spec.size else bases.leading(spec.r)
    heads, count = spec.partner.heads, spec.heads.count
    groups = heads.count // count
    with partner_weight(model, spec.partner) as (rows, bias):
        g = gram(heads.blocks(rows, spec.size), None if bias is None else heads.blocks(bias, spec.size))
    g = g.to(g_in.device)
    if partner is not None and spec.partner.reads:
        g_in = shrink(per_key_value_head(partner.second.to(g), count, groups), g_in, partner.tokens)
    elif partner is not None:
        g = shrink(partner.second.to(g), g, partner.tokens)
    if own is not None:
        g_in = centred(own, g_in)
    bases = pair_bases(g_in, per_key_value_head(g, count, groups))
    return bases if spec.r == spec.size else bases.leading(spec.r)


def initialize_from_activations(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], adapter_name: str = "default"
) -> None:
    """Make the bases of a new adapter from what the model does with data, instead of from the weights alone (ours).

    In the Grams `R^T R` of the decomposition, moments of activations take the place of weights: of an intra-layer
    target those of its output, of a value those of what the output projection reads, of key and query those of both.
    The coordinates `C z` are then uncorrelated on the data, and the leading directions those that carry most of it.
    The function stays that of the base model, bit for bit. Call it before training; costs one pass over the data.

    Args:
        model: a model with a CLOVER adapter that is not trained yet.
        batches: keyword arguments for `model`, such as `{"input_ids": ..., "attention_mask": ...}`. Some ten tokens
            for each feature of a block are needed.
        adapter_name: the adapter.

    Raises:
        ValueError: if the adapter is not there, is merged, trained, folded or to be saved without its bases; if the
            data does not reach a target, with nothing changed.
    """
    inner = inner_model(model)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    layers = [(path, layer) for path, layer in clover_layers(inner) if adapter_name in layer.specs]
    _check_new(adapter_name, config, layers)
    probes: dict[str, Probe] = {}
    for path, layer in layers:
        for spec in layer.specs[adapter_name]:
            if spec.partner is None or not spec.partner.reads:
                probes[f"{path} ({spec.part})"] = Probe(layer.base_layer, False, spec.heads, spec.size)
            if spec.partner is not None:
                module, partner = base_of(inner.get_submodule(spec.partner.path)), spec.partner
                probes[_beside(path, spec)] = Probe(module, partner.reads, partner.heads, spec.size)
    found = collect_moments(model, probes, batches)
    made, conditions = [], {}
    for path, layer in layers:
        with onloaded(layer.get_base_layer()):
            weight, bias = layer.transposed_weight(), layer.original_bias
            for spec in layer.specs[adapter_name]:
                own, beside = (found.get(name) for name in (f"{path} ({spec.part})", _beside(path, spec)))
                bases = _bases(inner, spec, weight, bias, own, beside)
                warn_about_dropped(layer, spec, bases)
                conditions[f"{path} ({spec.part})"] = (float(bases.condition.max()), layer.compute_dtype)
                made.append((layer, spec, _stored(bases)))
    for layer, spec, tensors in made:
        for attribute, tensor in tensors.items():
            getattr(layer, attribute)[adapter_name].get(spec.name).copy_(tensor)
    for _, layer in layers:
        layer.specs[adapter_name] = tuple(replace(s, from_activations=True) for s in layer.specs[adapter_name])
    if config is not None:
        config.from_activations = True
    warn_about_conditions(conditions)


def _beside(path: str, spec: BlockSpec) -> str:
    return f"{path} ({spec.part}), beside it {spec.partner.path if spec.partner else None}"


def _check_new(adapter_name: str, config: Any, layers: list[tuple[str, CloverLayer]]) -> None:
    if not layers:
        raise ValueError(f"adapter {adapter_name!r}: expected a model with this CLOVER adapter, found none")
    if config is not None and config.save_bases is False:
        raise ValueError(
            f"adapter {adapter_name!r}: expected save_bases=True or 'folded', found False, which computes the bases "
            "again from the weights"
        )
    for path, layer in layers:
        layer.check_bases(adapter_name, "initialize")
        if layer.loaded_by_rank_0:
            raise ValueError(
                f"{path}: expected weights in every process, found them in the first alone; leave "
                "fsdp_cpu_ram_efficient_loading out"
            )
        trained = layer.is_trained(adapter_name)
        folded = any(spec.basis == "folded" for spec in layer.specs[adapter_name])
        if trained or folded or layer.merged:
            raise ValueError(
                f"{path}: expected a new adapter that is not merged, found one that is "
                f"{'trained' if trained else 'folded' if folded else 'merged'}; make another with add_adapter"
            )


def warn_about_dropped(layer: CloverLayer, spec: BlockSpec, bases: Bases) -> None:
    """Name the blocks of degenerate weights and what is left out of them."""
    if (dropped := describe_dropped(bases)) is not None:
        warnings.warn(
            f"{layer.name} ({spec.part}): degenerate weights; directions dropped, which will not be trained, in "
            f"block(s) {dropped}",
            stacklevel=3,
        )


def warn_about_conditions(conditions: Mapping[str, tuple[float, torch.dtype]]) -> None:
    """Name the target in which rounding is amplified most: name -> condition and the dtype that is computed in."""
    suspect = {
        name: condition
        for name, (condition, dtype) in conditions.items()
        if condition * torch.finfo(dtype).eps > MUCH_AMPLIFIED
    }
    if suspect:
        worst = max(suspect, key=suspect.__getitem__)
        warnings.warn(
            f"{len(suspect)} target(s) are so ill-conditioned that rounding in the compute dtype is amplified to "
            f"over 10 % of the map; worst: {worst}, condition up to {suspect[worst]:.0f}; compute in float32, or "
            "leave these modules out with exclude_modules",
            stacklevel=3,
        )


@torch.no_grad()
def explicit_factors(model: nn.Module, target: str, adapter_name: str = "default") -> dict[str, Factors]:
    """The paper's U, S and V (Eq. 3, arXiv 2411.17426) of an adapted projection.

    U and V have orthonormal columns. Where nothing was cut (r = d, no degenerate head), `V S U^T` is the current
    product of a pair, `W_o (I + E dS C) W_v`, and for an intra-layer target the current weight itself.

    Args:
        model: a model with a CLOVER adapter: a `PeftModel`, or one that an adapter was injected into.
        target: path of the projection in the base model, or a suffix that only one adapted module has.
        adapter_name: the adapter.

    Returns:
        Slice name ("weight" where there is only one) -> `Factors` of its blocks, in float64. Under grouped-query
        attention V's rows are those of all query heads that share the key-value head.

    Raises:
        ValueError: if no module or more than one matches, or the adapter is not there.
    """
    inner = inner_model(model)
    found = [(n, m) for n, m in clover_layers(inner) if n == target or n.endswith("." + target)]
    if len(found) != 1 or adapter_name not in found[0][1].specs:
        raise ValueError(
            f"{target}: expected one module with an adapter {adapter_name!r}, found {[name for name, _ in found]}; "
            "pass the whole path of one of them"
        )
    layer = found[0][1]
    layer.check_bases(adapter_name, "factor")
    with onloaded(layer.get_base_layer()):
        weight, bias = layer.transposed_weight().double(), layer.original_bias
    result = {}
    for spec in layer.specs[adapter_name]:
        tensors = layer.tensors(adapter_name, spec)
        if tensors.u is None:
            raise ValueError(
                f"{layer.name}: the adapter was saved folded and has no bases; save it with save_bases=True"
            )
        if spec.from_activations:
            raise ValueError(
                f"{layer.name}: expected bases of the weights, found some of activations, whose U and V are not "
                "orthonormal; make the adapter without initialize_from_activations"
            )
        rows = spec.heads.blocks(weight, spec.size).permute(1, 0, 2)
        if bias is not None:
            rows = torch.cat([rows, spec.heads.blocks(bias.double(), spec.size).unsqueeze(1)], dim=1)
        columns = None if spec.partner is None else _partner_columns(inner, spec, spec.partner)
        result[spec.name] = factors(rows, columns, tensors.s, tensors.u, tensors.v)
    return result


@contextmanager
def partner_weight(model: nn.Module, partner: Partner) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The partner's weight with the heads in its last dimension, (D, features), and the bias that belongs to them.

    They are whole within the context only.
    """
    module = model.get_submodule(partner.path)
    base = base_of(module)
    # A layer of ours reads any weight: transposed, quantised, or merged into at the moment.
    reader = (
        module
        if isinstance(module, CloverLayer)
        else CloverLayer(base, "", partner.path, get_quantization_kwargs(model))
    )
    with onloaded(base):
        weight, bias = reader.transposed_weight(), reader.original_bias
        yield (weight.mT, None) if partner.reads else (weight, bias)


def _partner_columns(model: nn.Module, spec: BlockSpec, partner: Partner) -> Tensor:
    """(H, D, d) float64: the partner's side of every block, the query heads of a group one below the other."""
    heads = partner.heads
    with partner_weight(model, partner) as (weight, bias):
        if bias is not None:
            weight = torch.cat([weight, bias.to(weight).unsqueeze(0)])
        blocks = heads.blocks(weight.double(), spec.size)  # (D, groups * H, d)
    groups = heads.count // spec.heads.count
    grouped = blocks.unflatten(1, (spec.heads.count, groups, -1))  # (D, kv heads, groups, blocks a head, d)
    return grouped.permute(1, 3, 2, 0, 4).flatten(2, 3).flatten(0, 1)
