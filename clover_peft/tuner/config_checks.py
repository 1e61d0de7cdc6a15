"""The checks of `CloverConfig`'s values, and the options that it lacks: those of `LoraConfig`, and misspelt ones.

The command checks options with this file, without torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

_SWITCHES = (
    "cross_layer",
    "truncate",
    "init_weights",
    "check_base",
    "folded",
    "from_activations",
    "balanced_updates",
    "ensure_weight_tying",
    "inference_mode",
)
_CHOICES: dict[str, tuple[Any, ...]] = {
    "s_matrix": ("full", "diagonal"),
    "basis": (None, "qr", "svd"),
    "bias": ("none", "all", "clover_only"),
    "save_bases": (True, False, "folded"),
    **dict.fromkeys(_SWITCHES, (True, False)),
}
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

MAX_CONDITION = 100.0  # of new adapters: docs/explanation/numerics.md
MOST_CONDITION = 1e4  # beyond it a decomposition may drop directions


def check(values: Mapping[str, Any]) -> None:
    """Check the fields of a `CloverConfig` by name, each on its own and then their combinations.

    One that is left out has its default.
    """
    for name, allowed in _CHOICES.items():
        value = values.get(name, allowed[0])
        if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in allowed):
            raise ValueError(f"CloverConfig.{name}: expected one of {list(allowed)}, found {value!r}")
    parameters = values.get("target_parameters")
    if isinstance(parameters, str) or not all(isinstance(name, str) for name in parameters or ()):
        raise ValueError(f"CloverConfig.target_parameters: expected None or a list of names, found {parameters!r}")
    _check_saved_modules(values.get("modules_to_save"), values.get("trainable_token_indices"))
    _check_numbers(values)
    _check_combinations(values)


def _check_saved_modules(modules: Any, tokens: Any) -> None:
    """Peft wraps every module whose path ends in one of the names, also inside of adapted layers."""
    if isinstance(modules, str):
        raise ValueError(f"CloverConfig.modules_to_save: expected a list of names, found {modules!r}")
    for field, names in {"modules_to_save": modules, "trainable_token_indices": tokens}.items():
        for name in names or ():
            if isinstance(name, str) and "base_layer".endswith(name):
                raise ValueError(
                    f"CloverConfig.{field}: {name!r} also ends 'base_layer', as every adapted projection is called; "
                    f"pass a longer end of the module's path"
                )


def _check_numbers(values: Mapping[str, Any]) -> None:
    for name in ("r", "block_size", "mlp_block_size", "head_dim", "num_heads"):
        _check_positive(name, values.get(name), optional=True)
    low_rank, dropout = values.get("low_rank", 0), values.get("clover_dropout", 0.0)
    if not isinstance(low_rank, int) or isinstance(low_rank, bool) or low_rank < 0:
        raise ValueError(f"CloverConfig.low_rank: expected a positive integer, or 0 for none, found {low_rank!r}")
    pattern = values.get("rank_pattern", {})
    if not isinstance(pattern, dict):
        raise ValueError(f"CloverConfig.rank_pattern: expected a dict of names to ranks, found {pattern!r}")
    for name, rank in pattern.items():
        _check_positive(f"rank_pattern[{name!r}]", rank)
    limit = values.get("max_condition")
    if limit is not None and (type(limit) not in (int, float) or not 1 < limit <= MOST_CONDITION):
        raise ValueError(
            f"CloverConfig.max_condition: expected a number above 1 and up to {MOST_CONDITION:g}, found {limit!r}"
        )
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise ValueError(f"CloverConfig.clover_dropout: expected a number, found {dropout!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"CloverConfig.clover_dropout: expected 0 <= p < 1, found {dropout}")


def _check_positive(name: str, value: object, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"CloverConfig.{name}: expected a positive integer{' or None' if optional else ''}, found {value!r}"
        )


def _check_combinations(values: Mapping[str, Any]) -> None:
    get = values.get
    is_regex = isinstance(get("target_modules"), str) and get("target_modules") != "all-linear"
    layers = next((name for name in ("layers_to_transform", "layers_pattern") if get(name) is not None), None)
    refused = {
        "s_matrix='diagonal' has no meaning in the QR basis, whose matrix is triangular; use basis='svd' (or "
        "None) or s_matrix='full'": get("s_matrix") == "diagonal" and get("basis") == "qr",
        "truncate=True drops the directions beyond r; pass r=... or rank_pattern": (
            get("truncate") and get("r") is None and not get("rank_pattern") and not get("folded")
        ),
        "with truncate=True the map replaces a head's output, which clover_dropout would drop; use one of the "
        "two": get("truncate") and get("clover_dropout", 0.0) > 0,
        "truncate=True needs leading directions, but the QR basis has no order; use basis='svd'": (
            get("truncate") and get("basis") == "qr"
        ),
        f"{layers} cannot be used with a regular expression in target_modules; put the layers into the "
        "expression, or pass a list of names": is_regex and layers is not None,
        "layers_pattern needs layers_to_transform; pass both or neither": (
            bool(get("layers_pattern")) and get("layers_to_transform") is None
        ),
        "save_bases=False computes the bases again from the weights, but these were made from activations; use "
        "save_bases=True or 'folded'": get("from_activations") and get("save_bases") is False,
        "save_bases=False computes the bases again from the weights, but balance_updates scaled these; use "
        "save_bases=True or 'folded'": get("balanced_updates") and get("save_bases") is False,
        "the map of an expert changes its weight and never sees its input, which clover_dropout and low_rank need; "
        "leave target_parameters out, or these": bool(
            get("target_parameters") and (get("clover_dropout", 0.0) or get("low_rank", 0))
        ),
        "a folded adapter holds maps instead of bases and is not a new one; leave folded out, or load the adapter "
        "with PeftModel.from_pretrained(base, folder, is_trainable=True or False)": get("folded")
        and not get("inference_mode"),
    }
    if message := next((message for message, holds in refused.items() if holds), None):
        raise ValueError(f"CloverConfig: {message}")


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
