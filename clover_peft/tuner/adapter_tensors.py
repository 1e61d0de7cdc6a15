"""`AdapterTensors`: the tensors of a layer's adapters, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base_model.weight import BaseWeight
from ..runtime.sharding import filled_by_rank_0
from ..runtime.tensors import GuardedTensors
from .block_spec import BlockSpec, BlockTensors
from .maps import HeadMap, StagedMap

TRAINED = ("clover_S", "clover_A", "clover_B")
FROZEN = ("clover_U", "clover_V", "clover_S0", "clover_norm")
# What else a layer holds by adapter.
BESIDE = (*FROZEN, "clover_dropout", "specs", "scaling", "r")
WHOLE = "weight"  # the slice name of tensors that belong to the whole target
BASES_CHECKSUM = "clover_probe"  # a file that leaves out the bases has a checksum of them
PACKED = "clover_L"  # in a file, the lower triangles of C in the place of C


class AdapterTensors(nn.Module):
    """The tensors of a layer's adapters.

    A map is `E dS C`. The bases C and E are `Bases.c` and `Bases.e` where they are computed, and
    `clover_U` and `clover_V` here and on disk, because they stand for the paper's U and V (`C z = U^T x`,
    `W_o E = V`). `clover_S` is the trained dS, and `clover_S0` the frozen singular values. `clover_norm` is the
    fingerprint of the base weights. `clover_A` and `clover_B` are the low-rank part.

    Parameter names are `clover_S.<adapter>.<slice>`: trainers find an adapter's parameters by `.<adapter>.` in them.

    Args:
        base_layer: the projection, or another tuner's layer around it.
        name: path of the target in the model, for messages.
    """

    base_weight: BaseWeight
    clover_S: nn.ModuleDict
    clover_A: nn.ModuleDict
    clover_B: nn.ModuleDict
    clover_U: nn.ModuleDict
    clover_V: nn.ModuleDict
    clover_S0: nn.ModuleDict
    clover_norm: nn.ModuleDict
    clover_dropout: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        for attribute in (*TRAINED, *FROZEN, "clover_dropout"):
            setattr(self, attribute, nn.ModuleDict())
        self.specs: dict[str, tuple[BlockSpec, ...]] = {}
        self.scaling: dict[str, float] = {}
        # Adapter -> the most directions that it trains in a block, where LoRA's layers have their ranks.
        self.r: dict[str, int] = {}
        self._missing_bases: set[str] = set()
        self.register_load_state_dict_post_hook(AdapterTensors._note_loaded)

    @property
    def below(self) -> nn.Module:
        """What this layer adapts: the projection, or another tuner's layer around it."""
        return self.base_layer

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As in torch, but with `remove_duplicate=False` without the dictionaries of adapters, which hold no tensors.

        Peft calls it so to find the modules of `modules_to_save` and `trainable_token_indices` by the ends of their
        names; "norm" would also find `clover_norm`.
        """
        found = super().named_modules(memo, prefix, remove_duplicate)
        if remove_duplicate:
            return found
        own = {id(getattr(self, attribute)) for attribute in (*TRAINED, *FROZEN, "clover_dropout")}
        return ((name, module) for name, module in found if id(module) not in own)

    def create_tensors(
        self,
        adapter_name: str,
        specs: tuple[BlockSpec, ...],
        bases: dict[str, dict[str, Tensor]] | None,
        *,
        low_rank: int = 0,
        dropout: float = 0.0,
        init_weights: bool = True,
        empty_device: torch.device | str = "meta",
    ) -> None:
        """Create the tensors of an adapter.

        Args:
            bases: slice name -> the frozen tensors of `BlockSpec.base_shapes`, which are copied. None leaves them on
                the meta device until they are loaded.
            empty_device: without bases, the device of the trained tensors, and later of the loaded bases.
        """
        weight = self.base_weight.stored
        device = torch.device(empty_device) if bases is None else weight.device
        if bases and device.type == "meta":  # the weight is offloaded, and its bases are where it is used
            device = next(iter(bases.values()))["clover_norm"].device
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        trained: dict[str, dict[str, Tensor]] = {"clover_S": {}}
        frozen: dict[str, dict[str, Tensor]] = {attribute: {} for attribute in FROZEN}
        for spec in specs:
            values = bases[spec.name] if bases is not None else {}
            s = torch.zeros(spec.s_shape, dtype=dtype, device=device)
            if not init_weights and "clover_S0" in values:
                # Random numbers, about half as large as the frozen singular values.
                scale = 0.5 * values["clover_S0"].mean(-1) / (spec.r**0.5 if spec.s_matrix == "full" else 1)
                s = torch.randn_like(s) * scale.to(s).view(-1, *[1] * (s.ndim - 1))
            trained["clover_S"][spec.name] = s
            for attribute, shape in spec.base_shapes.items():
                # A copy, because loading must not write into bases that another adapter has too.
                frozen[attribute][spec.name] = (
                    values[attribute].to(device, dtype, copy=True).contiguous()
                    if values
                    else torch.empty(shape, dtype=dtype, device="meta")
                )
        if low_rank:  # they start as LoRA's do
            a = torch.empty(low_rank, self.base_weight.in_features, dtype=dtype, device=device)
            b = torch.zeros(self.base_weight.out_features, low_rank, dtype=dtype, device=device)
            nn.init.kaiming_uniform_(a, a=5**0.5)
            if not init_weights:
                nn.init.normal_(b, std=0.1)
            trained |= {"clover_A": {WHOLE: a}, "clover_B": {WHOLE: b}}

        is_quantised = self.base_weight.backend is not None
        # Accelerate fills the state dict of the sharded model, and expects each of its entries to be sharded.
        persistent = is_quantised or not filled_by_rank_0()
        self.specs[adapter_name], self.scaling[adapter_name] = specs, 1.0
        self.r[adapter_name] = max(spec.r for spec in specs)
        for attribute, tensors in trained.items():
            getattr(self, attribute)[adapter_name] = GuardedTensors(tensors, trainable=True, guarded=is_quantised)
        for attribute, tensors in frozen.items():
            getattr(self, attribute)[adapter_name] = GuardedTensors(tensors, persistent=persistent)
        self.clover_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        if next(self.clover_S[adapter_name].parameters()).is_meta:  # also under `init_empty_weights`
            for held in self._held(adapter_name):
                held.to("meta")
        self._missing_bases.add(adapter_name)
        self._note_loaded()

    def change_specs(self, adapter_name: str, **changes: Any) -> None:
        """Set fields of the specs of all slices of an adapter."""
        self.specs[adapter_name] = tuple(replace(spec, **changes) for spec in self.specs[adapter_name])

    def _held(self, adapter_name: str) -> list[GuardedTensors]:
        """What holds an adapter's tensors, as far as it is here."""
        held = (getattr(self, attribute) for attribute in (*TRAINED, *FROZEN))
        return [each[adapter_name] for each in held if adapter_name in each]

    def frozen_tensors(self, adapter_name: str, spec: BlockSpec) -> dict[str, Tensor]:
        """The frozen tensors of a slice by attribute."""
        return {attribute: getattr(self, attribute)[adapter_name].get(spec.name) for attribute in spec.base_shapes}

    def trained_tensors(self, adapter_name: str) -> dict[str, dict[str, Tensor]]:
        """The trained tensors of an adapter: attribute -> slice name -> tensor."""
        return {
            attribute: dict(getattr(self, attribute)[adapter_name].named_parameters())
            for attribute in TRAINED
            if adapter_name in getattr(self, attribute)
        }

    def is_trained(self, adapter_name: str) -> bool:
        """Whether S or B, which start at zero, have other numbers. An adapter on the meta device has none."""
        trained = self.trained_tensors(adapter_name)
        tensors = [t for a in ("clover_S", "clover_B") for t in trained.get(a, {}).values()]
        return any(not t.is_meta and bool(t.any()) for t in tensors)

    def tensors(self, adapter_name: str, spec: BlockSpec) -> BlockTensors:
        """The tensors of one slice of an adapter."""
        return BlockTensors.of({a: getattr(self, a)[adapter_name].get(spec.name) for a in ("clover_S", *FROZEN)})

    def read(self, adapter_name: str, spec: BlockSpec, use: Callable[[BlockTensors], Any]) -> Any:
        """`use` of the tensors of a slice, with S in the dtype of the bases and multiplied by the adapter's scale.

        It runs inside calls of the modules that hold the tensors, one inside the other: DeepSpeed's ZeRO-3 gathers a
        parameter for a call of its module, and only then.
        """
        held = ["clover_S", *(a for a in spec.base_shapes if a != "clover_norm")]

        def read(attributes: list[str], found: dict[str, Tensor | None]) -> Any:
            if attributes:
                module: GuardedTensors = getattr(self, attributes[0])[adapter_name]
                return module(spec.name, lambda tensor: read(attributes[1:], {**found, attributes[0]: tensor}))
            tensors = BlockTensors.of(found)
            return use(self.scaled(adapter_name, tensors._replace(norm=self.tensors(adapter_name, spec).norm)))

        return read(held, {})

    def scaled(self, adapter_name: str, tensors: BlockTensors) -> BlockTensors:
        """With S in the dtype of the bases and multiplied by the adapter's scale."""
        tensors, scale = tensors.promoted(), self.scaling[adapter_name]
        return tensors if scale == 1 else tensors._replace(s=scale * tensors.s)

    def registered(self, adapter_name: str, spec: BlockSpec) -> dict[str, Tensor | None]:
        """What the map of a slice depends on, by attribute; None for a tensor that a runtime has replaced."""
        attributes = ("clover_S", *spec.base_shapes)
        return {a: getattr(self, a)[adapter_name].registered(spec.name) for a in attributes}

    def output_is_kept(self, adapter_names: Iterable[str]) -> bool:
        """Whether the next operation may keep the maps' output for its backward pass.

        A low-rank part changes the output first.
        """
        names = list(adapter_names)
        specs = (spec for name in names for spec in self.specs[name])
        return any(spec.output_is_kept for spec in specs) and not any(name in self.clover_A for name in names)

    def maps(self, adapter_names: Iterable[str], dropout: bool = False) -> list[HeadMap]:
        """The adapters' maps, one a slice, in the precision of S and outside of autocast.

        Maps of adapters that cut the same features into the same blocks are added up.

        Args:
            adapter_names: adapters, in any order; names that this layer does not have are ignored.
            dropout: apply the adapters' dropout in training.
        """
        names = [name for name in adapter_names if name in self.clover_S]
        result: dict[tuple, HeadMap] = {}
        for name in names:
            self.check_bases(name, "run")
            drop = self.clover_dropout[name] if dropout and self.training else None
            drop = drop if getattr(drop, "p", 0.0) else None
            for spec in self.specs[name]:
                matrix, c = self.read(name, spec, partial(_fold, spec, len(names) == 1 and spec.is_factored))
                key = (spec.place, drop and name)  # each adapter draws a dropout mask of its own
                if key in result:
                    matrix = result[key].matrix + matrix
                result[key] = HeadMap(spec.place, matrix, c, drop)
        return list(result.values())

    def staged_maps(self, adapter_names: Iterable[str]) -> list[StagedMap]:
        """The same maps as C, dS and E one after the other, without dropout, for features in the precision of S."""
        result = []
        for name in adapter_names:
            self.check_bases(name, "run")
            for spec in self.specs[name]:

                def mapped(tokens: Tensor, name: str = name, spec: BlockSpec = spec) -> Tensor:
                    return self.read(name, spec, lambda tensors: spec.mapped(tensors, tokens))

                result.append(StagedMap(spec.place, mapped))
        return result

    def add_low_rank(self, y: Tensor, x: Tensor | None, adapter_names: Iterable[str], dropout: bool = False) -> Tensor:
        """`y + scale * B A x`, (..., out_features), over the adapters that have a low-rank part.

        Args:
            x: (..., in_features); None for the identity, whose rows give the update of a transposed weight.
        """
        dtype = y.dtype
        for name in adapter_names:
            if name in self.clover_A:
                if x is None:
                    low = self.clover_A[name](WHOLE, lambda a: a.mT.to(dtype))
                else:
                    x_name = (self.clover_dropout[name](x) if dropout else x).to(dtype)
                    low = self.clover_A[name](WHOLE, partial(_linear, x_name))
                update = self.clover_B[name](WHOLE, partial(_linear, low)).to(dtype)
                y = y + (update if self.scaling[name] == 1 else self.scaling[name] * update)
        return y

    def bases_to_share(self, specs: tuple[BlockSpec, ...]) -> dict[str, dict[str, Tensor]] | None:
        """The frozen tensors of an adapter of this layer with the same slices, if there is one.

        They save a decomposition. A trainer that makes a reference adapter needs them too: it copies parameters only.
        """
        for adapter_name, known in self.specs.items():
            if known == specs and self.has_bases(adapter_name):
                return {spec.name: self.frozen_tensors(adapter_name, spec) for spec in specs}
        return None

    def has_bases(self, adapter_name: str) -> bool:
        """Whether the adapter's bases were computed or loaded."""
        if self._missing_bases:
            self._note_loaded()
        return adapter_name not in self._missing_bases

    def check_bases(self, adapter_name: str, action: str) -> None:
        """Refuse to use an adapter whose bases were neither computed nor loaded."""
        if not self.has_bases(adapter_name):
            raise ValueError(
                f"{self.name}: cannot {action} adapter {adapter_name!r}, because its bases were never computed or "
                "loaded (it was created to be loaded, on the meta device or with low_cpu_mem_usage=True); load its "
                "weights, or create it on a base model whose weights are loaded"
            )

    def forget_tensors(self, adapter_name: str) -> None:
        """Remove the tensors of an adapter, also after an interrupted start."""
        for attribute in (*TRAINED, *BESIDE):
            held = getattr(self, attribute)
            if adapter_name in held:
                del held[adapter_name]

    def _note_loaded(self, *_: Any) -> None:
        """Bases are missing as long as a tensor of their adapter is here and on the meta device."""
        meta = torch.device("meta")
        self._missing_bases = {
            name for name in self._missing_bases if any(meta in held.devices() for held in self._held(name))
        }

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._note_loaded()  # also of adapters that are gone
        assigned = bool(args and args[0].get("assign_to_params_buffers"))
        for adapter_name in () if assigned else self._missing_bases:
            s = next(self.clover_S[adapter_name].parameters())
            for spec in self.specs[adapter_name]:
                for attribute, shape in spec.base_shapes.items():
                    tensors = getattr(self, attribute)[adapter_name]
                    value = state_dict.get(f"{prefix}{attribute}.{adapter_name}.{spec.name}")
                    empty = tensors.get(spec.name)
                    # The file's numbers are written into this tensor next.
                    if empty.is_meta and not s.is_meta and value is not None and value.shape == shape:
                        setattr(tensors, spec.name, torch.empty(shape, dtype=empty.dtype, device=s.device))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Peft's own method also casts the tensors to the dtype of the base layer.
        target = device or self.base_weight.stored.device
        if target.type == "meta":
            return
        for held in self._held(adapter_name):
            devices = held.devices()
            if torch.device("meta") not in devices and devices - {target}:
                held.to(target)


def _fold(spec: BlockSpec, factored: bool, tensors: BlockTensors) -> tuple[Tensor, Tensor | None]:
    """The map of a slice: folded, or its left factor E dS, and C."""
    with torch.autocast(device_type=tensors.s.device.type, enabled=False):
        return (spec.map(tensors._replace(c=None)), tensors.c) if factored else (spec.map(tensors), None)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(x, weight.to(x.dtype))


def tensor_keys(name: str, adapter_name: str, part: str) -> dict[str, str]:
    """Attribute -> state dict key, for a slice by its name, or for `WHOLE`."""
    prefix = f"{name}." if name else ""
    attributes = (*TRAINED, *FROZEN, BASES_CHECKSUM, PACKED)
    return {attribute: f"{prefix}{attribute}.{adapter_name}.{part}" for attribute in attributes}


def file_key(key: str) -> str:
    """A key as it is in files: for experts, the same whether or not another stack of the module is adapted too."""
    while ".base_layer.clover_" in key:
        key = key.replace(".base_layer.clover_", ".clover_")
    return key
