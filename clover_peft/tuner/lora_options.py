"""The options of `LoraConfig` that `CloverConfig` does not have, and what corresponds to them."""

from __future__ import annotations

from collections.abc import Iterable

# Option of `LoraConfig` -> what to do instead.
CORRESPONDING = {
    "lora_alpha": "CLOVER has no alpha; leave it out, and scale a trained adapter with set_scale",
    "alpha_pattern": "CLOVER has no alpha; leave it out",
    "use_rslora": "CLOVER's update has no factor that depends on r; leave it out",
    "lora_dropout": "use clover_dropout",
    "lora_bias": "use bias='clover_only'",
    "fan_in_fan_out": "CLOVER reads the layout from the layer; leave it out",
    "init_lora_weights": "use init_weights for tests; CLOVER starts as the base model, in bases of its weights",
    "use_dora": "CLOVER has no magnitude vector; leave it out",
    "layer_replication": "CLOVER does not replicate layers; change the model first",
    "megatron_config": "CLOVER does not support Megatron; leave it out",
    "megatron_core": "CLOVER does not support Megatron; leave it out",
    "loftq_config": "CLOVER does not initialise from a quantisation error; leave it out",
    "eva_config": "call clover_peft.initialize_from_activations(model, batches) after get_peft_model",
    "corda_config": "call clover_peft.initialize_from_activations(model, batches) after get_peft_model",
    "lora_ga_config": "call clover_peft.balance_updates(model, batches) after get_peft_model",
}


def refuse_lora_options(names: Iterable[str]) -> None:
    """Refuse options of LoRA by name.

    Raises:
        TypeError: with what corresponds to them in CLOVER.
    """
    if found := [name for name in names if name in CORRESPONDING]:
        raise TypeError(
            f"CloverConfig got an unexpected keyword argument {found[0]!r}, an option of LoraConfig: "
            + "; ".join(f"{name}: {CORRESPONDING[name]}" for name in found)
        )
