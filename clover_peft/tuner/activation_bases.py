"""Bases from the moments of a model's activations, instead of its weights alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..base_model.activations import Probe, collect_moments
from ..base_model.weight import base_of, partner_side
from .bases import compute_bases, stored_bases
from .block_spec import BlockSpec
from .experts import refuse_experts
from .layer import CloverLayer
from .layers import clover_layers, inner_model, layers_with


def initialize_from_activations(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], adapter_name: str = "default"
) -> None:
    """Compute the bases of a new adapter from data instead of from the weights alone (ours).

    Moments of activations replace Gram matrices of weights in the decomposition: the output of an intra-layer target,
    the input of the output projection for a value, the outputs of both for key and query. Then the coordinates `C z`
    are uncorrelated on the data, and the leading directions carry most of it. The model's outputs stay equal to the
    base model's, bit for bit. Call it before training; it costs one pass over the data.

    Args:
        model: a model with a CLOVER adapter that is not trained yet.
        batches: keyword arguments for `model`, such as `{"input_ids": ..., "attention_mask": ...}`, with at least ten
            tokens for each feature of a block.
        adapter_name: the adapter.

    Raises:
        ValueError: if the adapter is not there, is merged, trained, folded or to be saved without its bases, or if the
            data does not reach a target; then nothing is changed.
    """
    inner = inner_model(model)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    layers = layers_with(inner, adapter_name)
    refuse_experts(layers, "initialize_from_activations")
    check_new(model, adapter_name, layers)
    probes: dict[str, Probe] = {}
    for path, layer in layers:
        for spec in layer.specs[adapter_name]:
            own, beside = _names(path, spec)
            if spec.partner is None or not spec.partner.reads:
                probes[own] = Probe(layer.base_layer, False, spec.heads, spec.size)
            if spec.partner is not None:
                module = base_of(inner.get_submodule(spec.partner.path))
                probes[beside] = Probe(module, spec.partner.reads, spec.partner.heads, spec.size)
    found = collect_moments(model, probes, batches)
    made = []
    for path, layer in layers:
        with layer.base_weight.whole():
            side = layer.base_weight.side
            for spec in layer.specs[adapter_name]:
                with partner_side(inner, spec.partner) as partner:
                    bases = compute_bases(spec, side, partner, *map(found.get, _names(path, spec)))
                made.append((layer, spec, stored_bases(bases)))
    for layer, spec, tensors in made:
        for attribute, tensor in tensors.items():
            getattr(layer, attribute)[adapter_name].get(spec.name).copy_(tensor)
    for _, layer in layers:
        layer.change_specs(adapter_name, from_activations=True, balanced_updates=False)
    if config is not None:
        config.from_activations, config.balanced_updates = True, False


def _names(path: str, spec: BlockSpec) -> tuple[str, str]:
    """Names for the moments of a slice and of its partner, for messages."""
    own = f"{path} ({spec.part})"
    return own, f"{own}, beside it {spec.partner.path if spec.partner else None}"


def check_new(model: nn.Module, adapter_name: str, layers: list[tuple[str, CloverLayer]]) -> None:
    """Refuse an adapter whose bases can no longer be changed, or would not be saved."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is not None and config.save_bases is False:
        raise ValueError(
            f"adapter {adapter_name!r}: expected save_bases=True or 'folded', found False, which computes the bases "
            "again from the weights"
        )
    for path, layer in layers:
        layer.check_bases(adapter_name, "initialize")
        if not layer.base_weight.is_in_every_process:
            raise ValueError(
                f"{path}: expected weights in every process, found them in the first alone; leave "
                "fsdp_cpu_ram_efficient_loading out"
            )
    check_at_start(model, adapter_name, layers)


def check_at_start(model: nn.Module, adapter_name: str, layers: list[tuple[str, CloverLayer]]) -> None:
    """Refuse an adapter that is no longer at its start, or beside which others would change what it is made from."""
    for path, layer in layers:
        trained = layer.is_trained(adapter_name)
        folded = any(spec.basis == "folded" for spec in layer.specs[adapter_name])
        if trained or folded or layer.merged:
            raise ValueError(
                f"{path}: expected a new adapter that is not merged, found one that is "
                f"{'trained' if trained else 'folded' if folded else 'merged'}; make another with add_adapter"
            )
    active = {name for _, layer in clover_layers(model) for name in layer.active_adapters if name in layer.specs}
    if others := sorted(active - {adapter_name}):
        raise ValueError(
            f"adapter {adapter_name!r}: expected no other active adapter, whose activations would be used, found "
            f"{', '.join(others)}; call set_adapter({adapter_name!r}) first"
        )
