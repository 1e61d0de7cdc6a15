"""`fold_together`: the maps of all layers of a model, folded together once a forward pass.

Folding layer by layer dispatches many small products, and reading the norms of maps (`fused_maps`) makes the host wait
for the device in every layer. Here all maps of the same shape are folded in one batched product, and all norms are
read at once. Only numbers are shared: each layer's map is tied to its own S, with

    dL/dS_h = E_h^T (dL/dM_h) C_h^T

so that a backward pass may go through any layers, in any order.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..linalg.decomposition import fold_gradient
from ..runtime.tensors import is_plain
from ..runtime.tracing import KNOWS_SAVED_TENSORS_HOOKS, is_traced, saved_tensors_hooks, stream_of
from .adapter_tensors import AdapterTensors
from .block_spec import BlockSpec, BlockTensors
from .fused_maps import MapBackwards, inverse_of_one_plus, is_invertible, map_norms
from .maps import HeadMap, Inversion

_current: ContextVar[_Pass | None] = ContextVar("clover_model_pass", default=None)


def fold_together(model: nn.Module, layers: Sequence[Any]) -> None:
    """From now on, fold the maps of these layers together in forward passes of the model; none ends it."""
    for hook in list(model._forward_pre_hooks.values()):
        if isinstance(owner := getattr(hook, "__self__", None), _Hooks):
            owner.remove()
    if layers and KNOWS_SAVED_TENSORS_HOOKS:  # without these, gradient checkpointing could not be noticed
        _Hooks(model, layers)


def maps_of_model(layer: AdapterTensors, adapter_names: Sequence[str]) -> list[HeadMap] | None:
    """The maps of a layer from the model's pass that runs now; None where the layer has to fold them itself."""
    now = _current.get()
    return None if now is None else now.find(layer, adapter_names)


class _Hooks:
    """Marks where forward passes of a model start and end, in each thread.

    An interrupt from the keyboard skips the end; the next pass or backward pass then ends it.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._handles = [
            model.register_forward_pre_hook(self.start),
            model.register_forward_hook(self.end, always_call=True),
        ]

    def start(self, model: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and not is_traced():
            outer = _current.get()
            if outer is not None and outer.model is model:  # a pass that was interrupted
                outer = outer.outer
            _current.set(_Pass(model, self._layers, outer))

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        if not is_traced() and (now := _current.get()) is not None and now.model is model:
            _current.set(now.outer)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Pass:
    """A forward pass of a model. The first layer that asks folds the maps of all.

    Args:
        model: the model.
        layers: layers of it. Those with one active, trained adapter, whose tensors are whole and where they are used,
            take part; all others fold their own maps.
        outer: the pass that this one is a part of.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Any], outer: _Pass | None) -> None:
        self.model, self.outer, self._layers = model, outer, layers
        self._state = self._state_now()
        self._slices: dict[nn.Module, list[_Slice]] | None = None

    @staticmethod
    def _state_now() -> tuple:
        """A value that changes when the maps of this pass must no longer be used: after a backward pass, because an
        optimizer may then write to S without a trace; and under gradient checkpointing, because layers then run again
        when the model's own pass is over."""
        return MapBackwards.count, saved_tensors_hooks()

    def find(self, layer: AdapterTensors, adapter_names: Sequence[str]) -> list[HeadMap] | None:
        """See `maps_of_model`."""
        if self._state_now() != self._state:
            return None
        if self._slices is None:
            found = {layer: slices for layer in self._layers if (slices := _slices(layer))}
            _fold_all(one for slices in found.values() for one in slices)
            self._slices = found
        slices = self._slices.get(layer, [])
        if not slices or not all(list(adapter_names) == [one.adapter_name] and one.is_current() for one in slices):
            return None
        return [one.head_map() for one in slices]


@dataclass
class _Slice:
    """A slice of a layer that takes part.

    Attributes:
        layer: the layer.
        adapter_name: its adapter.
        spec: the slice.
        tensors: S and the frozen tensors by attribute.
        marks: how torch tells whether anything has changed since.
        matrix: the map, (H, d, d), once it is folded.
        inversion: what is known of I + M, if that may be inverted.
    """

    layer: Any
    adapter_name: str
    spec: BlockSpec
    tensors: dict[str, Tensor]
    marks: tuple = field(init=False)
    matrix: Tensor = field(init=False)
    inversion: Inversion | None = None

    def __post_init__(self) -> None:
        self.marks = self._marks()

    def _marks(self) -> tuple:
        s = self.tensors["clover_S"]
        counts = [(tensor._version, tensor.data_ptr()) for tensor in self.tensors.values()]
        return counts, self.layer.scaling[self.adapter_name], stream_of(s)

    def is_current(self) -> bool:
        """Whether the map is what the layer would fold now."""
        now = self.layer.registered(self.adapter_name, self.spec)
        return all(now[name] is tensor for name, tensor in self.tensors.items()) and self._marks() == self.marks

    @property
    def key(self) -> tuple:
        """Slices of the same key are folded in one product."""
        kinds = tuple((name, t.shape, t.dtype, t.device) for name, t in self.tensors.items())
        may_invert = self.layer.output_is_kept([self.adapter_name])
        return kinds, self.layer.scaling[self.adapter_name], may_invert

    def head_map(self) -> HeadMap:
        """The map, tied to S as the runtime hands it out."""
        tied = partial(_Tied.apply, self.matrix)
        matrix = self.layer.read(self.adapter_name, self.spec, lambda now: tied(now.s, now.c, now.e))
        return HeadMap(self.spec.place, matrix, inversion=self.inversion)


def _slices(layer: Any) -> list[_Slice]:
    """The slices of a layer, if it takes part: none if one of its maps is not folded, or may change on the way."""
    names = [name for name in layer.active_adapters if name in layer.specs]
    if len(names) != 1 or layer.merged or layer.disable_adapters:
        return []
    result, name = [], names[0]
    for spec in layer.specs[name]:
        tensors = layer.registered(name, spec)
        shapes = {"clover_S": spec.s_shape, **spec.base_shapes}
        whole = all(is_plain(tensor) and tensor.shape == shapes[attribute] for attribute, tensor in tensors.items())
        if spec.is_factored or not whole or not tensors["clover_S"].requires_grad:  # a truncated map is factored
            return []
        result.append(_Slice(layer, name, spec, tensors))
    # A hook of others that runs before the layer reads its tensors may write to them, and torch may not count it.
    read = (layer, *(getattr(layer, attribute)[name] for one in result for attribute in one.tensors))
    return [] if any(module._forward_pre_hooks for module in read) else result


@torch.no_grad()
def _fold_all(slices: Iterable[_Slice]) -> None:
    """Fold the maps of all slices, and find out which can be inverted, in one read of numbers a device."""
    groups: dict[tuple, list[_Slice]] = defaultdict(list)
    for one in slices:
        groups[one.key].append(one)
    asked: dict[torch.device, list[tuple[list[_Slice], Tensor, Tensor]]] = defaultdict(list)
    for (*_, may_invert), group in groups.items():
        first = group[0]
        with torch.autocast(first.tensors["clover_S"].device.type, enabled=False):
            stacked = dict(first.tensors)  # of tensors that are not read, the dtype alone counts
            read = {"clover_S", "clover_U", "clover_V"} & stacked.keys()
            stacked |= {name: torch.cat([one.tensors[name] for one in group]) for name in read}
            matrices = first.spec.map(first.layer.scaled(first.adapter_name, BlockTensors.of(stacked)))
            matrices = matrices.unflatten(0, (len(group), -1))
            for one, matrix in zip(group, matrices, strict=True):
                one.matrix = matrix
            if may_invert and type(matrices) is Tensor:  # not a stand-in without numbers
                asked[matrices.device].append((group, matrices, map_norms(matrices)))
    for found in asked.values():
        figures = torch.cat([figure for *_, figure in found]).tolist()
        for group, matrices, _ in found:
            own, figures = figures[: len(group)], figures[len(group) :]
            safe = [i for i, (once, twice) in enumerate(own) if is_invertible(once, twice)]
            square = max((own[i][1] for i in safe), default=0.0)
            inverses = _Inverses(matrices if len(safe) == len(group) else matrices[safe], square)
            for number, one in enumerate(group):
                shared = partial(inverses.of, safe.index(number)) if number in safe else None
                one.inversion = Inversion(square if shared else math.inf, shared)


class _Inverses:
    """`(I + M)^-1` of maps of the same shape, computed when a backward pass first needs one of them.

    Args:
        matrices: (N, H, d, d).
        square: a bound on the norms of M^2, below 1.
    """

    def __init__(self, matrices: Tensor, square: float) -> None:
        self._matrices, self._square = matrices, square
        self._found: dict[torch.dtype, Tensor] = {}

    def of(self, number: int, dtype: torch.dtype) -> Tensor:
        """The inverse for one of the maps, rounded to `dtype`: (H, d, d)."""
        if dtype not in self._found:
            inverse = inverse_of_one_plus(self._matrices.flatten(0, 1), self._square, dtype)
            self._found[dtype] = inverse.view_as(self._matrices)
        return self._found[dtype][number]


class _Tied(torch.autograd.Function):
    """A map that was folded before, as a function of S."""

    @staticmethod
    def forward(matrix: Tensor, s: Tensor, c: Tensor | None, e: Tensor | None) -> Tensor:
        return matrix.view_as(matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, s, *bases = inputs
        ctx.is_diagonal = s.ndim == 2
        ctx.save_for_backward(*bases)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        c, e = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            return None, fold_gradient(gradient, c, e, ctx.is_diagonal), None, None
