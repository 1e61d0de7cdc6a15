"""The scale of `clover_peft.balance_updates` for LoRA, so that the baseline has the same freedom (ours)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ...base_model.activations import evaluating
from ...tuner.update_scale import SENSITIVITY, count_predictions


def balance_lora(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], adapter_name: str = "default") -> None:
    """Scale A of every new LoRA, so that equal steps of B change the predictions equally.

    A step of B by the rate changes the predictions by about `rate^2 / 2 * kappa^2` an entry, as KL divergence, with
    `kappa^2 = s^2 * mean_j E[(A x)_j^2] * mean_i E[g_i^2]`, s LoRA's scaling, x the projection's input, g the gradient
    of the loss of one prediction at its output. A is multiplied by `0.004 / kappa`; as B is zero, the function stays.

    Args:
        model: a model with a new LoRA adapter, whose B is zero.
        batches: keyword arguments for `model` with `labels`, unpadded.
        adapter_name: the adapter.

    Raises:
        ValueError: B is not zero, there is no batch, or no gradient arrives.
    """
    layers: dict[str, Any] = {
        p: m for p, m in model.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A
    }
    if not layers or any(bool(layer.lora_B[adapter_name].weight.any()) for layer in layers.values()):
        raise ValueError(f"adapter {adapter_name!r}: expected a new LoRA whose B is zero, found another")
    inputs, gradients = ({path: [0.0, 0.0] for path in layers} for _ in range(2))

    def add(sums: list[float], values: Tensor) -> None:
        sums[0] += float(values.detach().double().square().mean(-1).sum())
        sums[1] += values.shape[:-1].numel()

    predictions = 0
    with evaluating(model), ExitStack() as hooked, torch.enable_grad():
        for path, layer in layers.items():

            def after_a(module: nn.Module, _: Any, output: Tensor, path: str = path) -> None:
                add(inputs[path], output)

            def after_layer(module: nn.Module, _: Any, output: Tensor, path: str = path) -> None:
                output.register_hook(lambda gradient: add(gradients[path], gradient))

            hooked.enter_context(layer.lora_A[adapter_name].register_forward_hook(after_a))
            hooked.enter_context(layer.register_forward_hook(after_layer))
        trained = [layer.lora_B[adapter_name].weight for layer in layers.values()]
        for batch in batches:
            count = count_predictions(batch)
            torch.autograd.grad(count * model(**batch).loss.float(), trained)
            predictions += count
    if not predictions or any(not sums[0] for sums in (*inputs.values(), *gradients.values())):
        raise ValueError("expected batches whose loss depends on every adapted module, found none")
    with torch.no_grad():
        for path, layer in layers.items():
            (square, tokens), (gradient, _) = inputs[path], gradients[path]
            kappa = layer.scaling[adapter_name] * (square / tokens * gradient / predictions) ** 0.5
            layer.lora_A[adapter_name].weight.mul_(SENSITIVITY / kappa)
