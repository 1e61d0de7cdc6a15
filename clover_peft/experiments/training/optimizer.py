"""Optimisers: learning rates by part of the model (such as LoRA+'s for B), and Muon."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..settings import check_factors

# Coefficients of a quintic iteration that brings singular values to about 1 (https://kellerjordan.github.io/posts/muon/).
_QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised steps; in an S of many heads, each head's step is orthogonalised on its own.

    `torch.optim.Muon` takes single matrices, but a full S is a stack of them. A step is `0.2 sqrt(max(m, n))` times an
    orthogonal matrix: its root mean square is about that of AdamW, so that learning rates carry over (arXiv
    2502.16982).

    Args:
        params: parameters or groups, as for any optimizer; (..., m, n) each.
        lr: the learning rate.
        momentum: the momentum of the gradients, in Nesterov's form.
        weight_decay: decoupled weight decay, as in AdamW.
        iterations: the number of iterations of the orthogonalisation.

    Raises:
        ValueError: a parameter has fewer than two dimensions.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        iterations: int = 5,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, iterations=iterations))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.

        Raises:
            ValueError: a parameter has fewer than two dimensions.
        """
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.ndim < 2:
                raise ValueError(
                    f"Muon: expected matrices to train, found a parameter of shape {tuple(parameter.shape)}; train "
                    "biases with AdamW"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = orthogonalize(parameter.grad.lerp(momentum, group["momentum"]), group["iterations"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                scale = 0.2 * max(parameter.shape[-2:]) ** 0.5
                parameter.add_(direction.to(parameter), alpha=-group["lr"] * scale)
        return loss


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Approximate the nearest orthogonal matrix of each matrix: the same singular vectors, values of about 1.

    Args:
        matrices: (..., m, n), any floating dtype.
        iterations: the number of iterations; the singular values keep a spread of about 0.3 around 1 however many.

    Returns:
        (..., m, n), at least float32; zeros where a matrix is zero.
    """
    x = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)
    a, b, c = _QUINTIC
    for _ in range(iterations):
        square = wide @ wide.mT
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT


def scale_learning_rates(optimizer: torch.optim.Optimizer, model: nn.Module, factors: Mapping[str, float]) -> None:
    """Split an optimizer's groups, so that some parameters learn at another rate.

    Works with any trainer of transformers or TRL, before `trainer.train()`:

        trainer.create_optimizer()
        scale_learning_rates(trainer.optimizer, trainer.model, {"v_proj": 3.0, "up_proj": 0.5})

    Args:
        optimizer: an optimizer of the model's parameters that has not stepped yet and has no scheduler yet.
        model: the model.
        factors: regular expression -> factor of the learning rate, for the parameters whose names it is found in; the
            first expression that is found counts. `{"lora_B": 16}` is LoRA+ (arXiv 2402.12354).

    Raises:
        ValueError: see `check_factors`; or an expression is found in no trained parameter's name.
    """
    names = trained_names(model, factors)
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


def trained_names(model: nn.Module, factors: Mapping[str, float]) -> dict[int, str]:
    """Return the name of each trained parameter by its id; check that every factor is for one of them.

    Raises:
        ValueError: as `scale_learning_rates`.
    """
    check_factors(factors)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for pattern, factor in factors.items():
        if not any(re.search(pattern, name) for name in names.values()):
            raise ValueError(
                f"learning_rate_factors: {pattern}: {factor}: expected a part of a trained parameter's name, as in "
                f"{next(iter(names.values()), 'none')}"
            )
    return names
