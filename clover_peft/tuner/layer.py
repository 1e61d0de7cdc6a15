"""`CloverLayer`: a linear projection followed by a trained map of every block onto itself.

With `z = W x + b` the frozen projection's output and `z_h` its features in block h:

    y_h = z_h + E_h dS_h C_h z_h            S = S0 + dS
    y_h =       E_h (S0 + dS_h) C_h z_h     with truncate=True

This form is ours; `W_o y` is the paper's `V S U^T x` (Eq. 3, arXiv 2411.17426). dS is trained and starts at zero.
With `low_rank`, `B A x` is added to y, with x the projection's input; A and B are trained and B starts at zero.
`AdapterTensors` names the tensors. Peft freezes everything else.

`apply_adapters` computes y. In a training pass of the whole model, the first layer that runs folds the maps of all
layers (`model_maps`, whose hooks `CloverModel` registers); a layer that is called on its own folds its own maps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from textwrap import indent
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..base_model.weight import BaseWeight
from ..io.user_warning import warn
from ..runtime.tracing import shares_state
from . import merging
from .adapter_tensors import BESIDE, TRAINED, AdapterTensors
from .block_spec import BlockSpec
from .execution import MapCache, apply_adapters


class CloverLayer(AdapterTensors, BaseTunerLayer):
    """A projection with CLOVER adapters: `nn.Linear`, `Conv1D` or a quantised linear; a subclass holds experts.

    Args:
        base_layer: the projection, or another tuner's layer around it.
        adapter_name: its first adapter, which is active; `update_layer` makes it.
        name: path of the target in the model, for messages.
        quantization_kwargs: arguments of peft's quantisation backends (`get_quantization_kwargs(model)`).
        make_reader: makes the reader of the base weight from the layer and `name`; None for a projection's own.

    Attributes:
        adapters_of_model: the adapters of all layers of the model, in a set that these share.
        scaling: adapter -> scale of dS and of the low-rank part, 1 for a new adapter. With `truncate=True`, scale 0
            thus gives the truncated base; an adapter that was saved folded is scaled as a whole. Scales are not saved.
            Merged adapters keep the scale that they were merged with.
    """

    adapter_layer_names: tuple[str, ...] = TRAINED
    other_param_names: tuple[str, ...] = BESIDE

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        name: str = "",
        quantization_kwargs: dict | None = None,
        make_reader: Callable[[nn.Module, str], BaseWeight] | None = None,
    ) -> None:
        super().__init__(base_layer, name)
        self.merged_adapters: list[str] = []
        self._merged_scaling: dict[str, float] = {}
        self.adapters_of_model: set[str] = set()
        self._disable_adapters = False
        self._active_adapter = [adapter_name]
        self._cache = MapCache()
        self.base_weight = (make_reader or partial(BaseWeight, quantization_kwargs=quantization_kwargs))(self, name)
        self.in_features, self.out_features = self.base_weight.in_features, self.base_weight.out_features

    @property
    def quantization_backend(self) -> Any:  # type: ignore[override]  # peft declares an attribute
        """Peft's backend for a quantised base; None for plain weights."""
        return self.base_weight.backend

    @property
    def weight(self) -> Tensor:
        """The base weight in its stored form; a quantised weight is packed."""
        return self.base_weight.stored

    # ------------------------------------------------------------------ adapters

    def update_layer(
        self,
        adapter_name: str,
        specs: tuple[BlockSpec, ...],
        bases: dict[str, dict[str, Tensor]] | None,
        *,
        inference_mode: bool = False,
        **options: Any,
    ) -> None:
        """Add an adapter, frozen with `inference_mode`; for the other arguments see `create_tensors`."""
        self.forget_maps()
        self.create_tensors(adapter_name, specs, bases, **options)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in peft."""
        self.forget_maps()
        self.adapters_of_model.discard(adapter_name)
        super().delete_adapter(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; one that is named twice acts once.

        Raises:
            ValueError: if more than one of them truncates.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
        merging.check_truncation(self, names, "active")
        super().set_adapter(names, inference_mode=inference_mode)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of an adapter; a name that the layer does not have is ignored."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters."""
        for name in self.active_adapters if scale != 1 else ():
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters; None sets them back to 1."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def forget_maps(self) -> None:
        """Fold the maps again in the next pass. Call it after a change that torch does not count."""
        self._cache.clear()

    def train(self, mode: bool = True) -> CloverLayer:
        """As in torch.

        Raises:
            TypeError: if gradients cannot pass through the base weight.
        """
        if mode:
            self.base_weight.check_not_repacked()
        self._note_loaded()  # some loaders assign tensors without `load_state_dict`
        self.forget_maps()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CloverLayer:
        self.forget_maps()
        super()._apply(fn, recurse)
        self.base_weight.apply(fn)
        return self

    # ------------------------------------------------------------------ the forward pass

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The projection with its active adapters: (..., in_features) to (..., out_features).

        Args:
            x: (..., in_features).
            adapter_names: instead of the active adapters, one for each row of `x`, or "__base__" for none.

        Raises:
            ValueError: if rows and names differ in number, or adapters are merged.
        """
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        self._unmerge_if_disabled()
        z = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return z
        if adapter_names is None:
            return self._adapted(z, x, self.active_adapters)
        result = z.clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.clover_S:
                rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=z.device)
                result[rows] = self._adapted(z[rows], x[rows], [name])
        return result

    def _unmerge_if_disabled(self) -> None:
        """Take merged adapters out of the base weight if adapters were disabled since."""
        if self.disable_adapters and self.merged:
            if shares_state(self):
                raise ValueError(
                    f"{self.name}: adapters are merged, and a DataParallel replica cannot take them out; call "
                    "unmerge_adapter() on the model before disabling them"
                )
            self.unmerge()

    def _adapted(self, z: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        """`z + E dS C z + B A x`, (..., out_features), over the adapters."""
        y = apply_adapters(self, z, adapter_names, self._cache)
        return self.add_low_rank(y, x, adapter_names, dropout=True)

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

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The adapter's update of the base weight, in the base weight's layout and at least float32.

        It is zero for an adapter that other layers of the model have, and this one has not.

        Raises:
            ValueError: if the model has no such adapter, or its bases were never computed or loaded.
        """
        if adapter_name not in (known := {*self.specs, *self.adapters_of_model}):
            raise ValueError(
                f"{self.name}: expected one of the adapters {sorted(known)}, found {adapter_name!r}; correct the "
                "name, or load the adapter first"
            )
        self.check_bases(adapter_name, "merge")
        with self.base_weight.whole():
            weight = self.base_weight.transposed()
            adapted = merging.map_weight(self, weight, [adapter_name])
            return self.base_weight.as_stored(adapted) - self.base_weight.as_stored(weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update can be added to the base weight: of a projection without a bias, or if it is zero.

        Peft asks every layer, and for a whole model without a name.
        """
        has_no_part = adapter_name in self.adapters_of_model and adapter_name not in self.specs
        return has_no_part or self.get_base_layer().bias is None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base weight, `W <- (I + E dS C) W + B A`, and into the bias.

        The original tensors are kept beside the merged ones: `unmerge` restores them bit for bit, and a further merge
        starts from them. An offloaded or sharded weight has to be whole, which `CloverModel` sees to.

        Args:
            safe_merge: refuse results that are not finite.
            adapter_names: adapters to merge; None for the active ones.

        Raises:
            ValueError: see `merging.merged_tensors`.
            TypeError: if the quantised base cannot be read or written.
        """
        wanted = dict.fromkeys(check_adapters_to_merge(self, adapter_names))
        names = [name for name in wanted if name in self.clover_S]
        if names:
            self.forget_maps()
            weight, bias = self.merged_tensors([*self.merged_adapters, *names], safe_merge)
            self.base_weight.write(weight, bias)
            self.merged_adapters.extend(names)
            self._merged_scaling |= {name: self.scaling[name] for name in names}

    def merged_tensors(self, adapter_names: list[str], safe_merge: bool = False) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with adapters merged, those that are merged already with the scales of then."""
        now, self.scaling = self.scaling, self.scaling | self._merged_scaling
        try:
            return merging.merged_tensors(self, adapter_names, safe_merge)
        finally:
            self.scaling = now

    def unmerge(self) -> None:
        """Put the base's own tensors back."""
        if not self.base_weight.is_merged:
            warn("Already unmerged. Nothing to do.")
            return
        self.base_weight.restore()
        self.merged_adapters, self._merged_scaling = [], {}

    def __repr__(self) -> str:
        """The base layer, and one line per adapter and slice: part, blocks, shape of S, basis."""
        lines = [f"(base_layer): {self.base_layer!r}"]
        for adapter_name, specs in self.specs.items():
            low_rank = [b.shape[1] for b in self.trained_tensors(adapter_name).get("clover_B", {}).values()]
            more = "".join(f", low rank {rank}" for rank in low_rank)
            dropout = getattr(self.clover_dropout[adapter_name], "p", 0.0)
            for spec in specs:
                partner = f" with {spec.partner.path}" if spec.partner is not None and spec.basis == "pair" else ""
                lines.append(
                    f"({adapter_name}) {spec.part}: {spec.blocks} blocks of {spec.size}, r={spec.r}, "
                    f"{spec.s_matrix} S {spec.s_shape}, {spec.basis}"
                    f"{partner}{', truncated' if spec.truncate else ''}{more}"
                    f"{f', dropout {dropout}' if dropout else ''}"
                )
        # The tensors' containers would be seven lines each that say nothing more.
        return f"clover.Linear(\n{indent(chr(10).join(lines), '  ')}\n)"


class CloverLinear(CloverLayer):
    """The layer that `CloverModel` makes. For "all-linear", peft looks for "Linear" in the names of layer classes."""
