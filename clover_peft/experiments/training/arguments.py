"""A run's settings: YAML files and `key=value` overrides, parsed into `SFTConfig` and `JobArguments`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import HfArgumentParser
from trl import SFTConfig

from .. import settings
from .job_arguments import JobArguments

# These settings are paths, or concern the use of the result: runs that differ in them have the same result.
LOCAL = ("data", "output_dir", "resume", "merge")


@dataclass
class Settings:
    """A parsed run.

    Attributes:
        job: the model, the data and what to save.
        sft: TRL's configuration.
        peft: the adapter's configuration, or None for full fine-tuning.
        optimizer: "muon", or None for the one in `sft.optim`.
        learning_rate_factors: see `optimizer.scale_learning_rates`.
        values: the settings as given, after overrides, with one learning rate and without secrets; a record shows
            them, and a resumed run must repeat them.
    """

    job: JobArguments
    sft: SFTConfig
    peft: peft.PeftConfig | None
    optimizer: str | None
    learning_rate_factors: dict[str, float]
    values: dict[str, Any]


def parse(config: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Settings:
    """Read configuration files and apply overrides.

    Top-level keys are fields of `JobArguments` or `trl.SFTConfig`. The `peft` block holds `peft_type` and the fields
    of that type's configuration class, or is null for full fine-tuning. It may also hold three settings that belong to
    the method: `learning_rate`, which a `learning_rate` outside the block overrides (of two overrides, the last one
    counts); `learning_rate_factors`, such as
    `{v_proj: 3}`, which multiply the rate of some parameters; and `optimizer: muon`.
    A file may hold `methods`, a block of `peft` blocks by name; then the key `method` chooses one of them.

    Args:
        config: a YAML file or the name of a shipped one, or several; the keys of a later one replace those of an
            earlier one.
        overrides: `key=value`, values in YAML; dots reach into a block (`peft.r=8`).

    Raises:
        ValueError: a key is unknown (the nearest known one is named), a value has the wrong type or makes no sense, or
            there is no learning rate.
    """
    parts = settings.read(config, overrides)
    flat, block = parts.flat, parts.block
    flat.setdefault("include_num_input_tokens_seen", "non_padding")  # for tokens per second
    flat.setdefault("logging_nan_inf_filter", False)  # The filter would show a loss that is NaN as 0.
    accelerated = torch.accelerator.is_available() and not flat.get("use_cpu")
    flat.setdefault("dataloader_pin_memory", accelerated)
    if flat.get("bf16") is None and not flat.get("fp16"):
        flat["bf16"] = accelerated  # TRL's default is bf16 everywhere, which is slower and less exact on a CPU.

    settings.check_flat(flat, _hints(JobArguments), _hints(SFTConfig))
    _use_new_names(flat)
    job, sft = HfArgumentParser([JobArguments, SFTConfig]).parse_dict(flat)
    adapter = _peft_config(block)
    settings.check_rate(flat)
    if job.merge and adapter is None:
        raise ValueError("merge=true: full fine-tuning has nothing to merge; its model is saved in output_dir/model")
    tuners: dict[Any, type] = peft.PEFT_TYPE_TO_TUNER_MAPPING
    if job.merge and adapter is not None and not hasattr(tuners.get(adapter.peft_type), "merge_and_unload"):
        raise ValueError(f"merge=true: expected a method that can be merged, found {block['peft_type']}; leave it out")
    if adapter is None or adapter.peft_type != "CLOVER":
        for key in ("calibration_rows", "own_text_rows", "contrast_rows", "balance_updates"):
            if getattr(job, key):
                found = "full fine-tuning" if adapter is None else block["peft_type"]
                raise ValueError(f"{key}: expected peft_type: CLOVER, found {found}; leave {key} out")
    if job.contrast_rows and not getattr(adapter, "low_rank", 0):
        raise ValueError("contrast_rows: expected a low-rank part, found none; set peft.low_rank, or leave it out")
    shown = {key: value for key, value in parts.values.items() if not key.endswith("hub_token")}
    return Settings(job, sft, adapter, parts.optimizer, parts.learning_rate_factors, shown)


def _peft_config(block: dict[str, Any]) -> peft.PeftConfig | None:
    """Build the configuration of any method known to peft from a dict with `peft_type`."""
    import clover_peft  # noqa: F401  registers CLOVER

    if block.get("peft_type") is None:
        return None
    known = {str(getattr(name, "value", name)): cls for name, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = str(block["peft_type"]).upper()
    settings.check_method(kind, known)
    settings.check_block(block, [field.name for field in dataclasses.fields(known[kind]) if field.init])
    if block.get("inference_mode"):
        raise ValueError("peft.inference_mode: expected false, found true, with which nothing trains; leave it out")
    return peft.get_peft_config({"task_type": "CAUSAL_LM", **block, "peft_type": kind})


def _use_new_names(flat: dict[str, Any]) -> None:
    """Pass settings and TRL's defaults on under new names where the installed transformers deprecates the old ones.

    A configuration may use the old names; the lowest version allowed knows only these.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    for end in ("", "_kwargs"):
        old, new = f"gradient_checkpointing{end}", f"activation_checkpointing{end}"
        if new in defaults:
            value = flat.pop(old, defaults[old])
            if value is not None:
                flat.setdefault(new, value)


def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
