"""Bases made from what a model does with data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..base_model.activations import Probe, collect_moments
from ..base_model.weight import base_of
from ..runtime.sharding import only_rank_0_has_weights
from .bases import _stored, clover_layers, compute_bases, inner_model, warn_about_conditions, warn_about_dropped
from .block_spec import BlockSpec
from .layer import CloverLayer


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
    check_new(adapter_name, config, layers)
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
        with layer.base_weight.whole():
            weight, bias = layer.base_weight.transposed(), layer.base_weight.bias
            for spec in layer.specs[adapter_name]:
                own, beside = (found.get(name) for name in (f"{path} ({spec.part})", _beside(path, spec)))
                bases = compute_bases(inner, spec, weight, bias, own, beside)
                warn_about_dropped(layer, spec, bases)
                conditions[f"{path} ({spec.part})"] = (float(bases.condition.max()), layer.base_weight.compute_dtype)
                made.append((layer, spec, _stored(bases)))
    for layer, spec, tensors in made:
        for attribute, tensor in tensors.items():
            getattr(layer, attribute)[adapter_name].get(spec.name).copy_(tensor)
    for _, layer in layers:
        layer.specs[adapter_name] = tuple(
            replace(s, from_activations=True, balanced_updates=False) for s in layer.specs[adapter_name]
        )
    if config is not None:
        config.from_activations, config.balanced_updates = True, False
    warn_about_conditions(conditions)


def _beside(path: str, spec: BlockSpec) -> str:
    return f"{path} ({spec.part}), beside it {spec.partner.path if spec.partner else None}"


def check_new(adapter_name: str, config: Any, layers: list[tuple[str, CloverLayer]]) -> None:
    """Refuse an adapter whose bases can no longer be changed, or would not be saved.

    Raises:
        ValueError: naming the adapter or the module, and the remedy.
    """
    if not layers:
        raise ValueError(f"adapter {adapter_name!r}: expected a model with this CLOVER adapter, found none")
    if config is not None and config.save_bases is False:
        raise ValueError(
            f"adapter {adapter_name!r}: expected save_bases=True or 'folded', found False, which computes the bases "
            "again from the weights"
        )
    for path, layer in layers:
        layer.check_bases(adapter_name, "initialize")
        if layer.base_weight.backend is None and only_rank_0_has_weights():
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
