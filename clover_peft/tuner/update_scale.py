"""Bases scaled block by block, so that one learning rate suits every block of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..base_model.activations import Probe, TokenReader, evaluating
from .activation_bases import check_new
from .block_spec import BlockSpec
from .experts import refuse_experts
from .layer import CloverLayer
from .layers import inner_model, layers_with

# The sensitivity that every block is given. Rates of about 5e-3 are then right for AdamW (SmolLM2-135M).
SENSITIVITY = 0.004


def balance_updates(model: nn.Module, batches: Iterable[Mapping[str, Any]], adapter_name: str = "default") -> None:
    """Scale the bases of a new adapter, so that equal steps of S change the predictions equally (ours).

    AdamW moves every entry of S by about the learning rate, whatever the block. In block b that changes the
    predictions by about `lr^2 / 2 * kappa_b^2` an entry, as KL divergence, with

        kappa_b^2 = mean_j E[(C z)_j^2] * mean_i E[(E^T g)_i^2]

    where z is the projection's output and g the gradient there of the loss of one prediction: the first mean is one
    over tokens, the second a sum over tokens divided by the number of predictions. Here C is multiplied, and S0
    divided, by `0.004 / kappa_b`. The function stays: that of the base model bit for bit, with `truncate=True` that of
    the truncated one but for rounding. Call it before training, and after `initialize_from_activations`; it costs one
    pass forward and backward over the data, and keeps sums only. A low-rank part is not scaled.

    Args:
        model: a model with an active CLOVER adapter that is not trained yet.
        batches: keyword arguments for `model` with which it returns a loss, such as `{"input_ids": ..., "labels":
            ...}`. Some thousand tokens of the training data are enough.
        adapter_name: the adapter.

    Raises:
        ValueError: if the adapter is not there, is inactive, frozen, merged, trained, folded or to be saved without
            its bases; if there is no batch or no loss, or no gradient reaches a target, with nothing changed.
    """
    layers = layers_with(inner_model(model), adapter_name)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    check_new(model, adapter_name, layers)
    found = update_sensitivities(model, batches, adapter_name)
    for path, layer in layers:
        for spec in layer.specs[adapter_name]:
            kappa = found[path, spec.name]
            # A block that nothing depends on needs no scale.
            scale = torch.where(kappa > 0, SENSITIVITY / kappa, torch.ones_like(kappa))
            with torch.no_grad():
                _, c, _, s0, _ = layer.tensors(adapter_name, spec)
                assert c is not None
                assert s0 is not None
                c.mul_(scale.to(c).view(-1, 1, 1))
                s0.div_(scale.to(s0).view(-1, 1))
        layer.forget_maps()
        layer.change_specs(adapter_name, balanced_updates=True)
    if config is not None:
        config.balanced_updates = True


def update_sensitivities(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], adapter_name: str = "default"
) -> dict[tuple[str, str], Tensor]:
    """How much the predictions depend on an entry of S, kappa of `balance_updates`, for every block.

    Arguments and errors as there. Returns (module path, slice name) -> (H,) float64, on the CPU.
    """
    layers = layers_with(inner_model(model), adapter_name)
    refuse_experts(layers, "balance_updates")
    for path, layer in layers:
        if adapter_name not in layer.active_adapters or layer.disable_adapters:
            raise ValueError(
                f"{path}: expected adapter {adapter_name!r} to be active, found {layer.active_adapters}; call "
                "set_adapter first"
            )
        layer.base_weight.check_not_repacked()
        if any(tensor.is_inference() for tensor in layer.clover_S[adapter_name].parameters()):
            raise ValueError(
                f"{path}: expected tensors that take gradients, found inference tensors; make the adapter outside of "
                "torch.inference_mode()"
            )
    trained = [p for _, layer in layers for p in layer.clover_S[adapter_name].parameters()]
    if not all(parameter.requires_grad for parameter in trained):
        raise ValueError(
            f"adapter {adapter_name!r}: expected one that is trained, found it frozen; make it with "
            "inference_mode=False, or load it with is_trainable=True"
        )
    masks: dict[str, Tensor] = {}
    reader = TokenReader(model)
    watches = {
        (path, spec.name): _Watch(layer, adapter_name, spec, reader, masks)
        for path, layer in layers
        for spec in layer.specs[adapter_name]
    }
    predictions = 0
    with evaluating(model), ExitStack() as hooked, torch.enable_grad():
        for watch in watches.values():
            hooked.enter_context(watch.layer.base_layer.register_forward_hook(watch.add_output))
            hooked.enter_context(watch.layer.register_forward_hook(watch.wait_for_gradient))
        for values in reader.read(batches, masks, "gradients"):
            loss = getattr(model(**values), "loss", None)
            if loss is None:
                found = sorted(values.keys() - reader.defaults.keys())
                raise ValueError(f"expected batches that give the model a loss, found {found}; add labels")
            count = count_predictions(model, values)
            # Of the sum, which keeps float16 gradients away from underflow; no parameter's `.grad` is touched.
            torch.autograd.grad(count * loss.float(), trained, allow_unused=True)
            predictions += count
    result = {}
    for (path, name), watch in watches.items():
        if not watch.tokens or not watch.gradients.any():
            raise ValueError(f"{path}: expected gradients, found none; pass batches whose loss depends on it")
        kappa = (watch.coordinates / watch.tokens * watch.gradients / predictions).sqrt() / watch.spec.r
        if not kappa.isfinite().all():
            raise ValueError(f"{path}: expected finite gradients, found NaN or infinite ones; check model and data")
        result[path, name] = kappa
    return result


class _Watch:
    """Sums of squares of one slice: of `C z` and of `E^T g`, (H,) float64, and the tokens of the former."""

    def __init__(
        self, layer: CloverLayer, adapter_name: str, spec: BlockSpec, reader: TokenReader, masks: Mapping[str, Tensor]
    ) -> None:
        self.layer, self.adapter_name, self.spec, self.reader, self.masks = layer, adapter_name, spec, reader, masks
        self.coordinates, self.gradients = torch.zeros(2, spec.blocks, dtype=torch.float64)
        self.tokens = 0

    def add_output(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        c = self.layer.tensors(self.adapter_name, self.spec).c
        assert c is not None  # a folded adapter is frozen
        tokens, found = self._squares(output, c.mT)
        self.coordinates += found
        self.tokens += tokens

    def wait_for_gradient(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._add_gradient)

    def _add_gradient(self, gradient: Tensor) -> None:
        self.gradients += self._squares(gradient, self.layer.tensors(self.adapter_name, self.spec).e)[1]

    @torch.no_grad()
    def _squares(self, features: Tensor, matrix: Tensor | None) -> tuple[int, Tensor]:
        """The tokens, and the sum of squares of features by a matrix, None for the identity, of every block, (H,)."""
        probe = Probe(self.layer.base_layer, False, self.spec.heads, self.spec.size)
        blocks = self.reader.blocks(probe, features.detach(), self.masks).transpose(0, 1)  # (H, tokens, d)
        with torch.autocast(blocks.device.type, enabled=False):
            found = blocks.float() if matrix is None else blocks.to(matrix) @ matrix
            return blocks.shape[1], found.square().sum((1, 2)).cpu().double()


def count_predictions(model: nn.Module, values: Mapping[str, Any]) -> int:
    """How many predictions a batch's loss is the mean of: labels that count, else samples."""
    labels = values.get("labels")
    if isinstance(labels, Tensor):
        inner: Any = inner_model(model)
        is_decoder = any(kind in type(inner).__name__ for kind in ("CausalLM", "LMHead", "ConditionalGeneration"))
        if is_decoder and not getattr(inner.config, "is_encoder_decoder", False):
            labels = labels[:, 1:]  # which transformers shifts: no prediction is of the first token
        return int((labels != -100).sum())
    return next(len(value) for value in values.values() if isinstance(value, Tensor))
