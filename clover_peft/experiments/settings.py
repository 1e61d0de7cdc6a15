"""A run's settings as text: YAML files and `key=value` overrides, read and checked without torch, TRL or peft.

`training.arguments` makes configurations of them. The command line checks them here first, so that a typing error is
answered at once.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..io.configs import find_config
from ..io.overrides import apply_override, load_yaml
from ..tuner.config_checks import CORRESPONDING, NOT_CHOSEN

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
# Keys of the `peft` block that belong to the method and are no fields of its configuration.
_OF_METHOD = ("learning_rate", "learning_rate_factors", "optimizer")

Block = typing.TypeVar("Block")

_RATE = re.compile(r"((peft|methods\.[^.]+)\.)?learning_rate")


@dataclass
class Parts:
    """Settings, taken apart.

    Attributes:
        values: all of them, as given, but for the learning rate, which is outside of the `peft` block.
        flat: those of the job and of TRL.
        block: the adapter's, with `peft_type`; empty for full fine-tuning.
        optimizer: "muon" or None.
        learning_rate_factors: see `training.optimizer.scale_learning_rates`.
    """

    values: dict[str, Any]
    flat: dict[str, Any]
    block: dict[str, Any]
    optimizer: str | None
    learning_rate_factors: dict[str, float]


def read(config: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Parts:
    """Reads configuration files and applies overrides; see `training.arguments.parse`.

    Raises:
        ValueError: a file is not there or no YAML, or a value that belongs to no class of TRL or peft makes no sense.
    """
    paths = [find_config(name, "run") for name in ([config] if isinstance(config, (str, Path)) else config)]
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

    rates = [key for o in overrides if _RATE.fullmatch(key := o.lstrip("-").partition("=")[0])]
    join_rates(values, inside=bool(rates) and rates[-1] != "learning_rate")
    values.setdefault("output_dir", f"runs/{name}")
    flat = dict(values)
    block = flat.pop("peft", None)
    if block is not None and not isinstance(block, dict):
        raise ValueError(f"peft: expected a block with peft_type, or null, found {block!r}")
    block = dict(block or {})
    factors = block.pop("learning_rate_factors", None) or {}
    check_factors(factors)
    optimizer = block.pop("optimizer", None)
    if optimizer not in (None, "muon"):
        raise ValueError(f"peft.optimizer: expected muon, found {optimizer!r}; others are chosen with optim=...")
    if optimizer and flat.get("optim"):
        raise ValueError(f"peft.optimizer={optimizer}: expected no optim beside it, found {flat['optim']!r}")
    if block.get("peft_type") is None and block.keys() - {"peft_type"}:
        raise ValueError(f"peft: expected peft_type beside {sorted(block.keys() - {'peft_type'})}, found none")
    return Parts(values, flat, block, optimizer, factors)


def join_rates(values: dict[str, Any], inside: bool = False) -> None:
    """Leaves one learning rate, outside of the `peft` block, in place.

    Args:
        values: settings; of a rate in the block and one outside, the one outside counts.
        inside: let the one in the block count.
    """
    block = values.get("peft")
    if not isinstance(block, dict):
        return
    rate = block.get("learning_rate")
    values["peft"] = {key: value for key, value in block.items() if key != "learning_rate"} or None
    if rate is not None and (inside or "learning_rate" not in values):
        values["learning_rate"] = rate


def check_flat(flat: Mapping[str, Any], own: Mapping[str, Any], of_trl: Mapping[str, Any]) -> None:
    """Checks the names and the plain types of the settings of the job and of TRL.

    Args:
        flat: from `read`.
        own: field of `JobArguments` -> its type.
        of_trl: field of `trl.SFTConfig` -> its type.

    Raises:
        ValueError: a key is unknown, or is set elsewhere, or a value has the wrong type.
    """
    check_keys(flat, [*own, *of_trl], choices=f"{', '.join(own)}, or a field of trl.SFTConfig")
    for key in flat.keys() & _SET_ELSEWHERE.keys():
        raise ValueError(f"{key}: not a setting of this job, {_SET_ELSEWHERE[key]}")
    for hints in (own, of_trl):
        check_types(flat, hints)


def check_method(kind: str, known: Iterable[str]) -> None:
    """Raises ValueError if peft has no method of this name."""
    check_keys([kind], known, "peft.peft_type=")


def check_block(block: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises ValueError if the adapter's block has a key that is no field of its configuration."""
    if str(block.get("peft_type")).upper() == "CLOVER":
        check_no_lora(block, "peft.")
    check_keys(block, [*known, *_OF_METHOD], "peft.")


def check_no_lora(names: Iterable[str], prefix: str = "") -> None:
    """Raises ValueError for an option of LoRA among the fields of CLOVER's configuration."""
    for name in names:
        if name in CORRESPONDING:
            raise ValueError(
                f"{prefix}{name}: expected a field of CloverConfig, found one of LoraConfig; {CORRESPONDING[name]}"
            )


def check_rate(flat: Mapping[str, Any]) -> None:
    """Raises ValueError if there is no learning rate: TRL's default is far too low for most adapters."""
    if "learning_rate" not in flat:
        raise ValueError(
            "learning_rate: expected one in the peft block (or outside it), found none; start from 2e-3 for CLOVER, "
            "3e-2 with s_matrix: diagonal, 1e-3 for LORA, 5e-5 for full fine-tuning, as in configs/"
        )


def check_factors(factors: Any) -> None:
    """Check the factors of `scale_learning_rates` as far as that is possible without a model.

    Raises:
        ValueError: the factors are no mapping, a key is no regular expression, or a factor is negative or not finite.
    """
    if not isinstance(factors, Mapping):
        raise ValueError(f"learning_rate_factors: expected a factor by part of a name, found {factors!r}")
    for pattern, factor in factors.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"learning_rate_factors: {pattern!r}: expected a regular expression, found {error}; a part of a name, "
                "such as v_proj, is one"
            ) from error
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
            raise ValueError(
                f"learning_rate_factors: {pattern}: expected a finite factor of at least 0, found {factor!r}"
            )


def check_value(good: bool, key: str, expected: str, found: Any) -> None:
    """Raises ValueError, which names the key, unless a value is good."""
    if not good:
        raise ValueError(f"{key}: expected {expected}, found {found!r}")


def fill(kind: type[Block], given: Any, where: str) -> Block:
    """A dataclass with the values of a block in a file.

    Args:
        kind: the dataclass, whose fields are the block's keys.
        given: the block.
        where: its key, for messages.

    Raises:
        ValueError: no block, or an unknown key.
    """
    known = [part.name for part in fields(typing.cast(Any, kind))]
    if not isinstance(given, dict) or (unknown := sorted(set(given) - set(known))):
        found = ", ".join(unknown) if isinstance(given, dict) else given
        raise ValueError(f"{where}: expected some of {', '.join(known)}, found {found}")
    return kind(**given)


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


def check_keys(keys: Iterable[Any], known: Iterable[str], prefix: str = "", choices: str = "") -> None:
    """Raises ValueError for a key that is not known; names the nearest, or `choices`."""
    known = list(known)
    for key in keys:
        if key not in known:
            shown = [name for name in known if name not in NOT_CHOSEN]
            near = [_HINTS.get(key)] if _HINTS.get(key) in known else difflib.get_close_matches(str(key), shown, n=1)
            expected = (
                f"the nearest known is {prefix}{near[0]}" if near else f"expected one of {choices or ', '.join(shown)}"
            )
            raise ValueError(f"{prefix}{key}: unknown; {expected}")


def check_types(values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Check the types of values, for fields of plain types: `HfArgumentParser.parse_dict` does not."""
    for key in values.keys() & hints.keys():
        value, hint = values[key], hints[key]
        options = typing.get_args(hint) if typing.get_origin(hint) in {typing.Union, types.UnionType} else (hint,)
        allowed = {typing.get_origin(option) or option for option in options}
        found = {type(value)} | ({float} if type(value) is int else set())
        if allowed <= _PLAIN and not allowed & found:
            names = " or ".join(sorted("null" if t is type(None) else t.__name__ for t in allowed))
            raise ValueError(f"{key}: expected {names}, found {value!r}")
