"""The experts of a mixture: the weights of all experts' projections, stacked in one parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.sharding import whole_shape
from .families import FAMILIES, Layout, find_suffix, owner_of
from .slices import HeadSlice, TargetSlice
from .weight import BaseWeight, base_of


@dataclass(frozen=True)
class ExpertsLayout:
    """Where a stack of E experts' weights has its input features and the output features that are adapted.

    Attributes:
        part: "up", which is adapted in a projection that is fused with the gate, or "linear" for all output features.
        parts: number of parts that the output features have, such as 2 for gate and up.
        adapted: index of the adapted part.
        dim: dimension of the output features in the parameter, 1 or 2.
        interleaved: neighbouring features belong to different parts.
    """

    part: str
    parts: int
    adapted: int
    dim: int
    interleaved: bool

    @classmethod
    def read(cls, layout: str) -> ExpertsLayout:
        """From the table's words, see `Family.experts`."""
        first, _, second = layout.partition(", ")
        out = Layout.read(first if second == "in" else second)
        part = "up" if "up" in out.parts else "linear"
        adapted = out.parts.index("up") if part == "up" else 0
        return cls(part, len(out.parts), adapted, 1 if second == "in" else 2, out.order == "head")

    def split(self, stack: Tensor, dim: int) -> list[Tensor]:
        """Views of the parts of a stack, whose output features are its dimension `dim`."""
        if self.interleaved:
            return list(stack.unflatten(dim, (-1, self.parts)).unbind(dim + 1))
        return list(stack.chunk(self.parts, dim))

    def join(self, parts: list[Tensor], dim: int) -> Tensor:
        """The stack of these parts, contiguous."""
        if len(parts) == 1:
            return parts[0].contiguous()
        return torch.stack(parts, dim + 1).flatten(dim, dim + 1) if self.interleaved else torch.cat(parts, dim)

    def rows(self, stack: Tensor) -> Tensor:
        """The adapted part of a stack as one projection of E * I output features, transposed: (D, E * I)."""
        part = self.split(stack, self.dim)[self.adapted]
        return (part if self.dim == 2 else part.mT).transpose(0, 1).flatten(1)

    def with_rows(self, stack: Tensor, rows: Tensor) -> Tensor:
        """The stack with other numbers in its adapted part, given as (D, E * I), in their dtype."""
        part = rows.unflatten(1, (len(stack), -1)).transpose(0, 1)
        return self._replaced(stack, part if self.dim == 2 else part.mT, self.dim)

    def bias(self, biases: Tensor) -> Tensor:
        """The adapted part of the biases of all experts, (E, O), as that of one projection: (E * I,)."""
        return self.split(biases, 1)[self.adapted].flatten()

    def with_bias(self, biases: Tensor, bias: Tensor) -> Tensor:
        """The biases of all experts, (E, O), with other numbers in the adapted part, given as (E * I,)."""
        return self._replaced(biases, bias.unflatten(0, (len(biases), -1)), 1)

    def _replaced(self, stack: Tensor, part: Tensor, dim: int) -> Tensor:
        parts = self.split(stack, dim)
        parts[self.adapted] = part
        return self.join([other.to(part.dtype) for other in parts], dim)


class ExpertsWeight(BaseWeight):
    """Reads and writes a stack of experts' weights like the weight of one projection.

    Its output features are the adapted features of all experts, one expert after the other. A bias is the parameter
    of the same name with `_bias`.

    Args:
        owner: the module with the parameter, or a tuner layer around it.
        path: path of the parameter in the model.
        layout: where its features are.
    """

    def __init__(self, owner: nn.Module, path: str, layout: ExpertsLayout) -> None:
        self.layout, self.parameter = layout, path.rpartition(".")[2]
        self.names = (self.parameter, f"{self.parameter}_bias")
        super().__init__(owner, path)

    def _count_features(self) -> tuple[int, int]:
        shape, dim = self.stored.shape, self.layout.dim
        return shape[3 - dim], shape[0] * (shape[dim] // self.layout.parts)

    @property
    def stored(self) -> Tensor:
        """The parameter, also while adapters are merged."""
        return getattr(self.module, self.parameter)

    @property
    def own(self) -> Tensor:
        """The base model's own parameter."""
        return self.stored if self._original is None else self._original.weight

    @property
    def own_biases(self) -> Tensor | None:
        """The base model's own biases of all features, (E, O)."""
        found = getattr(self.module, self.names[1], None)
        return found if self._original is None else self._original.bias

    def transposed(self) -> Tensor:
        """The base model's own weights as (in_features, out_features)."""
        return self.layout.rows(self.own.data)

    def as_stored(self, transposed: Tensor) -> Tensor:
        """The parameter's layout, with the base model's own numbers in the part that is not adapted."""
        return self.layout.with_rows(self.own.data, transposed)

    @property
    def bias(self) -> Tensor | None:
        """The base model's own bias, (out_features,)."""
        biases = self.own_biases
        return None if biases is None else self.layout.bias(biases)

    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Replace the parameter, and the biases by these of the adapted part; see `BaseWeight.write`."""
        biases = self.own_biases
        super().write(weight, None if bias is None or biases is None else self.layout.with_bias(biases.data, bias))


def experts_slice(model: nn.Module, path: str) -> tuple[TargetSlice, ExpertsLayout]:
    """The slice and the layout of the stack of experts' weights at `path`.

    Raises:
        ValueError: if the table does not know the stack, or it is not plain, floating and in one process.
    """
    family, model_type, _ = owner_of(model, path)
    name = None if family is None else find_suffix(path, family.experts)
    if family is None or name is None:
        known = sorted(model_type for model_type, other in FAMILIES.items() if other.experts)
        raise ValueError(
            f"{path}: expected a stack of experts' weights that clover_peft's table of architectures knows, found a "
            f"parameter of the model type {model_type!r}; leave it out of target_parameters, or add its layout to "
            f"the model's row (`Family.experts`); known: {', '.join(known)}"
        )
    layout = ExpertsLayout.read(family.experts[name])
    parent, _, parameter = path.rpartition(".")
    module: Any = base_of(model.get_submodule(parent))
    stack = getattr(module, parameter)
    shape = whole_shape(stack)
    if len(shape) != 3 or not stack.is_floating_point() or type(stack) is not nn.Parameter or stack.dtype.itemsize < 2:
        raise ValueError(
            f"{path}: expected a plain stack of experts' weights in 16 bits or more, found {type(stack).__name__} of "
            f"shape {shape} in {stack.dtype}; load the experts unquantised, or leave them out of target_parameters"
        )
    if getattr(module, "_is_expert_parallel", False):
        raise ValueError(
            f"{path}: expected all experts in every process, found them spread over processes; load the model without "
            "expert parallelism, or leave them out of target_parameters"
        )
    features = shape[layout.dim] // layout.parts
    return TargetSlice(parameter, layout.part, HeadSlice.plain(shape[0], features)), layout
