"""`AdapterTensors`: what a layer holds of its adapters, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..base_model.weight import BaseWeight
from ..runtime.sharding import filled_by_rank_0
from ..runtime.tensors import GuardedTensors, has_meta
from .block_spec import BlockSpec, BlockTensors
from .maps import HeadMap, Place, UnfoldedMap

TRAINED = ("clover_S", "clover_A", "clover_B")
FROZEN = ("clover_U", "clover_V", "clover_S0", "clover_norm")
WHOLE = "weight"  # the name of what belongs to all of a target
BASES_PROBE = "clover_probe"  # in a file without bases: a checksum of those that S belongs to


class AdapterTensors(nn.Module):
    """The tensors of a layer's adapters: C in `clover_U`, E in `clover_V`, dS in `clover_S` (the paper's U, V and S),
    the frozen singular values `clover_S0`, the base's fingerprint `clover_norm`, and the low-rank part B A.

    Names read `clover_S.<adapter>.<slice>`: trainers find the parameters of an adapter by `.<adapter>.` in them.

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
        self._missing_bases: set[str] = set()
        self.register_load_state_dict_post_hook(AdapterTensors._note_loaded)

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
        """Make the tensors of an adapter.

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
        """
        weight = self.base_weight.stored
        device = torch.device(empty_device) if bases is None else weight.device
        if bases and device.type == "meta":  # offloaded: the bases were computed where the weight is used
            device = next(iter(bases.values()))["clover_norm"].device
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
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
        persistent = self.base_weight.backend is not None or not filled_by_rank_0()
        self.specs[adapter_name] = specs
        trained = {"clover_S": s, **self._low_rank_start(low_rank, init_weights, dtype, device)}
        for attribute, tensors in trained.items():
            guarded = self.base_weight.backend is not None
            getattr(self, attribute)[adapter_name] = GuardedTensors(tensors, trainable=True, guarded=guarded)
        for attribute, tensors in frozen.items():
            getattr(self, attribute)[adapter_name] = GuardedTensors(tensors, persistent=persistent)
        self.clover_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        if next(self.clover_S[adapter_name].parameters()).is_meta:  # also under `init_empty_weights`
            for attribute in (*trained, *frozen):
                getattr(self, attribute)[adapter_name].to("meta")
        self._missing_bases.add(adapter_name)
        self._note_loaded()

    def _low_rank_start(
        self, rank: int, init_weights: bool, dtype: torch.dtype, device: torch.device
    ) -> dict[str, dict[str, Tensor]]:
        """A (rank, in) and B (out, rank) at their start, as LoRA's; nothing for rank 0."""
        if not rank:
            return {}
        a = torch.empty(rank, self.base_weight.in_features, dtype=dtype, device=device)
        b = torch.zeros(self.base_weight.out_features, rank, dtype=dtype, device=device)
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

    def tensors(self, adapter_name: str, spec: BlockSpec) -> BlockTensors:
        """The tensors of one slice of an adapter."""
        return BlockTensors.of({a: getattr(self, a)[adapter_name].get(spec.name) for a in ("clover_S", *FROZEN)})

    def read(self, adapter_name: str, spec: BlockSpec, use: Callable[[BlockTensors], Any]) -> Any:
        """`use` of the tensors of a slice, S in the dtype of the bases, within calls of the modules that hold them:
        elsewhere they may be empty (sharded) or not there (offloaded)."""
        held = ["clover_S", *(a for a in spec.base_shapes if a != "clover_norm")]

        def read(attributes: list[str], found: dict[str, Tensor | None]) -> Any:
            if attributes:
                module: GuardedTensors = getattr(self, attributes[0])[adapter_name]
                return module(spec.name, lambda tensor: read(attributes[1:], {**found, attributes[0]: tensor}))
            tensors = BlockTensors.of(found)
            # Without peft's `autocast_adapter_dtype` S has the dtype of the base weights.
            norm = self.tensors(adapter_name, spec).norm
            return use(tensors if norm is None else tensors._replace(s=tensors.s.to(norm.dtype)))

        return read(held, {})

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

                matrix, coordinates = self.read(name, spec, fold)
                place = Place(spec.heads, spec.size, spec.truncate)
                key = (place, drop and name)  # dropout draws its own mask for every adapter
                if key in result:
                    matrix = result[key].matrix + matrix
                result[key] = HeadMap(place, matrix, coordinates, drop)
        return list(result.values())

    def staged_maps(self, adapter_names: Iterable[str]) -> list[UnfoldedMap]:
        """The same as `maps`, without dropout, as E, S and C one after the other, for features in S's precision."""
        result = []
        for name in adapter_names:
            if self._missing_bases:
                self.check_bases(name, "run")
            for spec in self.specs[name]:

                def mapped(tokens: Tensor, name: str = name, spec: BlockSpec = spec) -> Tensor:
                    return self.read(name, spec, lambda tensors: spec.mapped(tensors, tokens))

                result.append(UnfoldedMap(Place(spec.heads, spec.size, spec.truncate), mapped))
        return result

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

    def has_bases(self, adapter_name: str) -> bool:
        """Whether the adapter's bases were computed or loaded."""
        if self._missing_bases:
            self._note_loaded()
        return adapter_name not in self._missing_bases

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

    def forget_tensors(self, adapter_name: str) -> None:
        """Remove what is there of an adapter, also after an interrupted start."""
        for attribute in (*TRAINED, *FROZEN, "clover_dropout", "specs"):
            held = getattr(self, attribute)
            if adapter_name in held:
                del held[adapter_name]
        self._missing_bases.discard(adapter_name)

    def _note_loaded(self, *_: Any) -> None:
        """What is on the meta device still waits for its numbers."""
        self._missing_bases = {
            name
            for name in self._missing_bases
            if any(has_meta(m[name]) for m in (getattr(self, a) for a in (*TRAINED, *FROZEN)) if name in m)
        }

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

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Unlike peft's own: never to the dtype of the base layer.
        target = device or self.base_weight.stored.device
        if target.type == "meta":
            return
        for attribute in (*TRAINED, *FROZEN):
            tensors = getattr(self, attribute)
            if adapter_name in tensors and not has_meta(tensors[adapter_name]):
                tensors[adapter_name].to(target)


def tensor_keys(name: str, adapter_name: str, part: str) -> dict[str, str]:
    """Attribute -> key in a state dict, of a slice by its name, or of `WHOLE`."""
    prefix = f"{name}." if name else ""
    return {attribute: f"{prefix}{attribute}.{adapter_name}.{part}" for attribute in (*TRAINED, *FROZEN, BASES_PROBE)}
