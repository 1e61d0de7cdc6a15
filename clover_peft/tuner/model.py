"""`CloverModel`: puts CLOVER layers into a model and takes them out again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils import get_quantization_kwargs
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..base_model.experts import experts_slice
from ..base_model.families import family_of, unknown_family_message
from ..base_model.resolve import default_targets, resolve
from ..base_model.slices import TargetSlice
from ..io.user_warning import warn
from ..runtime.loading import (
    leave_out_of_report,
    loaded_by_transformers,
    makes_meta_tensors,
    transformers_loads,
    weights_follow,
)
from ..runtime.sharding import filled_by_rank_0, refuse_sharded, spare_broadcasts
from .adapter_file import check_and_complete, has_same_bases, select_for_saving
from .adapter_folder import check_folder
from .adapter_tensors import BASES_CHECKSUM, FROZEN, PACKED
from .bases import compute_frozen_tensors, warn_of_zero_blocks
from .block_spec import block_specs, warn_of_useless_block_size
from .combining import add_up, find_sources
from .config import CloverConfig
from .experts import CloverExperts
from .layer import CloverLayer, CloverLinear
from .layers import check_merges, clover_layers, layer_around, unwrap_empty_layers, warning_of_rounding
from .merging import check_truncation
from .mixed_batch import mixed_batch
from .model_maps import fold_together
from .targets import TargetParameters, check_names, refuse_bypassed, refuse_fusing, refuse_shared, shared_modules
from .tied_weights import TiedWeights, untie_whole

_PROGRESS = "making CLOVER's bases, once"  # without a total, which is known only when the modules have been walked


@dataclass
class _Injection:
    """State of one call of `inject_adapter`.

    Attributes:
        may_be_loaded: a file's weights follow, or may follow because the config was read from a file.
        bases_follow: a file's weights follow and include the bases, so that none are computed.
        is_meta: the adapter is made on the meta device.
        shared: see `shared_modules`.
        zero_blocks: blocks of zeros among the bases that are computed.
        progress: the progress bar, one step a module.
    """

    may_be_loaded: bool
    bases_follow: bool
    is_meta: bool
    shared: dict[nn.Module, list[str]]
    zero_blocks: list[str] = field(default_factory=list)
    progress: Any = field(default_factory=lambda: tqdm(desc=_PROGRESS, unit=" modules", delay=3, leave=False))


class CloverModel(TargetParameters, TiedWeights):
    """Adds CLOVER adapters to a model (arXiv 2411.17426).

    Every head keeps its weights, and gets frozen bases and a trained matrix of singular values between them.

    Args:
        model: The model to adapt, in place.
        config: A [`CloverConfig`].
        adapter_name: The adapter's name.
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

    # ------------------------------------------------------------------ injection

    def _prepare_adapter_config(self, peft_config: CloverConfig, model_config: dict) -> CloverConfig:
        if peft_config.target_modules is None:
            found = default_targets(self.model)
            if not found:
                model_type = str(model_config.get("model_type") or type(self.model).__name__)
                raise ValueError(unknown_family_message(model_type, "target_modules"))
            peft_config.target_modules = set(found.values())
            paths = [path for path, _ in self.model.named_modules() if path]
            matched = {path for path in paths if self._check_target_module_exists(peft_config, path)}
            if others := sorted(matched - set(found)):
                # Modules elsewhere, as in a tower of another family, have these names too: whole paths are needed.
                peft_config.target_modules = matched & set(found)
                if unknown := [path for path in others if family_of(self.model, path) is None]:
                    warn(
                        f"{len(unknown)} modules such as {unknown[0]} belong to a part of the model that "
                        "clover_peft's table of architectures does not know; they are left out, name target_modules "
                        "to adapt them",
                    )
        return super()._prepare_adapter_config(peft_config, model_config)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As in peft, but a failure takes out the layers that were already injected."""
        config = self.peft_config[adapter_name]
        loads = state_dict is not None or weights_follow()
        if config.unfolds and (transformers_loads() or not loads):
            raise ValueError(
                f"adapter {adapter_name!r}: expected one that was saved folded to be loaded by peft, if it is to be "
                f"trained on, found {'transformers as its loader' if loads else 'no weights for it'}; load it with "
                "PeftModel.from_pretrained(base, folder, is_trainable=True)"
            )
        if config.awaits_weights and (loads or config.inference_mode):  # without them, inference makes no sense
            check_folder(config.folder)
        self._check_experts(config, is_new=not loads)
        if state_dict is None and not config.target_parameters:
            check_names(self.model, config.target_modules, config.exclude_modules)
        refuse_sharded(self.model)
        in_file = config.save_bases is not False and not config.unfolds
        bases_follow = loads and in_file and not filled_by_rank_0()
        is_meta = low_cpu_mem_usage or makes_meta_tensors()
        self._injection = _Injection(loads or config.awaits_weights, bases_follow, is_meta, shared_modules(self.model))
        if config.awaits_weights and not loads:
            config.set_record_aside()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            made = (layer.specs[adapter_name] for _, layer in clover_layers(self.model, adapter_name))
            warn_of_useless_block_size(config, [spec for specs in made for spec in specs])
            warn_of_zero_blocks(self._injection.zero_blocks)
            if tensors := loaded_by_transformers():
                self._check_file(adapter_name, config, tensors)
            layers = clover_layers(self.model)
            known = {name for _, layer in layers for name in layer.specs}
            for _, layer in layers:
                layer.adapters_of_model = known
            fold_together(self.model, [layer for _, layer in layers if isinstance(layer, CloverLinear)])
            bases = (f"{path}.{name}" for path, layer in layers for name, _ in layer.named_buffers())
            spare_broadcasts(self.model, (name for name in bases if set(name.split(".")) & set(FROZEN)))
        except BaseException:  # also Ctrl-C
            config.take_record_back()
            for _, layer in clover_layers(model):
                layer.forget_tensors(adapter_name)
                layer.forget_maps()
            unwrap_empty_layers(model)
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        finally:
            self._injection.progress.close()
            del self._injection  # a progress bar cannot be copied or pickled with the model
        if loads:
            config.awaits_weights = True  # until they are loaded; if that fails, the adapter is taken out again

    def _check_file(self, adapter_name: str, config: CloverConfig, tensors: dict[str, Tensor]) -> None:
        """Check the tensors that transformers loads next as peft's loads are, and load those that it does not know."""
        tensors = {key: tensor for key, tensor in tensors.items() if "clover_" in key}
        file = super()._remap_adapter_state_dict_for_load(self.model, config, adapter_name, tensors)
        layers = dict(clover_layers(self.model, adapter_name))
        if not any(f"clover_S.{adapter_name}." in key for key in file):
            return  # no file here, or one with other names for modules, which transformers changes
        before = set(file)
        check_and_complete(self.model, layers, adapter_name, config, file)
        self.model.load_state_dict({key: file[key] for key in file.keys() - before}, strict=False)
        # `check_and_complete` has checked that the file is complete: a report of these keys as missing would be false.
        name = re.escape(adapter_name)
        leave_out_of_report(self.model, rf"\.clover_[UV]\.{name}\.", rf"\.({BASES_CHECKSUM}|{PACKED})\.")

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
        layer = target
        refuse_shared(current_key, self._injection.shared.get(target, []))
        refuse_bypassed(parent, current_key)
        refuse_fusing(parent)
        if parameter_name is not None:
            expert, layout = experts_slice(self.model, current_key)
            slices: tuple[TargetSlice, ...] = (expert,)
            if not isinstance(layer, CloverExperts) or layer.base_weight.parameter != parameter_name:
                layer = CloverExperts(target, adapter_name, current_key, layout)
        else:
            sizes = dict(head_dim=peft_config.head_dim, num_heads=peft_config.num_heads)
            slices = resolve(self.model, current_key, **sizes, described=peft_config.mlp_block_size is not None)
            if not isinstance(layer, CloverLayer):
                layer = CloverLinear(target, adapter_name, current_key, get_quantization_kwargs(self.model))
        pattern = peft_config.rank_pattern
        rank = pattern.get(get_pattern_key(list(pattern), current_key), peft_config.r)
        specs = block_specs(peft_config, current_key, slices, rank)
        now = self._injection
        if not now.may_be_loaded or peft_config.base_precision is None:
            peft_config.base_precision = layer.base_weight.precision
        bases = None if now.bases_follow else layer.bases_to_share(specs)
        if bases is None and not now.may_be_loaded:
            if not layer.base_weight.is_readable:
                raise ValueError(
                    f"{current_key}: expected weights to compute bases from, found {layer.base_weight.precision}, "
                    "which can only be run; make the adapter on the unquantised model, or on one that bitsandbytes "
                    "quantised, save it with its bases (save_bases=True or 'folded') and load it here"
                )
            made_by = {"from_activations": "initialize_from_activations", "balanced_updates": "balance_updates"}
            for name, function in made_by.items():
                if getattr(peft_config, name):
                    raise ValueError(
                        f"CloverConfig.{name} is set by {function}; leave it out of the config of a new adapter, and "
                        f"call clover_peft.{function}(model, batches)"
                    )
        if bases is None and not now.is_meta and not now.bases_follow:
            bases = compute_frozen_tensors(self.model, layer.base_weight, specs, now.zero_blocks)
        is_filled = bases is None and now.may_be_loaded and not now.is_meta  # later, from a file
        layer.update_layer(
            adapter_name,
            specs,
            bases,
            low_rank=peft_config.low_rank,
            dropout=peft_config.clover_dropout,
            init_weights=peft_config.init_weights,
            inference_mode=peft_config.inference_mode,
            empty_device=layer.base_weight.device if is_filled else "meta",
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        now.progress.update()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As in peft, but the bases keep float32. Without autocast, S gets the dtype of the base weights."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for _, layer in clover_layers(self.model, adapter_name):
            if not autocast_adapter_dtype:
                for tensors in layer.trained_tensors(adapter_name).values():
                    for parameter in tensors.values():
                        parameter.data = parameter.data.to(layer.base_weight.merge_dtype)

    # ------------------------------------------------------------------ merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in peft, but adapters that cannot be merged are refused before any is merged.

        With `safe_merge`, every result is computed as a trial first, which costs one more merge.
        """
        check_merges(self.model, adapter_names, safe_merge)
        layers: list[Any] = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        with warning_of_rounding(self.model):
            for layer in reversed(layers):  # one inside another tuner's first: that update belongs behind the maps
                with onload_layer(layer):
                    layer.merge(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        """As `merge_adapter`, for `merge_and_unload` and `unload`; `safe_merge` costs one more merge here too."""
        if merge:
            check_merges(self.model, adapter_names, safe_merge)
        else:
            for module in self.model.modules():  # also another tuner's layers, as for trained tokens
                if isinstance(module, BaseTunerLayer) and module.merged:
                    module.unmerge()
        fold_together(self.model, [])
        is_tied = self.get_model_config(self.model).get("tie_word_embeddings")
        with warning_of_rounding(self.model):
            for path, layer in clover_layers(self.model) if merge else ():
                if layer_around(self.model, path) is not None:
                    with onload_layer(layer):
                        layer.merge(adapter_names=adapter_names, safe_merge=safe_merge)
            result: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        spare_broadcasts(result, ())
        if is_tied and not self.get_model_config(result).get("tie_word_embeddings"):
            untie_whole(result)
        return result

    # ------------------------------------------------------------------ switching and replacing

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in peft, but adapters that cannot be active together are refused before any layer is switched."""
        for _, layer in clover_layers(self.model):
            check_truncation(layer, adapter_name, "active")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Peft's own method also copies `weight`. CloverLayer has it already, and it may not be a parameter.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """For calls with `adapter_names`, an adapter for every sample or "__base__" for none."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "adapter_names=... is for inference, but the model is in training mode; call eval() first"
            )
        if missing := set(names) - set(self.peft_config) - {"__base__"}:
            raise ValueError(
                f"adapter_names: expected adapters out of {list(self.peft_config)}, found {sorted(missing, key=str)}; "
                "correct the names, load these adapters first with load_adapter, or pass '__base__' for none"
            )
        with mixed_batch(self.model, names, kwargs):
            yield

    # ------------------------------------------------------------------ combining

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        **options: Any,
    ) -> None:
        """Add an adapter whose map is a weighted sum of other adapters' maps, `E (sum w_i dS_i) C`.

        The sum of truncating adapters is a truncating adapter: it drops the same directions. The rank of its low-rank
        part is the sum of theirs.

        Args:
            adapters: the adapters to combine. In a module that several of them adapt, they must have the same blocks
                and the same bases.
            weights: one weight for each, of any sign.
            adapter_name: name of the new adapter, which is not active yet.
            combination_type: only "linear" exists.
            **options: LoRA's further options, which are refused.

        Raises:
            TypeError: for an option of LoRA, such as `svd_rank`.
            ValueError: naming the module in which they do not fit together; then nothing is added.
        """
        if combination_type != "linear":
            raise ValueError(
                f"combination_type: expected 'linear', found {combination_type!r}; leave it out: sums of adapters "
                "in the same bases are exact and need no other"
            )
        if options:
            raise TypeError(
                f"add_weighted_adapter: expected no options of LoRA's combinations, found {sorted(options)}; leave "
                "them out: CLOVER adds adapters up without an approximation"
            )
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter {adapter_name!r} exists already; pass another name, or delete it first")
        sources = find_sources(self.model, self.peft_config, adapters, weights)
        experts = {path: layer.name for path, (layer, _) in sources.items() if isinstance(layer, CloverExperts)}
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]],
            low_rank=sum(self.peft_config[name].low_rank for name in adapters),
            target_modules=set(sources) - set(experts),
            target_parameters=list(experts.values()) or None,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
        self.peft_config[adapter_name].awaits_weights = False
        try:
            self.inject_adapter(self.model, adapter_name)
            self.peft_config[adapter_name].base_precision = self.peft_config[adapters[0]].base_precision
            add_up(sources, adapter_name, dict(zip(adapters, weights, strict=True)))
        except BaseException:
            if adapter_name in self.peft_config:
                self.discard(adapter_name)
            raise

    # ------------------------------------------------------------------ saving and loading

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: CloverConfig, adapter_name: str, state_dict: dict, unwanted_adapter_names: list
    ) -> dict[str, Tensor]:
        config.check()
        result = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for name, layer in clover_layers(model, adapter_name):
            select_for_saving(name, layer, adapter_name, config, result)
        return result

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: CloverConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        result = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = model if isinstance(model, CloverModel) else getattr(model, "base_model", None)
        layers = dict(clover_layers(model, adapter_name))
        described = copy(config)
        if config.recorded and not has_same_bases(layers, adapter_name, result):
            described.take_record_back()
        try:
            check_and_complete(model, layers, adapter_name, described, result)
        except ValueError:
            trained = config.init_weights and any(layer.is_trained(adapter_name) for layer in layers.values())
            if isinstance(tuner, CloverModel) and config.awaits_weights and not trained:
                tuner.discard(adapter_name)
            raise
        if config.recorded:
            config.__dict__.update(described.__dict__ | {"recorded": {}})
            made_by = dict(from_activations=config.from_activations, balanced_updates=config.balanced_updates)
            for layer in layers.values():
                layer.change_specs(adapter_name, **made_by)
        if config.unfolds and all(s.basis != "folded" for layer in layers.values() for s in layer.specs[adapter_name]):
            config.folded, config.save_bases = False, True
            config.truncate = config.truncate and bool(config.r or config.rank_pattern)
        config.awaits_weights = False  # from here on the config is that of an adapter of this model
        return result

    def discard(self, adapter_name: str) -> None:
        """Take out an adapter that could not be loaded, and its layers if it was the only one."""
        if list(self.peft_config) == [adapter_name]:
            self.unload()
        else:
            self.delete_adapter(adapter_name)
            unwrap_empty_layers(self.model)
