"""Learning rates by part: a factor for values, another for keys, and LoRA+'s for B."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn


def scale_learning_rates(optimizer: torch.optim.Optimizer, model: nn.Module, factors: Mapping[str, float]) -> None:
    """Splits an optimizer's groups, so that some parameters learn at another rate.

    With any trainer of transformers or TRL, before `trainer.train()`:

        trainer.create_optimizer()
        scale_learning_rates(trainer.optimizer, trainer.model, {"v_proj": 3.0, "up_proj": 0.5})

    Args:
        optimizer: one that has not stepped yet; a scheduler is made afterwards.
        model: whose parameters it has.
        factors: regular expression -> factor of the group's rate, for the parameters in whose names it is found; the
            first that is found counts. `{"lora_B": 16}` is LoRA+ (arXiv 2402.12354).

    Raises:
        ValueError: an expression is found in no trained parameter's name, or a factor is negative.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for pattern, factor in factors.items():
        if factor < 0 or not any(re.search(pattern, name) for name in names.values()):
            raise ValueError(
                f"learning_rate_factors: {pattern}: {factor}: expected a factor of at least 0 and a part of a trained "
                f"parameter's name, as in {next(iter(names.values()), 'none')}"
            )
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        parts: dict[str | None, list[torch.Tensor]] = {}
        for parameter in group["params"]:
            name = names.get(id(parameter), "")
            parts.setdefault(next((p for p in factors if re.search(p, name)), None), []).append(parameter)
        for found, parameters in parts.items():
            factor = 1.0 if found is None else factors[found]
            optimizer.add_param_group({**group, "params": parameters, "lr": factor * group["lr"]})
