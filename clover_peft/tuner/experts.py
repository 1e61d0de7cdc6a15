"""`CloverExperts`: the routed experts of a mixture with a trained map of every block of each expert's features.

The experts' weights are one parameter W with a matrix W_e for each expert. With M_e the folded maps of an expert
(`E dS C`; ours, as in `layer.py`):

    W'_e = W_e + M_e W_e                b'_e = b_e + M_e b_e

The module's own forward pass reads W' and b' in the places of W and b. They are equal to W and b bit for bit as long
as dS is zero, and W is never written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..base_model.experts import ExpertsLayout, ExpertsWeight
from .layer import CloverLayer
from .maps import HeadMap, StagedMap, formula


class CloverExperts(CloverLayer):
    """A module with a stack of experts' weights, and CLOVER adapters of this one stack.

    A second stack of the same module gets a layer of its own around this one.

    Args:
        base_layer: the module that has the parameter, or a `CloverExperts` around it.
        adapter_name: the first adapter, which is active; `update_layer` makes it.
        name: path of the parameter in the model.
        layout: where its features are.
    """

    base_weight: ExpertsWeight

    def __init__(self, base_layer: nn.Module, adapter_name: str, name: str, layout: ExpertsLayout) -> None:
        super().__init__(base_layer, adapter_name, name, make_reader=partial(ExpertsWeight, layout=layout))

    @property
    def below(self) -> nn.Module:
        """The module of the experts; maps of its other parameters do not meet this one's."""
        return self.get_base_layer()

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The module's own forward pass, with the adapted weights.

        Raises:
            ValueError: for a choice of adapters by sample, because experts see tokens without their samples; and for
                weights that are sharded or offloaded.
        """
        if adapter_names is not None and any(name in self.specs for name in adapter_names):
            raise ValueError(
                f"{self.name}: expected one adapter for a whole batch, found adapter_names={adapter_names}; experts "
                "see tokens without their samples, so call set_adapter and run the samples of each adapter together"
            )
        names = [name for name in self.active_adapters if name in self.specs]
        self._unmerge_if_disabled()
        if self.disable_adapters or self.merged or adapter_names is not None or not names:
            return self.base_layer(*args, **kwargs)
        layer: Any = self.base_layer
        depth = ""
        while layer is not self.base_weight.module:
            layer, depth = layer.base_layer, f"{depth}base_layer."
        changed = {depth + name: tensor for name, tensor in self.adapted(names).items()}
        return functional_call(self.base_layer, changed, args, kwargs, tie_weights=False)

    def adapted(self, adapter_names: Sequence[str]) -> dict[str, Tensor]:
        """Parameter name -> W', and b' if there is one, in the dtype and layout of the base's own.

        The product is computed in at least float32 for all experts at once, E I D d multiplications for E experts of I
        adapted features and D inputs, and again in the backward pass, so that nothing but W' is kept for it.
        """
        base = self.base_weight
        weight, biases, layout = base.own, base.own_biases, base.layout
        if weight.is_meta or isinstance(weight, DTensor) or weight.ndim != 3:
            raise ValueError(
                f"{self.name}: expected the experts' whole weights in the forward pass, found them sharded or "
                "offloaded, which CLOVER's maps of experts cannot be used with; keep the model whole on its devices"
            )
        maps = self.maps(adapter_names)
        result = {base.parameter: layout.with_rows(weight, _mapped(weight, layout.rows, maps))}
        if biases is not None:
            result[base.names[1]] = layout.with_bias(biases, _mapped(biases, layout.bias, maps))
        return result

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Peft calls it to take out this layer and those below it; returns the module of the experts."""
        layer: Any = self
        while isinstance(layer, CloverExperts):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """LoRA's layers for stacks are not the ones that peft converts to."""
        return False


def refuse_experts(layers: Iterable[tuple[str, CloverLayer]], purpose: str) -> None:
    """Refuse experts for `purpose`, which needs the output of a projection, or a weight that is one matrix."""
    for _, layer in layers:
        if isinstance(layer, CloverExperts):
            raise ValueError(
                f"{layer.name}: expected projections for {purpose}, found a stack of experts' weights; use an adapter "
                "without target_parameters"
            )


def _mapped(stack: Tensor, rows_of: Callable[[Tensor], Tensor], maps: Sequence[HeadMap]) -> Tensor:
    """`rows_of(stack)`, (..., features), with the maps, computed in at least float32, in the dtype of the stack."""
    by_output = [StagedMap(m.place, partial(_mapped_by_output, m)) for m in maps]

    def compute(stack: Tensor) -> Tensor:
        rows = rows_of(stack)
        with torch.autocast(rows.device.type, enabled=False):
            return formula(rows.to(torch.promote_types(rows.dtype, torch.float32)), by_output).to(rows.dtype)

    if torch.is_grad_enabled() and any(m.matrix.requires_grad for m in maps):
        return checkpoint(compute, stack, use_reentrant=False, preserve_rng_state=False)
    return compute(stack)


def _mapped_by_output(m: HeadMap, tokens: Tensor) -> Tensor:
    """`m.mapped(tokens)`, (H, D, d), laid out as weights mostly are: one output feature after the other."""
    rows = tokens.mT if m.c is None else torch.bmm(m.c.to(tokens.dtype), tokens.mT)
    return torch.bmm(m.matrix.to(tokens.dtype), rows).mT
