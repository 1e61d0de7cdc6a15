"""Starts of a LoRA from data, so that the baseline has the same freedom: peft's own, and those of this package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ...base_model.activations import evaluating
from ...tuner.contrast import contrast_starts
from ...tuner.update_scale import SENSITIVITY, count_predictions

FROM_DATA = ("corda", "eva")  # of LoRA's `init_lora_weights`


def add_lora_from_data(base: Any, config: LoraConfig, batches: Sequence[Mapping[str, Tensor]]) -> Any:
    """Add a LoRA that peft starts from data: CorDA (arXiv 2406.05223) or EVA (arXiv 2410.07170).

    Args:
        base: the model; peft leaves it in evaluation mode.
        config: with `init_lora_weights` "corda", which moves a part of the base's weights into the adapter and takes
            names of modules alone, or "eva".
        batches: each with `input_ids` (rows, tokens), without padding.

    Returns:
        peft's model.

    Raises:
        ValueError: another `init_lora_weights`, or no batches; the model is as it was.
    """
    if config.init_lora_weights not in FROM_DATA or not batches:
        raise ValueError(
            f"init_lora_weights: expected {' or '.join(FROM_DATA)} and batches, found {config.init_lora_weights!r} "
            f"and {len(batches)} batches; for others call get_peft_model"
        )
    if config.init_lora_weights == "corda":
        from peft.tuners.lora.corda import preprocess_corda  # needs attrs

        def run() -> None:
            for ids in (row for batch in batches for row in batch["input_ids"]):  # peft's hooks take one row
                base(input_ids=ids.unsqueeze(0).to(base.device), use_cache=False)

        preprocess_corda(base, config, run_model=run)
        return get_peft_model(base, config)
    model = get_peft_model(base, config)
    initialize_lora_eva_weights(model, list(batches), show_progress_bar=False)
    return model


def contrast_lora(
    model: nn.Module,
    new: Iterable[Mapping[str, Tensor]],
    known: Iterable[Mapping[str, Tensor]],
    adapter_name: str = "default",
) -> None:
    """Give A of a new LoRA the start that `initialize_from_contrast` gives the low-rank part of CLOVER.

    Args:
        model: a model with a new LoRA adapter on linear modules, of one rank, whose B is zero, active alone.
        new: batches of the data to be trained on, as keyword arguments for `model`.
        known: batches of what the model should keep, alike.
        adapter_name: the adapter.

    Raises:
        TypeError: data that are a single batch.
        ValueError: another adapter, see above, or the data do not reach a module or have too few directions; then
            nothing is changed.
    """
    layers = _new_layers(model, adapter_name)
    ranks = {int(layer.r[adapter_name]) for layer in layers.values()}
    if len(ranks) > 1:
        raise ValueError(f"adapter {adapter_name!r}: expected one rank, found {sorted(ranks)}; leave out rank_pattern")
    modules = {path: (layer, int(layer.in_features)) for path, layer in layers.items()}
    starts = contrast_starts(model, modules, ranks.pop(), new, known)
    with torch.no_grad():
        for path, layer in layers.items():
            layer.lora_A[adapter_name].weight.copy_(starts[path])


def _new_layers(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    layers: dict[str, Any] = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }
    if not layers:
        raise ValueError(f"adapter {adapter_name!r}: expected a LoRA of this name, found none; correct the name")
    for path, layer in layers.items():
        if adapter_name not in layer.lora_A or not isinstance(layer.get_base_layer(), nn.Linear):
            raise ValueError(f"{path}: expected a linear module, found {type(layer).__name__}; leave it out")
        if layer.merged or layer.active_adapters != [adapter_name]:
            raise ValueError(f"{path}: expected adapter {adapter_name!r} active alone and unmerged; call set_adapter")
        if layer.lora_B[adapter_name].weight.any():
            raise ValueError(f"{path}: expected a new LoRA whose B is zero, found a trained one; start with a new one")
    return layers


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
    layers = _new_layers(model, adapter_name)
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
            count = count_predictions(model, batch)
            torch.autograd.grad(count * model(**batch).loss.float(), trained)
            predictions += count
    if not predictions or any(not sums[0] for sums in (*inputs.values(), *gradients.values())):
        raise ValueError("expected batches whose loss depends on every adapted module, found none")
    with torch.no_grad():
        for path, layer in layers.items():
            (square, tokens), (gradient, _) = inputs[path], gradients[path]
            kappa = layer.scaling[adapter_name] * (square / tokens * gradient / predictions) ** 0.5
            layer.lora_A[adapter_name].weight.mul_(SENSITIVITY / kappa)
