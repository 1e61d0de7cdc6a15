"""Sensitivity of a model's loss to errors in the outputs of its attention blocks, from gradients (ours)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..base_model.activations import TokenReader, evaluating
from .pairs import Pair


def sensitivities(model: nn.Module, pairs: Iterable[Pair], batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The sensitivity of the loss to the output of every output projection.

    It is the norm of the loss's gradient there, over all tokens. To second order, and if errors and gradients are
    independent, removing a direction of singular value s raises the loss in proportion to s^2 times its square: the
    Fisher information, in one number for each attention block. The loss is the cross-entropy of answers that are
    sampled from the model's own logits. For a model without logits, it is a random projection of its hidden states.
    Costs a forward and a backward pass over the data, which holds the activations of one batch at a time.

    Args:
        model: the model. It runs in evaluation mode, and no weight gets a gradient.
        pairs: value-output pairs.
        batches: batches, each of the model's keyword arguments.

    Returns:
        Name of a pair -> its sensitivity.

    Raises:
        ValueError: if the model returns neither logits nor hidden states, or the data do not reach a pair.
    """
    named = {pair.name: pair.partner_projection for pair in pairs}
    squares = dict.fromkeys(named, 0.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    reader, masks = TokenReader(model), dict[str, Tensor]()
    generator = torch.Generator(reader.device).manual_seed(0)

    def behind(name: str) -> Any:
        def add(gradient: Tensor) -> None:
            squares[name] += float(gradient.double().square().sum())

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:  # The graph begins at the first block that runs.
                output = output.detach().requires_grad_()
            output.register_hook(add)
            return output

        return hook

    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad(), evaluating(model), ExitStack() as hooked:
            for name, module in named.items():
                hooked.enter_context(module.register_forward_hook(behind(name)))
            for values in reader.read(batches, masks, "gradients"):
                values.pop("logits_to_keep", None)  # The gradients of all predictions are needed.
                _loss(model, model(**values), masks, generator).backward()
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    if missing := [name for name, square in squares.items() if not 0 < square < float("inf")]:
        raise ValueError(
            f"{missing[0]}: expected gradients of the model's output, found none or infinite ones; pass batches that "
            "reach it, or choose another rule with ranks=..."
        )
    return {name: square**0.5 for name, square in squares.items()}


def _loss(model: nn.Module, output: Any, masks: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    mask = masks.get("decoder_attention_mask", masks.get("attention_mask"))
    logits, hidden = (getattr(output, key, None) for key in ("logits", "last_hidden_state"))
    if isinstance(logits, Tensor):
        logs = logits.float().log_softmax(-1)
        flat = logs.detach().exp().flatten(0, -2)
        drawn = torch.multinomial(flat, 1, generator=generator).view(*logs.shape[:-1], 1)
        losses = -logs.gather(-1, drawn).squeeze(-1)
    elif isinstance(hidden, Tensor):
        noise = torch.randn(hidden.shape, generator=generator, device=hidden.device)
        losses = (hidden.float() * noise).sum(-1)
    else:
        raise ValueError(
            f"{type(model).__name__}: expected an output with logits or last_hidden_state to take gradients of, "
            "found neither; choose another rule with ranks=..."
        )
    if mask is not None and mask.shape == losses.shape:
        losses = losses * mask
    return losses.sum()
