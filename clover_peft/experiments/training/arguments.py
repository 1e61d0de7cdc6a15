"""A run's settings: YAML files and `key=value` overrides, parsed into `SFTConfig` and `JobArguments`."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import HfArgumentParser
from trl import SFTConfig

from ...io.configs import find_config
from ...io.overrides import apply_override, load_yaml
from .job_arguments import JobArguments
from .optimizer import check_factors

# The job refuses these fields of SFTConfig, since it would ignore them: it has other settings for the same.
_SET_ELSEWHERE = {
    "do_train": "the job always trains",
    "do_eval": "held-out rows are evaluated whenever held_out_rows > 0",
    "do_predict": "answers to held-out questions are printed whenever questions > 0",
    "resume_from_checkpoint": "resume=true continues from the last checkpoint in output_dir",
    "pad_token": "the tokenizer's own is used",
}
# The names of some settings in other tools.
_HINTS = {"lr": "learning_rate", "batch_size": "per_device_train_batch_size", "epochs": "num_train_epochs"}
_PLAIN = {bool, int, float, str, list, dict, type(None)}
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
        values: the settings as given, after overrides and without secrets; a record shows them, and a resumed run must
            repeat them.
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
    the method: `learning_rate`, which a `learning_rate` outside the block overrides; `learning_rate_factors`, such as
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
    paths = [find_config(name) for name in ([config] if isinstance(config, (str, Path)) else config)]
    values: dict[str, Any] = {}
    for path in paths:
        values |= _read(path)
    early = [override for override in overrides if override.lstrip("-").startswith(("method=", "methods."))]
    for override in early:
        apply_override(values, override)
    name = paths[-1].stem
    if "methods" in values or "method" in values:
        method = values.pop("method", None)
        values["peft"] = _choose(values.pop("methods", None), method)
        name += f"-{method}"
    for override in overrides:
        if override not in early:
            apply_override(values, override)

    values.setdefault("output_dir", f"runs/{name}")
    flat = dict(values)
    block = flat.pop("peft", None)
    if block is not None and not isinstance(block, dict):
        raise ValueError(f"peft: expected a block with peft_type, or null, found {block!r}")
    block = dict(block or {})
    rate, factors = block.pop("learning_rate", None), block.pop("learning_rate_factors", None) or {}
    check_factors(factors)
    optimizer = block.pop("optimizer", None)
    if optimizer not in (None, "muon"):
        raise ValueError(f"peft.optimizer: expected muon, found {optimizer!r}; others are chosen with optim=...")
    if optimizer and flat.get("optim"):
        raise ValueError(f"peft.optimizer={optimizer}: expected no optim beside it, found {flat['optim']!r}")
    if rate is not None:
        flat.setdefault("learning_rate", rate)
    flat.setdefault("include_num_input_tokens_seen", "non_padding")  # for tokens per second
    flat.setdefault("logging_nan_inf_filter", False)  # The filter would show a loss that is NaN as 0.
    accelerated = torch.accelerator.is_available()
    flat.setdefault("dataloader_pin_memory", accelerated)
    if "bf16" not in flat and "fp16" not in flat:
        flat["bf16"] = accelerated  # TRL's default is bf16 everywhere, which is slower and less exact on a CPU.

    own, known = _names(JobArguments), _names(SFTConfig)
    _check_keys(flat, [*own, *known], choices=f"{', '.join(own)}, or a field of trl.SFTConfig")
    for key in flat.keys() & _SET_ELSEWHERE.keys():
        raise ValueError(f"{key}: not a setting of this job, {_SET_ELSEWHERE[key]}")
    for kind in (JobArguments, SFTConfig):
        _check_types(flat, kind)
    job, sft = HfArgumentParser([JobArguments, SFTConfig]).parse_dict(flat)
    adapter = _peft_config(block)
    if "learning_rate" not in flat:  # TRL's default is far too low for most adapters.
        raise ValueError(
            "learning_rate: expected one in the peft block (or outside it), found none; start from 2e-3 for CLOVER, "
            "3e-2 with s_matrix: diagonal, 1e-3 for LORA, 5e-5 for full fine-tuning, as in configs/"
        )
    if job.merge and adapter is None:
        raise ValueError("merge=true: full fine-tuning has nothing to merge; its model is saved in output_dir/model")
    if job.calibration_rows and (adapter is None or adapter.peft_type != "CLOVER"):
        raise ValueError("calibration_rows: expected peft_type: CLOVER, whose bases are made from them")
    if job.balance_updates and (adapter is None or adapter.peft_type != "CLOVER"):
        raise ValueError("balance_updates: expected peft_type: CLOVER, whose updates are balanced")
    shown = {key: value for key, value in values.items() if not key.endswith("hub_token")}
    return Settings(job, sft, adapter, optimizer, factors, shown)


def _read(path: Path) -> dict[str, Any]:
    values = load_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def _choose(methods: Any, method: Any) -> dict[str, Any]:
    """Return the `peft` block of one method."""
    if not isinstance(methods, dict) or not all(isinstance(block, dict) for block in methods.values()):
        raise ValueError(f"methods: expected a block of peft blocks by name, found {methods!r}")
    if method is None:
        raise ValueError(f"method: expected one of {', '.join(map(str, methods))}, found none; pass method=<name>")
    if not isinstance(method, str) or method not in methods:
        raise ValueError(f"method={method}: expected one of {', '.join(map(str, methods))}")
    return dict(methods[method])


def _peft_config(block: dict[str, Any]) -> peft.PeftConfig | None:
    """Build the configuration of any method known to peft from a dict with `peft_type`."""
    import clover_peft  # noqa: F401  registers CLOVER

    kind = block.get("peft_type")
    if kind is None:
        if block.keys() - {"peft_type"}:
            raise ValueError(f"peft: expected peft_type beside {sorted(block.keys() - {'peft_type'})}, found none")
        return None
    known = {str(getattr(name, "value", name)): cls for name, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = str(kind).upper()
    _check_keys([kind], known, "peft.peft_type=")
    _check_keys(block, [*_names(known[kind]), "learning_rate", "learning_rate_factors", "optimizer"], "peft.")
    return peft.get_peft_config({"task_type": "CAUSAL_LM", **block, "peft_type": kind})


def _names(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.init]


def _check_keys(keys: Iterable[Any], known: Iterable[str], prefix: str = "", choices: str = "") -> None:
    known = list(known)
    for key in keys:
        if key not in known:
            near = [_HINTS.get(key)] if _HINTS.get(key) in known else difflib.get_close_matches(str(key), known, n=1)
            expected = (
                f"the nearest known is {prefix}{near[0]}" if near else f"expected one of {choices or ', '.join(known)}"
            )
            raise ValueError(f"{prefix}{key}: unknown; {expected}")


def _check_types(values: dict[str, Any], kind: type) -> None:
    """Check the types of values, for fields of plain types: `HfArgumentParser.parse_dict` does not."""
    hints = typing.get_type_hints(kind)
    for key in values.keys() & hints.keys():
        value, hint = values[key], hints[key]
        options = typing.get_args(hint) if typing.get_origin(hint) in {typing.Union, types.UnionType} else (hint,)
        allowed = {typing.get_origin(option) or option for option in options}
        found = {type(value)} | ({float} if type(value) is int else set())
        if allowed <= _PLAIN and not allowed & found:
            names = " or ".join(sorted("null" if t is type(None) else t.__name__ for t in allowed))
            raise ValueError(f"{key}: expected {names}, found {value!r}")
