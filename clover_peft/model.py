"""`CloverModel`: puts CLOVER layers into a model and takes them out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from tqdm.auto import tqdm

from .architectures import FAMILIES, Partner, base_of, resolve, unknown_family_message
from .blocks import BlockSpec, block_spec
from .checkpoint import check_checkpoint, check_nothing_left, check_source, is_untouched, select_for_saving
from .config import CloverConfig
from .decomposition import Bases, Factors, describe_dropped, gram, pair_bases, qr_bases, svd_bases
from .layer import CloverLayer, check_packing, onloaded


class CloverModel(BaseTuner):
    """Adds CLOVER adapters to a model (arXiv 2411.17426): every head keeps its weights and gets frozen bases and a
    trained matrix of singular values between them.

    Args:
        model: The model to adapt, in place.
        config: A [`CloverConfig`].
        adapter_name: The adapter's name, "default" unless given.
        low_cpu_mem_usage: Create the adapter on the meta device, for weights that are loaded next.

    Example:

        ```py
        >>> import clover_peft
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM

        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> model = get_peft_model(model, clover_peft.CloverConfig())
        ```
    """

    prefix: str = "clover_"
    tuner_layer_cls = CloverLayer
    target_module_mapping: dict[str, list[str]] = {  # noqa: RUF012 - declared so by peft
        model_type: family.target_modules for model_type, family in FAMILIES.items()
    }

    # ------------------------------------------------------------------ injection

    def _prepare_adapter_config(self, peft_config: CloverConfig, model_config: dict) -> CloverConfig:
        if peft_config.target_modules is None and model_config.get("model_type") not in FAMILIES:
            raise ValueError(unknown_family_message(str(model_config.get("model_type")), "target_modules"))
        return super()._prepare_adapter_config(peft_config, model_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in peft; a failure takes back what was already injected, so that the model stays as it was."""
        config = self.peft_config[adapter_name]
        if config.folded and not config.inference_mode:
            raise ValueError(
                f"adapter {adapter_name!r} was saved folded, for inference; load it with is_trainable=False, or train "
                "from one saved with save_bases=True"
            )
        check_source(config)
        # For the time of the injection only: a progress bar cannot be copied or pickled with the model.
        self._conditions: dict[str, tuple[float, torch.dtype]] = {}
        self._progress = tqdm(desc="CLOVER bases", unit=" modules", delay=3, leave=False)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._warn_about_conditions()
        except Exception:
            _take_out(model, adapter_name)
            raise
        finally:
            self._progress.close()
            del self._progress, self._conditions

    def _create_and_replace(
        self,
        peft_config: CloverConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        specs = self._specs(peft_config, current_key)
        check_packing(base_of(target), current_key)
        is_new = not isinstance(target, CloverLayer)
        layer = (
            target
            if isinstance(target, CloverLayer)
            else CloverLayer(target, adapter_name, current_key, get_quantization_kwargs(self.model))
        )
        if peft_config.base_precision is None:
            peft_config.base_precision = layer.precision
        bases: dict[str, Bases] | None
        if peft_config.folded:
            bases = None if _on_meta() or layer.weight.is_meta else {}
        elif (bases := layer.bases_to_share(specs)) is None and not _on_meta():
            bases = self._decompose(layer, specs)
            self._report(layer, specs, bases or {})
        layer.update_layer(
            adapter_name,
            specs,
            bases,
            dropout=peft_config.clover_dropout,
            init_weights=peft_config.init_weights,
            inference_mode=peft_config.inference_mode,
        )
        if is_new:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        self._progress.update()

    def _specs(self, config: CloverConfig, key: str) -> tuple[BlockSpec, ...]:
        slices = resolve(
            self.model,
            key,
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            described=config.mlp_block_size is not None or config.block_size is not None,
        )
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key), config.r)
        return tuple(block_spec(config, key, target, rank) for target in slices)

    @torch.no_grad()
    def _decompose(self, layer: CloverLayer, specs: tuple[BlockSpec, ...]) -> dict[str, Bases] | None:
        """Bases of every slice, or None where the weights are not there (meta device)."""
        with onloaded(layer.get_base_layer()):
            if layer.weight.is_meta:
                return None
            weight = layer.transposed_weight()
            bias = layer.original_bias
            result = {}
            for spec in specs:
                try:
                    result[spec.name] = self._decompose_slice(spec, weight, bias)
                except ValueError as error:
                    raise ValueError(f"{layer.name}: {error}") from error
        return result

    def _decompose_slice(self, spec: BlockSpec, weight: Tensor, bias: Tensor | None) -> Bases:
        g_in = gram(spec.heads.blocks(weight, spec.size), None if bias is None else spec.heads.blocks(bias, spec.size))
        if spec.partner is not None:
            bases = pair_bases(g_in, self._partner_gram(spec, spec.partner).to(g_in.device))
        else:
            bases = qr_bases(g_in) if spec.basis == "qr" else svd_bases(g_in)
        return bases if spec.r == spec.size else bases.leading(spec.r)

    def _partner_gram(self, spec: BlockSpec, partner: Partner) -> Tensor:
        """Gram of the partner's side of every block, summed over the query heads that share a key-value head."""
        rows, bias = _partner_weight(self.model, partner)
        heads = partner.heads
        g = gram(heads.blocks(rows, spec.size), None if bias is None else heads.blocks(bias, spec.size))
        groups = heads.count // spec.heads.count
        return g.unflatten(0, (spec.heads.count, groups, -1)).sum(1).flatten(0, 1)

    def _report(self, layer: CloverLayer, specs: tuple[BlockSpec, ...], bases: dict[str, Bases]) -> None:
        dtype = layer.weight.dtype if layer.weight.is_floating_point() else torch.bfloat16
        for spec in specs:
            if spec.name not in bases:
                continue
            name = f"{layer.name} ({spec.part})"
            if (dropped := describe_dropped(bases[spec.name])) is not None:
                warnings.warn(
                    f"{name}: degenerate weights; directions dropped, which will not be trained, in block(s) "
                    + dropped,
                    stacklevel=2,
                )
            self._conditions[name] = (float(bases[spec.name].condition.max()), dtype)

    def _warn_about_conditions(self) -> None:
        suspect = {
            name: condition
            for name, (condition, dtype) in self._conditions.items()
            if condition * torch.finfo(dtype).eps > 0.1
        }
        if suspect:
            worst = max(suspect, key=suspect.__getitem__)
            warnings.warn(
                f"{len(suspect)} target(s) are so ill-conditioned that rounding in the compute dtype is amplified to "
                f"over 10 % of the map; worst: {worst}, condition up to {suspect[worst]:.0f}; compute in float32, or "
                "leave these modules out with exclude_modules",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in peft; what cannot be merged is refused before anything is."""
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        else:
            for module in self.model.modules():  # trained tokens are another tuner's layers
                if isinstance(module, BaseTunerLayer) and module.merged:
                    module.unmerge()
        return super()._unload_and_optionally_merge(merge, progressbar, adapter_names=adapter_names)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raise whatever merging would, with nothing merged yet. With `safe_merge` every layer is merged on trial."""
        for _, layer in clover_layers(self.model):
            wanted = layer.active_adapters if adapter_names is None else adapter_names
            names = list(dict.fromkeys([*layer.merged_adapters, *(name for name in wanted if name in layer.specs)]))
            layer.check_truncation(names, "merged")
            for name in names:
                layer.check_bases(name, "merge")
            if safe_merge:
                with onloaded(layer.get_base_layer()):
                    layer.merged_tensors(names, safe_merge=True)

    # ------------------------------------------------------------------ switching and replacing

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in peft; what cannot be active together is refused before any layer is switched."""
        for _, layer in clover_layers(self.model):
            layer.check_truncation([adapter_name] if isinstance(adapter_name, str) else adapter_name, "active")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Peft's own also copies `weight`, which is no parameter where tokens are trained; ours is in place already.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "CLOVER does not support mixed batches (adapter_names=...) yet; run the adapters one after the other "
                "with set_adapter"
            )
        yield

    # ------------------------------------------------------------------ saving and loading

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: CloverConfig, adapter_name: str, state_dict: dict, unwanted_adapter_names: list
    ) -> dict[str, Tensor]:
        result = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for name, layer in clover_layers(model):
            if adapter_name in layer.specs:
                select_for_saving(name, layer, adapter_name, config, result)
        return result

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: CloverConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        result = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = model if isinstance(model, CloverModel) else getattr(model, "base_model", None)
        decompose = tuner._decompose if isinstance(tuner, CloverModel) else None
        layers = {name: layer for name, layer in clover_layers(model) if adapter_name in layer.specs}
        try:
            for i, (name, layer) in enumerate(layers.items()):
                check_checkpoint(name, layer, adapter_name, config, result, decompose, first=i == 0)
            check_nothing_left(layers, adapter_name, result)
        except ValueError:
            fresh = not config.init_weights or is_untouched(layers, adapter_name)
            if isinstance(tuner, CloverModel) and config.source and fresh:
                tuner.discard(adapter_name)
            raise
        config.source = None
        return result

    def discard(self, adapter_name: str) -> None:
        """Take out an adapter that could not be loaded, and the layers with it if it was the only one."""
        if list(self.peft_config) == [adapter_name]:
            self.unload()
        else:
            self.delete_adapter(adapter_name)
            _unwrap_empty_layers(self.model)


# ---------------------------------------------------------------------- helpers


def clover_layers(model: nn.Module) -> list[tuple[str, CloverLayer]]:
    """Every CLOVER layer of a model and its path."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, CloverLayer)]


@torch.no_grad()
def explicit_factors(model: nn.Module, target: str, adapter_name: str = "default") -> dict[str, Factors]:
    """The paper's U, S and V (Eq. 3, arXiv 2411.17426) of an adapted projection, from base weights and adapter.

    U and V have orthonormal columns. Where nothing was cut (r = d, no degenerate head), `V S U^T` is the current
    product of a pair, `W_o (I + E dS C) W_v`, and for an intra-layer target the current weight itself.

    Args:
        model: a model with a CLOVER adapter: a `PeftModel`, or one that an adapter was injected into.
        target: path of the projection in the base model, or a suffix that only one adapted module has.
        adapter_name: the adapter.

    Returns:
        Slice name ("weight" where there is only one) -> `Factors` of its blocks, in float64. Under grouped-query
        attention V's rows are those of all query heads that share the key-value head.

    Raises:
        ValueError: if no module or more than one matches, or the adapter is not there.
    """
    tuner = getattr(model, "base_model", model)
    inner = tuner.model if isinstance(tuner, CloverModel) else model
    found = [(n, m) for n, m in clover_layers(inner) if n == target or n.endswith("." + target)]
    if len(found) != 1 or adapter_name not in found[0][1].specs:
        raise ValueError(
            f"{target}: expected one module with an adapter {adapter_name!r}, found {[name for name, _ in found]}; "
            "pass the whole path of one of them"
        )
    layer = found[0][1]
    layer.check_bases(adapter_name, "factor")
    weight, bias = layer.transposed_weight().double(), layer.original_bias
    result = {}
    for spec in layer.specs[adapter_name]:
        tensors = layer.tensors(adapter_name, spec)
        if tensors.u is None:
            raise ValueError(
                f"{layer.name}: the adapter was saved folded and has no bases; save it with save_bases=True"
            )
        rows = spec.heads.blocks(weight, spec.size).permute(1, 0, 2)
        if bias is not None:
            rows = torch.cat([rows, spec.heads.blocks(bias.double(), spec.size).unsqueeze(1)], dim=1)
        u = rows @ tensors.u.double().mT
        eye = torch.eye(spec.size, dtype=u.dtype, device=u.device).expand(spec.blocks, -1, -1)
        v = eye if tensors.v is None else tensors.v.double()
        back = v
        if spec.partner is not None:
            columns = _partner_columns(inner, spec, spec.partner)
            v = columns @ v
            back = columns.mT @ v
        # V^T W_o W_v U, by its definition and from the small sides: what is stored has been rounded to float32.
        s0 = back.mT @ (rows.mT @ u)
        s = tensors.s.double()
        result[spec.name] = Factors(u, s0 + (torch.diag_embed(s) if s.ndim == 2 else s), v)
    return result


def _partner_weight(model: nn.Module, partner: Partner) -> tuple[Tensor, Tensor | None]:
    """The partner's weight with the heads in its last dimension, (D, features), and the bias that belongs to them."""
    module = model.get_submodule(partner.path)
    base = base_of(module)
    # A layer of ours reads any weight: transposed, quantised, or merged into at the moment.
    reader = module if isinstance(module, CloverLayer) else CloverLayer(base, "", partner.path)
    with onloaded(base):
        weight = reader.transposed_weight()
        return (weight.mT, None) if partner.reads else (weight, reader.original_bias)


def _partner_columns(model: nn.Module, spec: BlockSpec, partner: Partner) -> Tensor:
    """(H, D, d) float64: the partner's side of every block, the query heads of a group one below the other."""
    weight, bias = _partner_weight(model, partner)
    if bias is not None:
        weight = torch.cat([weight, bias.to(weight).unsqueeze(0)])
    heads = partner.heads
    blocks = heads.blocks(weight.double(), spec.size)  # (D, groups * H, d)
    groups = heads.count // spec.heads.count
    grouped = blocks.unflatten(1, (spec.heads.count, groups, -1))  # (D, kv heads, groups, blocks a head, d)
    return grouped.permute(1, 3, 2, 0, 4).flatten(2, 3).flatten(0, 1)


def _on_meta() -> bool:
    """Whether new parameters are created on the meta device (`low_cpu_mem_usage`)."""
    return nn.Linear(1, 1).weight.is_meta


def _take_out(model: nn.Module, adapter_name: str) -> None:
    """Remove what an interrupted injection left behind."""
    for _, layer in clover_layers(model):
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            if adapter_name in getattr(layer, attribute):
                del getattr(layer, attribute)[adapter_name]
    _unwrap_empty_layers(model)


def _unwrap_empty_layers(model: nn.Module) -> None:
    for name, layer in clover_layers(model):
        if not layer.specs:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
