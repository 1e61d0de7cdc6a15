"""`CloverLayer`: a linear projection followed by a trained map of every head onto itself.

With `z = W x + b` the frozen projection's output and `z_h` its features in block h (ours; equal to the paper's
`V S U^T`, Eq. 3 of arXiv 2411.17426, in the coordinates of the head):

    y_h = z_h + E_h dS_h C_h z_h            S = S0 + dS
    y_h =       E_h (S0 + dS_h) C_h z_h     with truncate=True

`clover_U` holds C, `clover_V` holds E and `clover_S` the trained dS, zero at the start. With `low_rank` a part `B A x`
of the projection's input is added to y: `clover_A`, and `clover_B`, zero at the start.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate.utils import parse_flag_from_env
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import gather_params_ctx
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from transformers.integrations import is_fsdp_enabled
from transformers.pytorch_utils import Conv1D

from .architectures import in_features, out_features
from .blocks import BlockSpec, BlockTensors
from .folded import FoldedMaps
from .head_map import HeadMap, Place, UnfoldedMap, apply_maps, is_captured, is_traced

TRAINED = ("clover_S", "clover_A", "clover_B")
FROZEN = ("clover_U", "clover_V", "clover_S0", "clover_norm")
WHOLE = "weight"  # the name of what belongs to all of a target


class SliceTensors(nn.Module):
    """One tensor per slice of a target: parameters (S) or persistent buffers (the bases).

    A module, not a tensor in a dict, so that names read `clover_S.<adapter>.<slice>`: trainers find the parameters of
    an adapter by `.<adapter>.` in their names. The tensors keep at least float32, whatever the model is cast to:
    rounding in them is amplified by the condition of the head.

    Args:
        tensors: slice name -> tensor.
        trainable: make them parameters.
        persistent: whether buffers are in the model's state dict. An adapter's file has them either way.
        guarded: undo what casts the parameters' `data` behind the module's back (TRL casts whatever is trained on a
            quantised model to bfloat16), without the loss of a bit.
    """

    def __init__(
        self, tensors: dict[str, Tensor], trainable: bool = False, persistent: bool = True, guarded: bool = False
    ) -> None:
        super().__init__()
        # What the parameters' `data` was: the same storage, as long as nobody replaces it.
        self._kept: dict[str, Tensor] | None = {} if guarded else None
        for name, tensor in tensors.items():
            if trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor, persistent=persistent)
        self._keep()

    def _keep(self) -> None:
        if self._kept is not None:
            self._kept = {name: parameter.data for name, parameter in self.named_parameters()}

    def restore(self) -> None:
        """Give guarded parameters their precision back."""
        for name, kept in (self._kept or {}).items():
            parameter = self.get_parameter(name)
            if parameter.dtype.itemsize < kept.dtype.itemsize:
                same = kept.shape == parameter.shape and torch.equal(kept.to(parameter), parameter)
                parameter.data = kept.to(parameter.device) if same else parameter.data.to(kept.dtype)
        self._keep()

    def train(self, mode: bool = True) -> SliceTensors:
        """As in torch. Every trainer calls it before its first step, and after whatever cast the parameters."""
        self.restore()
        return super().train(mode)

    def forward(self, name: str, use: Callable[[Tensor], Tensor]) -> Tensor:
        """`use` of the tensor of slice `name`. What shards parameters module by module (DeepSpeed's ZeRO-3) gathers
        them for a module's call, and only then."""
        return use(getattr(self, name))  # FSDP1 puts plain tensors in the parameters' places

    def get(self, name: str) -> Tensor | None:
        """The tensor of slice `name`, or None where it is an identity."""
        return getattr(self, name, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SliceTensors:
        def at_least_float32(tensor: Tensor) -> Tensor:
            if tensor.is_meta and not isinstance(tensor, nn.Parameter):
                return tensor  # bases that are to be loaded have nothing to move, and get no numbers by `to_empty`
            result = fn(tensor)
            if result.is_floating_point() and result.dtype.itemsize < 4 <= tensor.dtype.itemsize:
                return tensor.to(result.device)
            return result

        self.restore()
        super()._apply(at_least_float32, recurse)
        self._keep()
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        self.restore()
        # A tensor that is offered is taken, also where the model's own state dict would not have it.
        left_out = self._non_persistent_buffers_set
        self._non_persistent_buffers_set = {name for name in left_out if prefix + name not in state_dict}
        try:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        finally:
            self._non_persistent_buffers_set = left_out
            self._keep()


class _Original(NamedTuple):
    """The base's own tensors while adapters are merged: plain attributes, which are neither trained nor saved."""

    module: Any  # a quantisation may merge into a new one
    weight: Any  # None where only the module can read its weights
    bias: Tensor | None
    state: Any  # bitsandbytes' 8-bit scales lie beside the weight


class CloverLayer(nn.Module, BaseTunerLayer):
    """A projection with CLOVER adapters: `nn.Linear`, `Conv1D` or a quantised linear.

    Args:
        base_layer: the projection, or another tuner's layer around it.
        adapter_name: its first adapter, which is active; `update_layer` makes it.
        name: path of the target in the model, for messages.
        quantization_kwargs: what peft's quantisation backends need from the model.
    """

    adapter_layer_names: tuple[str, ...] = TRAINED
    other_param_names: tuple[str, ...] = (*FROZEN, "clover_dropout", "specs")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, name: str = "", quantization_kwargs: dict | None = None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.clover_S = nn.ModuleDict()
        self.clover_A = nn.ModuleDict()
        self.clover_B = nn.ModuleDict()
        self.clover_U = nn.ModuleDict()
        self.clover_V = nn.ModuleDict()
        self.clover_S0 = nn.ModuleDict()
        self.clover_norm = nn.ModuleDict()
        self.clover_dropout = nn.ModuleDict()
        self.specs: dict[str, tuple[BlockSpec, ...]] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = [adapter_name]
        self._missing_bases: set[str] = set()
        self._original: _Original | None = None
        self._folded = FoldedMaps()
        # Squared norms of what the last merge changed and of what rounding the result made of it.
        self.merge_rounding: tuple[float, float] = (0.0, 0.0)
        base: Any = self.get_base_layer()
        self.in_features, self.out_features = in_features(base, name), out_features(base, name)
        self.fan_in_fan_out = isinstance(base, Conv1D)
        self.quantization_backend = resolve_quantization_backend(base, **(quantization_kwargs or {}))
        self.register_load_state_dict_post_hook(CloverLayer._note_loaded)

    # ------------------------------------------------------------------ adapters

    def update_layer(
        self,
        adapter_name: str,
        specs: tuple[BlockSpec, ...],
        bases: dict[str, dict[str, Tensor]] | None,
        *,
        low_rank: int = 0,
        dropout: float = 0.0,
        init_weights: bool = True,
        inference_mode: bool = False,
        empty_device: torch.device | str = "meta",
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            specs: the target's slices.
            bases: slice name -> the frozen tensors of `BlockSpec.base_shapes`, which are copied; None leaves them to
                be loaded: they are on the meta device until then.
            empty_device: where the trained tensors are without bases, and the bases once they are loaded; the meta
                device takes no values, but others in their place.
            low_rank: rank of the part beside the maps.
            dropout: probability on the input of the map.
            init_weights: True starts at the base model, False visibly elsewhere.
            inference_mode: the adapter is not trained.
        """
        device = torch.device(empty_device) if bases is None else self.weight.device
        if bases and device.type == "meta":  # offloaded: the bases were computed where the weight is used
            device = next(iter(bases.values()))["clover_norm"].device
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        frozen: dict[str, dict[str, Tensor]] = {attribute: {} for attribute in FROZEN}
        s = {}
        for spec in specs:
            s[spec.name] = torch.zeros(spec.s_shape, dtype=dtype, device=device)
            values = bases[spec.name] if bases is not None else {}
            for attribute, shape in spec.base_shapes.items():
                value = values[attribute] if values else torch.empty(shape, device="meta")
                # A copy: bases shared with another adapter must not be written to when this one's are loaded.
                target = device if values else value.device
                frozen[attribute][spec.name] = value.to(device=target, dtype=dtype, copy=True).contiguous()
            if not init_weights and "clover_S0" in values:
                # Random, and about half as large as the frozen part.
                scale = 0.5 * values["clover_S0"].mean(-1) / (spec.r**0.5 if spec.form == "full" else 1)
                noise = torch.randn_like(s[spec.name])
                s[spec.name] = noise * scale.to(noise).view(-1, *[1] * (noise.ndim - 1))

        # Accelerate then shards the model, fills its state dict, and takes all of it to be sharded.
        persistent = self.quantization_backend is not None or not filled_by_rank_0()
        self.forget_maps()
        self.specs[adapter_name] = specs
        trained = {"clover_S": s, **self._low_rank_start(low_rank, init_weights, dtype, device)}
        for attribute, tensors in trained.items():
            guarded = self.quantization_backend is not None
            getattr(self, attribute)[adapter_name] = SliceTensors(tensors, trainable=True, guarded=guarded)
        for attribute, tensors in frozen.items():
            getattr(self, attribute)[adapter_name] = SliceTensors(tensors, persistent=persistent)
        self.clover_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        if next(self.clover_S[adapter_name].parameters()).is_meta:  # also under `init_empty_weights`
            for attribute in (*trained, *frozen):
                getattr(self, attribute)[adapter_name].to("meta")
        self._missing_bases.add(adapter_name)
        self._note_loaded()
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _low_rank_start(
        self, rank: int, init_weights: bool, dtype: torch.dtype, device: torch.device
    ) -> dict[str, dict[str, Tensor]]:
        """A (rank, in) and B (out, rank) at their start, as LoRA's; nothing for rank 0."""
        if not rank:
            return {}
        a = torch.empty(rank, self.in_features, dtype=dtype, device=device)
        b = torch.zeros(self.out_features, rank, dtype=dtype, device=device)
        nn.init.kaiming_uniform_(a, a=5**0.5)
        if not init_weights:
            nn.init.normal_(b, std=0.1)
        return {"clover_A": {WHOLE: a}, "clover_B": {WHOLE: b}}

    def trained_tensors(self, adapter_name: str) -> dict[str, dict[str, Tensor]]:
        """The trained tensors of an adapter: attribute -> slice name -> tensor."""
        return {
            attribute: dict(getattr(self, attribute)[adapter_name].named_parameters())
            for attribute in TRAINED
            if adapter_name in getattr(self, attribute)
        }

    def is_trained(self, adapter_name: str) -> bool:
        """Whether the adapter is no longer as it started: with numbers in S or B. Without weights it is not."""
        trained = self.trained_tensors(adapter_name)
        tensors = [t for a in ("clover_S", "clover_B") for t in trained.get(a, {}).values()]
        return any(not t.is_meta and bool(t.any()) for t in tensors)

    def bases_to_share(self, specs: tuple[BlockSpec, ...]) -> dict[str, dict[str, Tensor]] | None:
        """The frozen tensors of an adapter of this layer with the same structure, if there is one.

        They save a decomposition; and trainers that make a reference adapter copy parameters only, so that it must be
        born with the same bases.
        """
        for adapter_name, known in self.specs.items():
            if known == specs and self.has_bases(adapter_name):
                return {
                    spec.name: {a: getattr(self, a)[adapter_name].get(spec.name) for a in spec.base_shapes}
                    for spec in specs
                }
        return None

    def has_same_bases(self, one: str, other: str) -> bool:
        """Whether two adapters cut the target alike and stand in the same bases, so that their S can be added."""
        if one == other:
            return True
        if self.specs[one] != self.specs[other]:
            return False
        pairs = ((self.tensors(one, spec), self.tensors(other, spec)) for spec in self.specs[one])
        # C, E and S0; the fingerprint of the base, which is rounded, is no part of them.
        return all(
            a is None or b is None or torch.equal(a, b) for x, y in pairs for a, b in zip(x[1:4], y[1:4], strict=True)
        )

    def tensors(self, adapter_name: str, spec: BlockSpec) -> BlockTensors:
        """The tensors of one slice of an adapter."""
        return BlockTensors.of({a: getattr(self, a)[adapter_name].get(spec.name) for a in ("clover_S", *FROZEN)})

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, also one whose bases never came."""
        self.forget_maps()
        super().delete_adapter(adapter_name)
        self._missing_bases.discard(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters.

        Raises:
            ValueError: if more than one of them truncates.
        """
        self.check_truncation([adapter_names] if isinstance(adapter_names, str) else adapter_names, "active")
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def check_truncation(self, adapter_names: Iterable[str], use: str) -> None:
        """Refuse to use two adapters together that both replace their input.

        Args:
            adapter_names: the adapters.
            use: what they are to be, "active" or "merged".

        Raises:
            ValueError: naming them.
        """
        truncating = [n for n in dict.fromkeys(adapter_names) if any(spec.truncate for spec in self.specs.get(n, ()))]
        if len(truncating) > 1:
            raise ValueError(
                f"{self.name}: expected at most one {use} adapter with truncate=True, found {truncating}; use one of "
                "them alone, or make one permanent with merge_and_unload first"
            )

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Unlike peft's own: never to the dtype of the base layer.
        target = device or self.weight.device
        if target.type == "meta":
            return
        for attribute in (*TRAINED, *FROZEN):
            tensors = getattr(self, attribute)
            if adapter_name in tensors and not _has_meta(tensors[adapter_name]):
                tensors[adapter_name].to(target)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        assigned = bool(args and args[0].get("assign_to_params_buffers"))
        for adapter_name in () if assigned else self._missing_bases:
            s = next(self.clover_S[adapter_name].parameters())
            for spec in self.specs[adapter_name]:
                for attribute, shape in spec.base_shapes.items():
                    tensors = getattr(self, attribute)[adapter_name]
                    value = state_dict.get(f"{prefix}{attribute}.{adapter_name}.{spec.name}")
                    empty = tensors.get(spec.name)
                    # Room for what is written into it next.
                    if empty.is_meta and not s.is_meta and value is not None and value.shape == shape:
                        setattr(tensors, spec.name, torch.empty(shape, dtype=empty.dtype, device=s.device))

    def train(self, mode: bool = True) -> CloverLayer:
        """As in torch.

        Raises:
            TypeError: if the base can no longer be trained through (see `check_packing`).
        """
        if mode:
            check_packing(self.get_base_layer(), self.name)
        self._note_loaded()  # transformers' loader puts tensors in their places itself
        self.forget_maps()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CloverLayer:
        self.forget_maps()
        super()._apply(fn, recurse)
        if self._original is not None:
            module, weight, bias, state = self._original
            if module is not self.get_base_layer():
                module._apply(fn)
            weight, bias = (None if tensor is None else fn(tensor) for tensor in (weight, bias))
            self._original = _Original(module, weight, bias, state)
        return self

    # ------------------------------------------------------------------ the map

    @property
    def weight(self) -> Tensor:
        """The base weight as it is stored: quantised ones packed, under the quantisation's own name."""
        base = self.get_base_layer()
        for name in ("qweight", "weight", "W_q"):
            if hasattr(base, name):
                return getattr(base, name)
        raise TypeError(
            f"{self.name}: expected a linear projection with a weight, plain or quantised, found "
            f"{type(base).__name__}; leave it out with exclude_modules"
        )

    @property
    def loaded_by_rank_0(self) -> bool:
        """Whether only the first process may have the weights for now (`fsdp_cpu_ram_efficient_loading`)."""
        return is_fsdp_enabled() and dist.get_world_size() > 1 and self.quantization_backend is None

    def has_bases(self, adapter_name: str) -> bool:
        """Whether the adapter's bases were computed or loaded."""
        if self._missing_bases:
            self._note_loaded()
        return adapter_name not in self._missing_bases

    def _note_loaded(self, *_: Any) -> None:
        """What is on the meta device still waits for its numbers."""
        self._missing_bases = {
            name
            for name in self._missing_bases
            if any(_has_meta(m[name]) for m in (getattr(self, a) for a in (*TRAINED, *FROZEN)) if name in m)
        }

    @property
    def precision(self) -> str:
        """Name of the precision that the base weight is stored in."""
        if self.quantization_backend is None:
            return str(self.weight.dtype).removeprefix("torch.")
        return self.quantization_backend.backend_name

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the projection computes in, as far as its weight tells; quantised ones usually in bfloat16."""
        return self.weight.dtype if self.weight.is_floating_point() else torch.bfloat16

    @property
    def can_read_weight(self) -> bool:
        """Whether the base weight can be had as a plain tensor (some quantisations are forward only)."""
        return self.quantization_backend is None or self.quantization_backend.supports_merge

    def check_bases(self, adapter_name: str, action: str) -> None:
        """Refuse to use an adapter whose bases were neither computed nor loaded.

        Raises:
            ValueError: naming the module and the remedy.
        """
        if not self.has_bases(adapter_name):
            raise ValueError(
                f"{self.name}: cannot {action} adapter {adapter_name!r}, because its bases were never computed or "
                "loaded (it was created to be loaded, on the meta device or with low_cpu_mem_usage=True); load its "
                "weights, or create it on a base model whose weights are loaded"
            )

    def maps(self, adapter_names: Iterable[str], dropout: bool = False) -> list[HeadMap]:
        """The adapters' maps, one a slice, in the precision of S and outside of autocast.

        Maps of adapters that cut the same features alike are added up.

        Args:
            adapter_names: adapters, in any order; those that this layer does not have are passed over.
            dropout: with the adapters' dropout, in training.
        """
        names = [name for name in adapter_names if name in self.clover_S]
        result: dict[tuple, HeadMap] = {}
        for name in names:
            if self._missing_bases:
                self.check_bases(name, "run")
            drop = self.clover_dropout[name] if dropout and self.training else None
            drop = drop if getattr(drop, "p", 0.0) else None
            for spec in self.specs[name]:
                staged = len(names) == 1 and spec.is_staged

                def fold(tensors: BlockTensors, spec: BlockSpec = spec, staged: bool = staged) -> tuple[Tensor, Any]:
                    with torch.autocast(device_type=tensors.s.device.type, enabled=False):
                        coordinates = tensors.u if staged else None
                        return spec.map(tensors._replace(u=None) if staged else tensors), coordinates

                matrix, coordinates = self._read(name, spec, fold)
                place = Place(spec.heads, spec.size, spec.truncate)
                key = (place, drop and name)  # dropout draws its own mask for every adapter
                if key in result:
                    matrix = result[key].matrix + matrix
                result[key] = HeadMap(place, matrix, coordinates, drop)
        return list(result.values())

    def unfolded_maps(self, adapter_names: Iterable[str]) -> list[UnfoldedMap]:
        """The same as `maps`, without dropout, as E, S and C one after the other, for features in S's precision."""
        result = []
        for name in adapter_names:
            if self._missing_bases:
                self.check_bases(name, "run")
            for spec in self.specs[name]:

                def mapped(tokens: Tensor, name: str = name, spec: BlockSpec = spec) -> Tensor:
                    return self._read(name, spec, lambda tensors: spec.mapped(tensors, tokens))

                result.append(UnfoldedMap(Place(spec.heads, spec.size, spec.truncate), mapped))
        return result

    def _read(self, adapter_name: str, spec: BlockSpec, use: Callable[[BlockTensors], Any]) -> Any:
        """`use` of the tensors of a slice, S in the dtype of the bases, within calls of the modules that hold them:
        elsewhere they may be empty (sharded) or not there (offloaded)."""
        held = ["clover_S", *(a for a in spec.base_shapes if a != "clover_norm")]

        def read(attributes: list[str], found: dict[str, Tensor | None]) -> Any:
            if attributes:
                module: SliceTensors = getattr(self, attributes[0])[adapter_name]
                return module(spec.name, lambda tensor: read(attributes[1:], {**found, attributes[0]: tensor}))
            tensors = BlockTensors.of(found)
            # Without peft's `autocast_adapter_dtype` S has the dtype of the base weights.
            norm = self.tensors(adapter_name, spec).norm
            return use(tensors if norm is None else tensors._replace(s=tensors.s.to(norm.dtype)))

        return read(held, {})

    def _map(self, z: Tensor, adapter_names: list[str]) -> Tensor:
        """`y` of the equations above, in training with the adapters' dropout; in inference from maps folded before, or
        unfolded, where folding does not pay."""
        names = [name for name in adapter_names if name in self.specs]
        differentiated = self.training or torch.is_grad_enabled()
        if not (differentiated or is_traced() or is_captured(z) or self.__dict__.get("_is_replica")):
            if (kept := self._kept_maps(names, z.dtype)) is not None:
                return apply_maps(z, kept)
        elif not torch.compiler.is_compiling():
            self.forget_maps()
        elif differentiated and not torch.compiler.is_exporting():
            self._folded.out_of_date = True
        if self._folding_pays(z, names):
            return apply_maps(z, self.maps(names, dropout=True), self._output_is_kept(names))
        wide = z.to(torch.promote_types(z.dtype, torch.float32))  # as E, S and C are, which are larger
        return apply_maps(wide, self.unfolded_maps(names)).to(z.dtype)

    def _kept_maps(self, adapter_names: list[str], dtype: torch.dtype) -> list[HeadMap] | None:
        """The maps of frozen adapters, folded once; None for others."""
        read = (
            (getattr(self, attribute), name, spec.name)
            for name in adapter_names
            for spec in self.specs[name]
            for attribute in ("clover_S", *spec.base_shapes)
        )
        return self._folded.get((*adapter_names, dtype), read, lambda: [m.to(dtype) for m in self.maps(adapter_names)])

    def _folding_pays(self, z: Tensor, adapter_names: list[str]) -> bool:
        """Whether E S C is to be multiplied out for one pass: always, but for a step of decoding (one token a
        sequence, fewer in all than a block has features), for which E, S and C one after the other are less work.

        Other passes of few tokens are folded too: they round as those of the same adapter when it is trained.
        """
        compiled = torch.compiler.is_compiling()
        if z.ndim < 3 or torch.is_grad_enabled() or (is_traced() and not compiled):
            return True
        if not statically_known_true(z.shape[-2] == 1):
            return True
        if self.training and any(getattr(self.clover_dropout[name], "p", 0.0) for name in adapter_names):
            return True
        sizes = [spec.size for name in adapter_names for spec in self.specs[name]]
        smallest, sequences = min(sizes, default=0), math.prod(z.shape[:-2])
        # What is not known while compiling is not asked for: the graph is to hold for any number of sequences.
        if torch.compiler.is_exporting():
            return not statically_known_true(sequences < smallest)
        return statically_known_true(sequences >= smallest)

    def forget_maps(self) -> None:
        """Fold the maps again in the next pass, after a change that torch does not count."""
        self._folded.clear()

    def _output_is_kept(self, adapter_names: list[str]) -> bool:
        """Whether what follows may keep the layer's output for its backward pass; with a low-rank part, that is no
        longer the output of the maps."""
        specs = (spec for name in adapter_names for spec in self.specs.get(name, ()))
        return any(spec.output_is_kept for spec in specs) and not any(name in self.clover_A for name in adapter_names)

    def map_features(self, z: Tensor, adapter_names: list[str]) -> Tensor:
        """`y` of the equations above, without dropout, for features in the last dimension.

        The same function maps activations, the transposed weight and the bias: merging is this map of the weight.

        Args:
            z: (..., out_features), any floating dtype.
            adapter_names: adapters to apply, in any order.

        Returns:
            (..., out_features), dtype of `z`.
        """
        return apply_maps(z, self.maps(adapter_names))

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The projection with its active adapters: (..., in_features) to (..., out_features).

        Args:
            x: (..., in_features).
            adapter_names: one adapter for each row of `x`, or "__base__" for none, instead of the active ones.

        Raises:
            ValueError: if there is not one name a row, or adapters are merged.
        """
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        z = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return z
        if adapter_names is None:
            active = self.active_adapters
            return self.add_low_rank(self._map(z, active), x, active)
        result = z.clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.clover_S:
                rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=z.device)
                result[rows] = self.add_low_rank(self._map(z[rows], [name]), x[rows], [name])
        return result

    def add_low_rank(self, y: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        """`y + B A x`, (..., out_features), of the adapters that have such a part."""
        for name in adapter_names:
            if name in self.clover_A:
                x_name = self.clover_dropout[name](x).to(y.dtype)
                low = self.clover_A[name](WHOLE, partial(_linear, x_name))
                y = y + self.clover_B[name](WHOLE, partial(_linear, low)).to(y.dtype)
        return y

    def _check_mixed_batch(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                f"{self.name}: expected one name in adapter_names for each of the {len(x)} rows of its input, found "
                f"{len(adapter_names)}; pass one a sample (a module that joins the samples of a batch cannot tell "
                "them apart: leave it out with exclude_modules)"
            )
        if self.merged:
            raise ValueError(
                f"{self.name}: adapter_names chooses an adapter for every sample, but {self.merged_adapters} are "
                "merged; call unmerge_adapter first"
            )

    # ------------------------------------------------------------------ merging

    def transposed_weight(self) -> Tensor:
        """The base's own weight as (in_features, out_features), dequantised if need be.

        Raises:
            TypeError: if bitsandbytes has repacked the 4-bit weight, which can then not be read back.
        """
        check_packing(self.get_base_layer(), self.name)
        weight = self.get_base_weight() if self._original is None else self._dense(self._original)
        return weight if self.fan_in_fan_out else weight.mT

    @property
    def original_bias(self) -> Tensor | None:
        """The base's own bias, also while adapters are merged."""
        return self.bias if self._original is None else self._original.bias

    def _dense(self, original: _Original) -> Tensor:
        if self.quantization_backend is None:
            return original.weight
        base = original.module
        if original.weight is None:
            return self.quantization_backend.get_base_weight(base)
        merged, state = base.weight, getattr(base, "state", None)
        try:
            base.weight = original.weight
            if state is not None:
                base.state = copy.copy(original.state)
            return self.quantization_backend.get_base_weight(base)
        finally:
            base.weight = merged
            if state is not None:
                base.state = state

    def map_constant(self, z: Tensor, adapter_names: list[str]) -> Tensor:
        """The map of a weight or bias, in at least float32 and outside of autocast."""
        z = z.detach().to(torch.promote_types(z.dtype, torch.float32))
        with torch.autocast(device_type=z.device.type, enabled=False):
            return self.map_features(z, adapter_names)

    @torch.no_grad()
    def map_weight(self, weight: Tensor, adapter_names: list[str]) -> Tensor:
        """What adapters make of a weight, transposed (in_features, out_features), in at least float32."""
        result = self.map_constant(weight, adapter_names)
        for name in adapter_names:
            if name in self.clover_A:
                a, b = (getattr(self, part)[name].get(WHOLE) for part in ("clover_A", "clover_B"))
                with torch.autocast(device_type=result.device.type, enabled=False):
                    result = result + (b.to(result) @ a.to(result)).mT
        return result

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the base weight, in the base weight's layout and at least float32."""
        self.check_bases(adapter_name, "merge")
        with onloaded(self.get_base_layer()):
            weight = self.transposed_weight()
            delta = self.map_weight(weight, [adapter_name]) - weight
        return delta if self.fan_in_fan_out else delta.mT

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update can be written as a sum with the base weight: yes, unless biases change too."""
        return self.get_base_layer().bias is None

    def check_merge(self, adapter_names: list[str]) -> None:
        """Raise what merging these adapters would, short of computing the result.

        Raises:
            ValueError: two of them truncate, one has no bases, or another tuner's update lies below.
        """
        self.check_truncation(adapter_names, "merged")
        if isinstance(self.base_layer, BaseTunerLayer) and not self.base_layer.merged:
            raise ValueError(
                f"{self.name}: expected a plain projection to merge into, found "
                f"{type(self.base_layer).__name__} with an update beside its weight, which the merge would leave "
                "out; merge that adapter first"
            )
        for adapter_name in adapter_names:
            self.check_bases(adapter_name, "merge")

    @torch.inference_mode(False)  # what is merged stays in the model, where it may be trained
    @torch.no_grad()
    def merged_tensors(self, adapter_names: list[str], safe_merge: bool = False) -> tuple[Tensor, Tensor | None]:
        """Weight (base layout and dtype) and bias with the adapters merged; nothing is changed.

        Raises:
            ValueError: with `safe_merge`, if a merged number is not finite.
        """
        self.check_merge(adapter_names)
        dtype = self.weight.dtype if self.weight.is_floating_point() else torch.float32
        weight = self.map_weight(self.transposed_weight(), adapter_names).to(dtype)
        bias = self.original_bias
        if bias is not None:
            bias = self.map_constant(bias, adapter_names).to(bias.dtype)
        if safe_merge and not all(torch.isfinite(t).all() for t in (weight, bias) if t is not None):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken: it "
                f"would make {self.name} NaN or infinite; nothing was merged here"
            )
        return (weight if self.fan_in_fan_out else weight.mT).contiguous(), bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the active adapters (or `adapter_names`) into the base weight, `W <- (I + E dS C) W`, bias too.

        The original tensors are kept, so that `unmerge` restores the very same bits; a further merge starts from them.

        Args:
            safe_merge: refuse results that are not finite.
            adapter_names: adapters to merge; None: the active ones.

        Raises:
            ValueError: see `merged_tensors`.
            TypeError: if the quantisation of the base cannot be read or written.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.clover_S]
        if not names:
            return
        self.forget_maps()
        base: Any = self.get_base_layer()
        weight, bias = self.merged_tensors([*self.merged_adapters, *names], safe_merge)
        if self._original is None:
            own = getattr(base, "weight", None)
            own = own if own is None or self.quantization_backend is not None else own.data
            own_bias = None if base.bias is None else base.bias.data
            self._original = _Original(base, own, own_bias, copy.copy(getattr(base, "state", None)))
        if self.quantization_backend is not None:
            before = self.transposed_weight()
            self.quantization_backend.set_base_weight(self, weight)
            change = weight - (before if self.fan_in_fan_out else before.mT)
            error = self.get_base_weight() - weight
            self.merge_rounding = (float(change.float().square().sum()), float(error.float().square().sum()))
        else:
            base.weight.data = weight
        if bias is not None:
            base = self.get_base_layer()
            if base.bias is None:  # a new module
                base.bias = bias
            else:
                base.bias.data = bias
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base's own tensors back."""
        if self._original is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.get_base_layer()
        module, weight, bias, state = self._original
        if base is not module:
            self._replace_base(base, module)
        elif self.quantization_backend is not None:
            base.weight = weight
            if state is not None:
                base.state = state
        else:
            base.weight.data = weight
        if bias is not None:
            module.bias.data = bias
        self._original = None
        self.merged_adapters = []

    def _replace_base(self, old: nn.Module, new: nn.Module) -> None:
        holder: Any = self
        while holder.base_layer is not old:
            holder = holder.base_layer
        holder.base_layer = new

    def extra_repr(self) -> str:
        """One line per adapter and slice: part, blocks, rank, basis."""
        lines = []
        for adapter_name, specs in self.specs.items():
            for spec in specs:
                partner = f" with {spec.partner.path}" if spec.partner is not None and spec.basis == "pair" else ""
                lines.append(
                    f"({adapter_name}) {spec.part}: {spec.blocks} blocks of {spec.size}, r={spec.r}, {spec.form}, "
                    f"{spec.basis}{partner}{', truncated' if spec.truncate else ''}"
                )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return "clover." + super().__repr__()


def filled_by_rank_0() -> bool:
    """Whether accelerate is to spare memory by filling all processes' models from the first one's."""
    return all(parse_flag_from_env(name) for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"))


def _has_meta(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(x, weight.to(x.dtype))


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Within it, a weight that accelerate has offloaded is where it is used, and one that ZeRO-3 has sharded whole.

    It may be nested: the inner one leaves what the outer one brought.
    """
    parameters = list(module.parameters(recurse=False))
    if sharded := [p for p in parameters if hasattr(p, "ds_shape") and not p.numel()]:
        with gather_params_ctx(sharded, modifier_rank=None):
            yield
        return
    hook: Any = getattr(module, "_hf_hook", None)
    if not getattr(hook, "offload", False) or not any(p.is_meta for p in parameters):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def check_packing(module: nn.Module, name: str) -> None:
    """Refuse a 4-bit weight that bitsandbytes has repacked for the CPU: gradients through it and what is read of it
    would be wrong.

    Raises:
        TypeError: naming the module and the remedy.
    """
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        raise TypeError(
            f"{name}: expected a 4-bit weight that can be dequantised and trained through, found one that "
            "bitsandbytes repacked for the CPU in its first evaluation forward; load the base model again and set "
            "module.support_avx512bf16_for_cpu = False on its Linear4bit modules before running it"
        )
