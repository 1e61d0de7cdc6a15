"""What a tuner does about `target_parameters`: stacks of experts' weights, which are parameters and not modules."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from ..base_model.families import find_suffix
from ..runtime.sharding import whole_shape
from .adapter_tensors import file_key
from .config import CloverConfig
from .experts import CloverExperts


class TargetParameters(BaseTuner):
    """The part of `CloverModel` that finds the parameters to adapt."""

    def _inject_parameters(
        self, peft_config: CloverConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adapt the parameters of `target_parameters`, and return their paths.

        Raises:
            ValueError: if a name matches no parameter, or the model's weights are going to be sharded.
        """
        wanted = sorted(peft_config.target_parameters or ())
        if wanted and (is_fsdp_enabled() or is_deepspeed_zero3_enabled()):
            raise ValueError(
                f"target_parameters={wanted}: expected whole experts, found FSDP or DeepSpeed's ZeRO-3, which shard "
                "them; train on one device or with DistributedDataParallel or ZeRO-2, or leave target_parameters out"
            )
        own = (path for path, _ in model.named_parameters() if ".clover_" not in path)
        paths = [".".join(part for part in path.split(".") if part != "base_layer") for path in own]
        found: set[str] = set()
        for name in wanted:
            matched = {path for path in paths if find_suffix(path, [name])}
            if not matched:
                raise ValueError(
                    "target_parameters: expected names such as 'experts.gate_up_proj', which end the path of a "
                    f"parameter, found {name!r}, which ends none; correct it or leave it out (quantised experts may "
                    "have other names)"
                )
            config = replace(peft_config, target_modules={name})  # for its layers and exclusions
            found |= {path for path in matched if check_target_module_exists(config, path) is True}
        for path in sorted(found):
            holder, _, parameter = path.rpartition(".")
            parent, _, child = holder.rpartition(".")
            target = outermost = model.get_submodule(holder)
            while isinstance(target, CloverExperts) and target.base_weight.parameter != parameter:
                target = target.base_layer
            target = target if isinstance(target, CloverExperts) else outermost
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(
                    peft_config=peft_config,
                    adapter_name=adapter_name,
                    target=target,
                    target_name=child,
                    parent=model.get_submodule(parent),
                    current_key=path,
                    parameter_name=parameter,
                )
        return sorted(found)

    def _refuse_experts(self, config: CloverConfig) -> None:
        """Refuse stacks of experts' weights among the target modules: each stack is one parameter, not a module."""
        names = config.target_modules if isinstance(config.target_modules, set) else set()
        for path, parameter in self.model.named_parameters():
            shape = whole_shape(parameter)
            if len(shape) > 2 and (name := next((n for n in names if path.endswith("." + n)), None)):
                raise ValueError(
                    f"{path}: expected a linear projection, found a stack of {shape[0]} experts' weights of "
                    f"shape {shape[1:]}; leave it out of target_modules, and pass "
                    f"target_parameters={[name if '.' in name else f'experts.{name}']} to adapt it"
                )

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return file_key(super()._remove_adapter_name_from_key(key, adapter_name))
