"""`CloverModel`: puts CLOVER layers into a model and takes them out again."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers.integrations import PeftAdapterMixin

from ..base_model.families import FAMILIES, family_of, unknown_family_message
from ..base_model.resolve import default_targets, resolve
from ..linalg.decomposition import Bases
from ..runtime.sharding import filled_by_rank_0
from .adapter_file import is_untouched, name_bases, select_for_saving, take_checkpoint
from .adapter_folder import check_source
from .adapter_tensors import FROZEN
from .base_check import MUCH_CHANGED, error_from_rounding
from .bases import clover_layers, frozen_tensors, warn_about_conditions, warn_about_dropped
from .block_spec import BlockSpec, block_spec
from .config import CloverConfig
from .file_check import check_nothing_left
from .layer import CloverLayer
from .merging import check_merge, check_truncation, merged_tensors

# Rounding of merged weights above this share of the update is worth a warning.
MUCH_ROUNDED = 0.1
# What makes an adapter and loads its weights next. A tuner is told of it in no other way, and a config from a file may
# make a new adapter as well. For a caller that is not found here bases are computed, which takes longer.
_LOADERS = {
    getattr(function, "__code__", None)
    for function in (PeftModel.from_pretrained, PeftModel.load_adapter, PeftAdapterMixin.load_adapter)
}


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
        if peft_config.target_modules is None:
            found = default_targets(self.model)
            if not found:
                raise ValueError(
                    unknown_family_message(
                        str(model_config.get("model_type") or type(self.model).__name__), "target_modules"
                    )
                )
            peft_config.target_modules = set(found.values())
            matched = {
                path
                for path, _ in self.model.named_modules()
                if path and self._check_target_module_exists(peft_config, path)
            }
            if others := sorted(matched - set(found)):
                # The same names elsewhere (a tower of another family, say) are not meant: whole paths tell them apart.
                peft_config.target_modules = matched & set(found)
                if unknown := [path for path in others if family_of(self.model, path) is None]:
                    warnings.warn(
                        f"{len(unknown)} modules such as {unknown[0]} belong to a part of the model that "
                        "clover_peft's table of architectures does not know; they are left out, name target_modules "
                        "to adapt them",
                        stacklevel=2,
                    )
        return super()._prepare_adapter_config(peft_config, model_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in peft; a failure takes back what was already injected, so that the model stays as it was."""
        config = self.peft_config[adapter_name]
        if config.folded and not config.inference_mode:
            raise ValueError(
                f"adapter {adapter_name!r} was saved folded, for inference; load it with is_trainable=False, or train "
                "from one saved with save_bases=True"
            )
        loads = kwargs.get("state_dict") is not None or _loads_next()
        if loads and config.source is None:
            config.source = ""
        check_source(config.source, loads or config.inference_mode)
        self._refuse_experts(config)
        self._refuse_sharded()
        # For the time of the injection only: a progress bar cannot be copied or pickled with the model.
        self._bases_come = loads and config.save_bases is not False and not filled_by_rank_0()
        self._conditions: dict[str, tuple[float, torch.dtype]] = {}
        self._progress = tqdm(desc="CLOVER bases", unit=" modules", delay=3, leave=False)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._warn_about_block_size(adapter_name, config)
            warn_about_conditions(self._conditions)
            self._spare_broadcasts()
        except BaseException:  # Ctrl-C, too
            _take_out(model, adapter_name)
            raise
        finally:
            self._progress.close()
            del self._progress, self._conditions, self._bases_come

    def _warn_about_block_size(self, adapter_name: str, config: CloverConfig) -> None:
        """A block size for heads is without effect where no target has any."""
        specs = [spec for _, layer in clover_layers(self.model) for spec in layer.specs.get(adapter_name, ())]
        if config.block_size is not None and specs and all(spec.part in ("up", "linear") for spec in specs):
            warnings.warn(
                f"block_size={config.block_size} cuts attention heads, and no target has any: it is without effect; "
                "cut these with mlp_block_size, or describe the heads with head_dim=... or num_heads=...",
                stacklevel=2,
            )

    def _refuse_experts(self, config: CloverConfig) -> None:
        """The experts of a mixture are stacks of matrices: parameters, which no name of a module can mean."""
        names = config.target_modules if isinstance(config.target_modules, set) else set()
        for path, parameter in self.model.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)  # sharded by DeepSpeed's ZeRO-3, it is empty
            if len(shape) > 2 and any(path.endswith("." + name) for name in names):
                raise ValueError(
                    f"{path}: expected a linear projection, found a stack of {shape[0]} experts' weights of "
                    f"shape {tuple(shape[1:])}, which CLOVER does not adapt; leave it out of target_modules"
                )

    def _refuse_sharded(self) -> None:
        """Bases are made of whole weights, and S lies with the heads, which tensor parallelism spreads."""
        for path, parameter in self.model.named_parameters():
            if isinstance(parameter, DTensor):
                raise ValueError(
                    f"{path}: expected a whole weight, found one sharded over {parameter.device_mesh}; load the model "
                    "without tp_plan and distributed_config, and add the adapter before the model is sharded, as "
                    "`accelerate launch` with FSDP2 does"
                )

    def _spare_broadcasts(self) -> None:
        """DistributedDataParallel sends every buffer to all processes in each forward, unless told that it need not.

        The bases never change. It looks for their names as they are in the module that it wraps: a bare model, the
        tuner or a `PeftModel`.
        """
        names = {
            f"{path}.{name}"
            for path, layer in clover_layers(self.model)
            for name, _ in layer.named_buffers()
            if name.startswith(FROZEN)
        }
        known = set(getattr(self.model, "_ddp_params_and_buffers_to_ignore", ()))
        wrapped = {prefix + name for name in names for prefix in ("", "model.", "base_model.model.")}
        self.model._ddp_params_and_buffers_to_ignore = sorted(known | wrapped)

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
        is_new = not isinstance(target, CloverLayer)
        layer = (
            target
            if isinstance(target, CloverLayer)
            else CloverLayer(target, adapter_name, current_key, get_quantization_kwargs(self.model))
        )
        if peft_config.source is None or peft_config.base_precision is None:
            peft_config.base_precision = layer.base_weight.precision
        bases = None if self._bases_come else layer.bases_to_share(specs)
        if bases is None and peft_config.source is None and not layer.base_weight.is_readable:
            raise ValueError(
                f"{current_key}: expected weights to compute bases from, found {layer.base_weight.precision}, "
                "which can only be run; make the adapter on the unquantised model, or on one that bitsandbytes "
                "quantised, save it with its bases (save_bases=True or 'folded') and load it here"
            )
        made_by = {"from_activations": "initialize_from_activations", "balanced_updates": "balance_updates"}
        for option, function in made_by.items():
            if bases is None and peft_config.source is None and getattr(peft_config, option):
                raise ValueError(
                    f"CloverConfig.{option} is set by {function}; leave it out of the config of a new adapter, and "
                    f"call clover_peft.{function}(model, batches)"
                )
        if bases is None and not _on_meta() and not self._bases_come:
            bases = frozen_tensors(self.model, layer, specs, self._report)
        layer.update_layer(
            adapter_name,
            specs,
            bases,
            low_rank=peft_config.low_rank,
            dropout=peft_config.clover_dropout,
            init_weights=peft_config.init_weights,
            inference_mode=peft_config.inference_mode,
            empty_device="meta" if bases is not None or peft_config.source is None or _on_meta() else _home(layer),
        )
        if is_new:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        self._progress.update()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As in peft; without autocast S gets the dtype of the base weights. The bases keep float32 in any case."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for _, layer in clover_layers(self.model):
            if not autocast_adapter_dtype and adapter_name in layer.specs and layer.weight.is_floating_point():
                for tensors in layer.trained_tensors(adapter_name).values():
                    for parameter in tensors.values():
                        parameter.data = parameter.data.to(layer.weight.dtype)

    def _specs(self, config: CloverConfig, key: str) -> tuple[BlockSpec, ...]:
        slices = resolve(
            self.model,
            key,
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            described=config.mlp_block_size is not None,
        )
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key), config.r)
        specs = tuple(block_spec(config, key, target, rank) for target in slices)
        if rank is not None and rank > (widest := max(spec.size for spec in specs)):
            raise ValueError(
                f"{key}: r={rank} is larger than any of its blocks, of at most {widest} features; lower r, or give "
                "this module its own with rank_pattern"
            )
        return specs

    def _report(self, layer: CloverLayer, spec: BlockSpec, bases: Bases) -> None:
        warn_about_dropped(layer, spec, bases)
        self._conditions[f"{layer.name} ({spec.part})"] = (
            float(bases.condition.max()),
            layer.base_weight.compute_dtype,
        )

    # ------------------------------------------------------------------ merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in peft; what cannot be merged is refused before anything is."""
        self._check_merge(adapter_names, safe_merge)
        with self._measuring_rounding():
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

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
        with self._measuring_rounding():
            result: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        kept = getattr(result, "_ddp_params_and_buffers_to_ignore", [])
        if others := [name for name in kept if not set(name.split(".")) & set(FROZEN)]:
            result._ddp_params_and_buffers_to_ignore = others
        elif kept:
            del result._ddp_params_and_buffers_to_ignore
        return result

    @contextmanager
    def _measuring_rounding(self) -> Iterator[None]:
        """Say once how much of the update quantising the merged weights again has lost, where that is much."""
        layers = {path: layer for path, layer in clover_layers(self.model) if layer.quantization_backend is not None}
        for layer in layers.values():
            layer.merge_rounding = (0.0, 0.0)
        yield
        merged = {path: layer.merge_rounding for path, layer in layers.items() if layer.merge_rounding[0] > 0}
        if not merged:
            return
        changes, errors = (sum(column) for column in zip(*merged.values(), strict=True))
        if (lost := (errors / changes) ** 0.5) > MUCH_ROUNDED:
            worst = max(merged, key=lambda path: merged[path][1] / merged[path][0])
            warnings.warn(
                f"merged into {layers[worst].base_weight.precision} weights, whose rounding is {lost:.0%} of the "
                f"update (worst: {worst}, {(merged[worst][1] / merged[worst][0]) ** 0.5:.0%}); unmerge, call "
                "clover_peft.dequantize(model) and merge then, to lose nothing",
                stacklevel=4,
            )

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raise whatever merging would, with nothing merged yet. With `safe_merge` every layer is merged on trial."""
        for _, layer in clover_layers(self.model):
            wanted = layer.active_adapters if adapter_names is None else adapter_names
            names = list(dict.fromkeys([*layer.merged_adapters, *(name for name in wanted if name in layer.specs)]))
            if not names:
                continue
            check_merge(layer, names)
            if safe_merge:
                with layer.base_weight.whole():
                    merged_tensors(layer, names, safe_merge=True)

    # ------------------------------------------------------------------ switching and replacing

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in peft; what cannot be active together is refused before any layer is switched."""
        for _, layer in clover_layers(self.model):
            check_truncation(layer, [adapter_name] if isinstance(adapter_name, str) else adapter_name, "active")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Peft's own also copies `weight`, which is no parameter where tokens are trained; ours is in place already.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Within it, mixed batches: `adapter_names` has an adapter for every sample, or "__base__" for none."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "adapter_names=... is for inference, but the model is in training mode; call eval() first"
            )
        if missing := set(names) - set(self.peft_config) - {"__base__"}:
            raise ValueError(f"adapter_names: expected adapters out of {list(self.peft_config)}, found {missing}")
        beams = kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", None) or 1
        encoder = self.model.get_encoder() if beams > 1 and hasattr(self.model, "get_encoder") else None
        # A beam search repeats every sample, but for an encoder, which has run before.
        unrepeated = set() if encoder in (None, self.model) else set(encoder.modules())
        repeated = [name for name in names for _ in range(beams)]
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_adapter_names, names=list(names) if module in unrepeated else repeated), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, (CloverLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ------------------------------------------------------------------ combining

    @torch.no_grad()
    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter that is a weighted sum of others: its map is exactly the sum of theirs, `E (sum w_i dS_i) C`.

        Of adapters that truncate the offsets dS are added up, so, and what they drop is dropped once.

        Args:
            adapters: the adapters to combine. Where two of them adapt the same module, they must cut it alike and
                have the same bases (made on the same base model).
            weights: one a piece; any sign.
            adapter_name: name of the new adapter, which is not active yet.
            combination_type: "linear", the only one there is.

        Raises:
            ValueError: naming the module where they do not fit together, with nothing added.
        """
        sources = self._check_combination(adapters, weights, adapter_name, combination_type)
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]],
            target_modules=set(sources),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
        try:
            self.inject_adapter(self.model, adapter_name)
            for path, (layer, names) in sources.items():
                if layer.specs[adapter_name] != layer.specs[names[0]]:
                    raise ValueError(
                        f"{path}: the adapters {adapters} were made with different options; combine adapters of one "
                        "configuration"
                    )
                for spec in layer.specs[adapter_name]:
                    new, first = layer.tensors(adapter_name, spec), layer.tensors(names[0], spec)
                    for mine, theirs in zip(new[1:], first[1:], strict=True):
                        if mine is not None and theirs is not None:
                            mine.copy_(theirs)
                    new.s.zero_()
                    for name in names:
                        new.s.add_(layer.tensors(name, spec).s, alpha=weights[adapters.index(name)])
        except BaseException:
            if adapter_name in self.peft_config:
                self.discard(adapter_name)
            raise

    def _check_combination(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
    ) -> dict[str, tuple[CloverLayer, list[str]]]:
        """Path -> layer and those of the adapters that it has; raises if they cannot be added up."""
        if combination_type != "linear":
            raise ValueError(f"combination_type: expected 'linear', found {combination_type!r}")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter {adapter_name!r} exists already; pass another name, or delete it first")
        if missing := set(adapters) - set(self.peft_config):
            raise ValueError(f"adapters: expected some of {list(self.peft_config)}, found {sorted(missing)}")
        if not adapters or len(set(adapters)) != len(adapters) or len(adapters) != len(weights):
            raise ValueError(
                f"expected one weight for each of several different adapters, found {len(weights)} for {adapters}"
            )
        for name in adapters:
            if self.peft_config[name].low_rank:
                raise ValueError(f"adapter {name!r} has a low-rank part, which cannot be added up; merge it instead")
            if self.peft_config[name].modules_to_save or self.peft_config[name].trainable_token_indices:
                raise ValueError(
                    f"adapter {name!r} trains whole modules or tokens, which cannot be added up; combine adapters "
                    "without modules_to_save and trainable_token_indices"
                )
        sources = {}
        for path, layer in clover_layers(self.model):
            names = [name for name in adapters if name in layer.specs]
            for name in names:
                layer.check_bases(name, "combine")
                if not layer.has_same_bases(names[0], name):
                    raise ValueError(
                        f"{path}: adapters {names[0]!r} and {name!r} have different bases, in which their S cannot be "
                        "added up; combine adapters of one configuration and one base model, or merge them one after "
                        "the other"
                    )
            if names:
                sources[path] = (layer, names)
        return sources

    # ------------------------------------------------------------------ saving and loading

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: CloverConfig, adapter_name: str, state_dict: dict, unwanted_adapter_names: list
    ) -> dict[str, Tensor]:
        result = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for name, layer in clover_layers(model):
            if adapter_name in layer.specs:
                if config.source:  # made with a file's config, but never loaded
                    config.base_precision = layer.base_weight.precision
                select_for_saving(name, layer, adapter_name, config, result)
        return result

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: CloverConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        result = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = model if isinstance(model, CloverModel) else getattr(model, "base_model", None)
        layers = {name: layer for name, layer in clover_layers(model) if adapter_name in layer.specs}
        try:
            for name, layer in layers.items():
                name_bases(name, layer, adapter_name, result)
                take_checkpoint(model, name, layer, adapter_name, config, result)
            check_nothing_left(model, layers, adapter_name, result)
        except ValueError:
            fresh = not config.init_weights or is_untouched(layers, adapter_name)
            if isinstance(tuner, CloverModel) and config.source is not None and fresh:
                tuner.discard(adapter_name)
            raise
        if (error := error_from_rounding(layers, adapter_name, config, result)) > MUCH_CHANGED:
            warnings.warn(
                f"adapter {adapter_name!r} was trained on {config.base_precision} weights; on this base, whose "
                f"weights are {next(iter(layers.values())).base_weight.precision}, about {error:.0%} of its effect is "
                "rounding (a LoRA, whose update does not depend on the weights, has no such error); load it onto the "
                "weights it was trained on and use clover_peft.dequantize(model) or "
                "clover_peft.merge_onto(model, base)",
                stacklevel=2,
            )
        config.source = None
        return result

    def discard(self, adapter_name: str) -> None:
        """Take out an adapter that could not be loaded, and the layers with it if it was the only one."""
        if list(self.peft_config) == [adapter_name]:
            self.unload()
        else:
            self.delete_adapter(adapter_name)
            _unwrap_empty_layers(self.model)


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict, names: list[str]) -> tuple[Any, dict]:
    return args, {**kwargs, "adapter_names": names}


def _loads_next() -> bool:
    """Whether the adapter's weights are loaded right after it is made."""
    return any(frame.f_code in _LOADERS for frame, _ in traceback.walk_stack(None))


def _home(layer: CloverLayer) -> torch.device:
    """Where the weight is used. One without a device is offloaded to disk: peft has taken off the hooks that bring it,
    and puts them back at the end of a load."""
    if not layer.weight.is_meta:
        return layer.weight.device
    with layer.base_weight.whole():
        return torch.device("cpu") if layer.weight.is_meta else layer.weight.device


def _on_meta() -> bool:
    """Whether new parameters are created on the meta device (`low_cpu_mem_usage`)."""
    probe = nn.ParameterList([torch.empty(0)])  # no layer: its initialisation would draw random numbers
    return next(probe.parameters()).is_meta


def _take_out(model: nn.Module, adapter_name: str) -> None:
    """Remove what an interrupted injection left behind."""
    for _, layer in clover_layers(model):
        layer.forget_tensors(adapter_name)
        layer.forget_maps()
    _unwrap_empty_layers(model)


def _unwrap_empty_layers(model: nn.Module) -> None:
    for name, layer in clover_layers(model):
        if not layer.specs:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
