"""Whether a model's weights can be rewritten: they are its own, in memory, and not quantised."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor


def check_plain(model: nn.Module) -> None:
    """Check that a model has no adapters, and all its weights in memory, where they can be written to.

    Raises:
        TypeError: if it is not a model.
        ValueError: if it has adapters, or offloaded, meta or sharded weights, or was made in inference mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, found {type(model).__name__}; load the model first")
    for path, module in model.named_modules():  # The model itself comes first.
        if isinstance(module, (PeftModel, BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise ValueError(
                f"{path or 'model'}: expected a model without adapters, found {type(module).__name__}; call "
                "merge_and_unload() or unload() first"
            )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__}: expected all weights in memory, found some offloaded or on the meta device; "
            "load it without offloading"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{name}: expected a weight that is whole in this process, found it sharded; load the model whole, "
                "and shard it afterwards"
            )
        if parameter.is_inference():
            raise ValueError(
                f"{name}: expected a weight that can be written to, found an inference tensor; load the model outside "
                "of torch.inference_mode()"
            )


def check_unquantised(model: nn.Module, what: str) -> None:
    """Check that a model's weights are not quantised; `what` is its name in the error."""
    if getattr(model, "is_quantized", False) or any(not p.is_floating_point() for p in model.parameters()):
        raise ValueError(
            f"{what}: expected weights that are not quantised, found some; use the model as it was before quantisation"
        )
