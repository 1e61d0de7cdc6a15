"""Options that `CloverConfig` lacks: those of `LoraConfig`, with what corresponds to them, and misspelt ones."""

from __future__ import annotations

import difflib
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
# Fields that are set by functions or when a file is written; no list of choices shows them.
NOT_CHOSEN = ("folded", "from_activations", "balanced_updates", "base_precision", "auto_mapping", "peft_version")


def refuse_unknown(names: Iterable[str], fields: Iterable[str]) -> None:
    """Refuse options that `CloverConfig` does not have: those of LoRA, and misspelt ones.

    Args:
        names: the options given.
        fields: those that there are; the ones in `NOT_CHOSEN` are not offered.

    Raises:
        TypeError: with what corresponds to the options of LoRA in CLOVER, or else with the nearest field. A name that
            is near no field is left to Python.
    """
    known = [*fields]
    if found := [name for name in names if name in CORRESPONDING]:
        raise TypeError(
            f"CloverConfig got an unexpected keyword argument {found[0]!r}, an option of LoraConfig: "
            + "; ".join(f"{name}: {CORRESPONDING[name]}" for name in found)
        )
    for name in names:
        near = difflib.get_close_matches(name, [field for field in known if field not in NOT_CHOSEN], n=1)
        if name not in known and near:
            # Peft looks for the first words where it reads a file that a later version wrote.
            raise TypeError(f"CloverConfig got an unexpected keyword argument {name!r}; did you mean {near[0]}?")
