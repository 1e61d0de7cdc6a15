"""`BaseWeight`: the weight of a projection, however it is stored."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from transformers.pytorch_utils import Conv1D

from ..linalg.decomposition import gram
from ..runtime.bitsandbytes import check_packing
from ..runtime.sharding import computed_on_rank_0, onloaded, only_rank_0_has_weights
from ..runtime.tensors import is_plain
from .slices import HeadSlice, Partner

ResultT = TypeVar("ResultT")

# Names of the stored weight in `nn.Linear`, `Conv1D` and the quantised linears.
_WEIGHT_NAMES = ("qweight", "weight", "W_q")
# Hooks before each pass that write the weight.
_COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)


class Original(NamedTuple):
    """The base model's own tensors while adapters are merged: plain attributes, neither trained nor saved.

    Attributes:
        module: the projection; some quantisations merge into a new one.
        weight: its weight, or None if only the module can read it. Other modules may share this parameter and the
            bias, so neither is written to.
        bias: its bias.
        state: the 8-bit scales, which bitsandbytes keeps beside the weight.
    """

    module: Any
    weight: Any
    bias: Tensor | None
    state: Any


class Side(NamedTuple):
    """One of the projections that meet in a slice.

    Attributes:
        weight: (D, features), with the slice's heads in the last dimension.
        bias: (features,) or None.
    """

    weight: Tensor
    bias: Tensor | None

    def gram(self, heads: HeadSlice, size: int) -> Tensor:
        """The Gram matrix of every block, (H, d, d) float64."""
        return gram(heads.blocks(self.weight, size), None if self.bias is None else heads.blocks(self.bias, size))


class BaseWeight:
    """Reads and writes the weight of a projection: plain, `Conv1D`, quantised, offloaded, sharded or merged into.

    `transposed` and `bias` are the base model's own, even while adapters are merged. An offloaded or sharded weight is
    whole only inside `with base.whole():`.

    Args:
        owner: the projection, or a tuner layer around it.
        path: its path in the model, for messages.
        quantization_kwargs: arguments of peft's quantisation backends (`get_quantization_kwargs(model)`).

    Attributes:
        names: of weight and bias in the module.
        rounding: squared norms of the change by the last `write`, and of the rounding error of its quantised result;
            zeros for plain weights.
    """

    names = ("weight", "bias")
    rounding = (0.0, 0.0)

    def __init__(self, owner: nn.Module, path: str = "", quantization_kwargs: dict[str, Any] | None = None) -> None:
        self.owner = owner
        self.path = path
        self.in_features, self.out_features = self._count_features()
        self.fan_in_fan_out = isinstance(self.module, Conv1D)
        self.backend = resolve_quantization_backend(self.module, **(quantization_kwargs or {}))
        self._original: Original | None = None
        self.remember_weight()

    def _count_features(self) -> tuple[int, int]:
        return feature_counts(self.module, self.path)

    @property
    def module(self) -> Any:
        """The projection itself; some quantisations replace it when adapters are merged."""
        return base_of(self.owner)

    @property
    def stored(self) -> Tensor:
        """The weight in its stored form; a quantised weight is packed."""
        module = self.module
        for name in _WEIGHT_NAMES:
            if hasattr(module, name):
                return getattr(module, name)
        raise TypeError(
            f"{self.path}: expected a linear projection with a weight, plain or quantised, found "
            f"{type(module).__name__}; leave it out with exclude_modules"
        )

    @property
    def device(self) -> torch.device:
        """The device on which the weight is used; the CPU for one on disk if peft has removed its offload hooks."""
        if not self.stored.is_meta:
            return self.stored.device
        with self.whole():
            return torch.device("cpu") if self.stored.is_meta else self.stored.device

    @property
    def precision(self) -> str:
        """The name of the weight's precision, such as "bfloat16", "bnb 4bit", "hqq 4bit" or "torchao Int8Tensor"."""
        if self.backend is None:
            return str(self.stored.dtype).removeprefix("torch.")
        name = self.backend.backend_name
        if name == "torchao":  # one class for each format
            return f"{name} {type(self.stored).__name__}"
        bits = (getattr(self.module, "quant_config", None) or {}).get("weight_quant_params", {}).get("nbits")
        return name if bits is None else f"{name} {bits}bit"

    @property
    def merge_dtype(self) -> torch.dtype:
        """The dtype that `write` takes a weight in: its own, or float32 for one that is stored in few bits."""
        stored = self.stored.dtype
        return stored if stored.is_floating_point and stored.itemsize > 1 else torch.float32

    @property
    def is_readable(self) -> bool:
        """Whether the weight can be read as a plain tensor; some quantisations can only run it."""
        if self.backend is not None:
            return self.backend.supports_merge
        stored, shape = self.stored, (self.in_features, self.out_features)
        is_packed = stored.ndim == 2 and tuple(stored.shape) != (shape if self.fan_in_fan_out else shape[::-1])
        return stored.is_floating_point() and stored.itemsize > 1 and not is_packed

    @property
    def is_present(self) -> bool:
        """Whether the whole weight can be read here and now: readable, not on the meta device, not sharded."""
        return self.is_readable and not (self.stored.is_meta or isinstance(self.stored, DTensor))

    @property
    def is_in_every_process(self) -> bool:
        """Whether each process has the weight, or will load it itself."""
        return self.backend is not None or not only_rank_0_has_weights()

    def whole(self) -> Any:
        """A context in which an offloaded or sharded weight is whole and can be read."""
        return onloaded(self.module)

    def compute(self, fn: Callable[[], ResultT]) -> ResultT:
        """`fn()`, computed by the processes that have the weight and sent to those that have none."""
        return fn() if self.is_in_every_process else computed_on_rank_0(fn)

    def remember_weight(self) -> None:
        """Take the weight as it is now for the one that `check_unchanged` expects."""
        self._corner = self._read_corner()

    def check_unchanged(self) -> None:
        """Refuse to replace a weight that something else has written into since it was remembered.

        A tuner's layer around this one does so when it merges: its update belongs behind the maps, not before them.
        `CloverModel` merges in order, and remembers the weights first; this is for a merge that another tuner begins.
        """
        if not self._is_changed():
            return
        if self.is_merged:
            raise ValueError(
                f"{self.path}: expected the weight as the merge left it, found that something has written into it "
                "since, such as an adapter of another method around this one that was merged or unmerged; a further "
                "merge, or unmerging, would lose that or leave it in the weight; load the base model again, and merge "
                "all adapters in one call"
            )
        if not self.stored.requires_grad:
            raise ValueError(
                f"{self.path}: expected the weight that the adapter was made for, found that something has written "
                "into it since, such as an adapter of another method around this one that was merged; unmerge that "
                "one, and call merge_adapter or merge_and_unload of CLOVER's PeftModel, which merges both in order"
            )

    def _is_changed(self) -> bool:
        """Whether the weight is another than the one remembered, as far as its corner tells."""
        before, now = self._corner, self._read_corner()
        if before is None or now is None:
            return False
        is_same_kind = (before.shape, before.dtype, before.device) == (now.shape, now.dtype, now.device)
        return is_same_kind and not torch.equal(before.nan_to_num(), now.nan_to_num())

    def _read_corner(self) -> Tensor | None:
        """A few numbers of a plain weight that is here; the update of a projection's adapter changes them."""
        stored = self.stored if self.backend is None else None
        if stored is None or stored.ndim < 2 or not is_plain(stored):
            return None
        return stored.detach()[..., :8, :8].clone()

    def check_not_repacked(self) -> None:
        """Refuse a weight that gradients cannot pass through."""
        check_packing(self.module, self.path)

    def transposed(self) -> Tensor:
        """The base model's own weight as (in_features, out_features), dequantised.

        Raises:
            TypeError: if bitsandbytes has repacked the 4-bit weight, which cannot be read back.
        """
        self.check_not_repacked()
        if self._original is not None:
            weight = self._dense_original(self._original)
        else:
            weight = self.module.weight.data if self.backend is None else self.backend.get_base_weight(self.module)
        return weight if self.fan_in_fan_out else weight.mT

    def as_stored(self, transposed: Tensor) -> Tensor:
        """A weight (in_features, out_features) in the projection's own layout."""
        return transposed if self.fan_in_fan_out else transposed.mT

    @property
    def bias(self) -> Tensor | None:
        """The base model's own bias, (out_features,)."""
        return getattr(self.module, self.names[1]) if self._original is None else self._original.bias

    @property
    def side(self) -> Side:
        """The projection as one of two that meet; read it inside `with base.whole():`."""
        return Side(self.transposed(), self.bias)

    # ------------------------------------------------------------------ merging

    @property
    def is_merged(self) -> bool:
        """Whether another weight was written over the base model's own."""
        return self._original is not None

    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Replace weight and bias; the first call keeps the base model's own for `restore`.

        Args:
            weight: in the projection's own layout; a quantised projection quantises it again.
            bias: (out_features,) or None.

        Raises:
            TypeError: if a quantisation backend wrote into the packed weight, which `restore` could not put back.
        """
        module, (name, bias_name) = self.module, self.names
        before = weight if self.backend is None else self.as_stored(self.transposed())
        if self._original is None:
            own, state = getattr(module, name, None), copy.copy(getattr(module, "state", None))
            self._original = Original(module, own, getattr(module, bias_name, None), state)
        if self.backend is None:
            setattr(module, name, _like(getattr(module, name), weight))
        else:
            packed = self.stored
            self.backend.set_base_weight(self.owner, weight)
            if self.module is module and (self.stored is packed or not hasattr(module, name)):
                self._original = None
                raise TypeError(
                    f"{self.path}: expected peft's {self.backend.backend_name} backend to put a new {name} or a new "
                    "module in place, found that it changed the old one, which unmerging could not restore; the "
                    "module is merged now, load the base model again"
                )
            error = self.backend.get_base_weight(self.module) - weight
            self.rounding = (float((weight - before).float().square().sum()), float(error.float().square().sum()))
        if bias is not None:
            own = getattr(self.module, bias_name)
            setattr(self.module, bias_name, bias if own is None else _like(own, bias))  # None in a new module
        self.remember_weight()

    def restore(self) -> None:
        """Put the base model's own tensors back, bit for bit.

        Raises:
            ValueError: if the weight that `write` wrote has been changed since, with nothing changed.
        """
        assert self._original is not None
        self.check_unchanged()
        merged, (module, weight, bias, state) = self.module, self._original
        if merged is not module:
            holder: Any = self.owner
            while holder.base_layer is not merged:
                holder = holder.base_layer
            holder.base_layer = module
        else:
            setattr(module, self.names[0], weight)
            if state is not None and self.backend is not None:
                module.state = state
        if bias is not None:
            setattr(module, self.names[1], bias)
        self._original = None
        self.remember_weight()

    def apply(self, fn: Any) -> None:
        """Move or cast the kept tensors, as `nn.Module._apply` does with a module's own."""
        if self._original is not None:
            module, weight, bias, state = self._original
            if module is not self.module:
                module._apply(fn)
            weight, bias = (None if tensor is None else _applied(fn, tensor) for tensor in (weight, bias))
            self._original = Original(module, weight, bias, state)
        self._corner = None if self._corner is None else fn(self._corner)

    def _dense_original(self, original: Original) -> Tensor:
        if self.backend is None:
            return original.weight.data
        if original.weight is None:
            return self.backend.get_base_weight(original.module)
        # The module itself has the merged weight now.
        as_before: Any = SimpleNamespace(weight=original.weight, state=copy.copy(original.state))
        return self.backend.get_base_weight(as_before)


def _like(old: Tensor, new: Tensor) -> Tensor:
    """`new` in the place of `old`, which stays as it is: another module may share it."""
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _applied(fn: Any, tensor: Tensor) -> Tensor:
    """`fn(tensor)`. A plain parameter stays the same object, as in `nn.Module._apply`: another module may share it."""
    return next(iter(nn.ParameterList([tensor])._apply(fn))) if type(tensor) is nn.Parameter else fn(tensor)


def refuse_computed(module: nn.Module, path: str) -> None:
    """Refuse to change a weight or bias that torch computes from other tensors in each pass, over what was written.

    Raises:
        ValueError: naming the module and the remedy.
    """
    if is_parametrized(module) or any(isinstance(hook, _COMPUTING) for hook in module._forward_pre_hooks.values()):
        raise ValueError(
            f"{path}: expected a weight of its own, found one that torch computes from others in each pass "
            "(weight_norm, spectral_norm, masks); make it permanent with remove_parametrizations, remove_weight_norm, "
            "remove_spectral_norm or prune.remove of torch.nn.utils"
        )


def base_weight(model: nn.Module, path: str) -> BaseWeight:
    """The base weight of the projection at `path`: a tuner layer's own, which knows of merges, or a new one."""
    module = model.get_submodule(path)
    known = getattr(module, "base_weight", None)
    return known if isinstance(known, BaseWeight) else BaseWeight(module, path, get_quantization_kwargs(model))


@contextmanager
def partner_weight(model: nn.Module, partner: Partner) -> Iterator[Side]:
    """The partner's weight with the heads in its last dimension, and the heads' own bias; whole inside the context."""
    weight = base_weight(model, partner.path)
    with weight.whole():
        yield Side(weight.transposed().mT, None) if partner.reads else weight.side


def partner_side(model: nn.Module, partner: Partner | None) -> AbstractContextManager[Side | None]:
    """`partner_weight`, or a context with None for a projection that is adapted alone."""
    return nullcontext() if partner is None else partner_weight(model, partner)


def base_of(module: nn.Module) -> nn.Module:
    """The projection inside tuner layers and `modules_to_save` wrappers."""
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def has_module(model: nn.Module, path: str) -> bool:
    """Whether there is a module at this path."""
    try:
        return isinstance(model.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def is_projection(module: Any) -> bool:
    """Whether it is `nn.Linear`, `Conv1D` or a quantised linear, whose class may have any name."""
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return isinstance(module, Conv1D) or (
        all(isinstance(size, int) for size in sizes) and not isinstance(module, (nn.Embedding, nn.MultiheadAttention))
    )


def feature_counts(module: Any, path: str) -> tuple[int, int]:
    """Input and output features of a linear projection; another module is refused."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if not is_projection(module):
        raise TypeError(
            f"{path}: expected a linear projection (nn.Linear, Conv1D or a quantised linear), "
            f"found {type(module).__name__}; leave it out of target_modules"
        )
    return int(module.in_features), int(module.out_features)
