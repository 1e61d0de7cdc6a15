"""What can be wrong with a command line and its files, found without torch, peft, transformers or TRL.

`clover` makes these checks before it imports them, which takes many seconds. A subcommand's `run` makes them again,
for those who call it from Python.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from ..experiments import settings
from ..io.atomic import check_new_folder
from ..io.configs import find_config
from ..io.figures import check_pyplot
from ..io.locate import check_adapter, check_model, find_rows
from ..io.overrides import apply_override, load_yaml
from ..io.rows import find_text
from ..io.static_fields import static_fields
from ..tuner import config_checks

_WINDOWS = ("rows", "max_length", "batch_size")
_UNUSED_BY_HARNESS = ("data", "split", "tasks", "mode", "prompt", "beams", "new_tokens", "merge", "vllm")


def sft(given: argparse.Namespace) -> None:
    """Names and types of all settings, and the values of the job's and of CLOVER's own."""
    from ..experiments.training.job_arguments import JobArguments  # its package needs TRL

    parts = settings.read(given.config, given.overrides)
    own, of_trl = _fields(JobArguments.__module__, "JobArguments"), _fields("trl.trainer.sft_config", "SFTConfig")
    if own and of_trl:
        settings.check_flat(parts.flat, own, of_trl)
    JobArguments(**{key: value for key, value in parts.flat.items() if key in own})
    if str(parts.block.get("peft_type")).upper() == "CLOVER":
        if known := _fields("clover_peft.tuner.config", "CloverConfig"):
            settings.check_block(parts.block, known)
        config_checks.check(parts.block)
    settings.check_rate(parts.flat)
    check_model(parts.flat.get("model"))
    if parts.flat.get("teacher"):
        check_model(parts.flat["teacher"], "teacher=")
    find_rows(parts.flat.get("data"))


def plan(given: argparse.Namespace) -> None:
    of_adapter, of_mla = ("match", "overrides"), ("rope_dims", "kv_lora_rank", "method", *_WINDOWS, "dtype")
    for option in of_mla if given.mla is None else of_adapter:
        if getattr(given, option) not in (None, [], False):
            name = "fields of CloverConfig" if option == "overrides" else f"--{option.replace('_', '-')}"
            problem = (
                "expected --mla with it, found none"
                if given.mla is None
                else "expected none beside --mla, which plans no adapter"
            )
            raise ValueError(f"{name}: {problem}")
    if given.mla is None:
        adapter_settings(given.overrides)
        return
    if given.mla and not 0 < given.mla < 1:
        raise ValueError(f"--mla {given.mla}: expected a share above 0 and below 1")
    _one_size(given)
    for option in _WINDOWS:
        if (value := getattr(given, option)) is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')}: expected a positive number, found {value}")


def adapter_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Reads fields of `CloverConfig` from `key=value`, and checks them."""
    known = _fields("clover_peft.tuner.config", "CloverConfig")
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, _ = override.partition("=")
        name = key.lstrip("-").partition(".")[0]
        settings.check_no_lora([name])
        if not equals or (known and name not in known):
            near = difflib.get_close_matches(name, known.keys() - config_checks.NOT_CHOSEN, n=1)
            raise ValueError(
                f"{override}: expected key=value with a field of CloverConfig"
                + (f", found {name}; did you mean {near[0]}?" if near and name not in known else "")
            )
        apply_override(values, override)
    config_checks.check(values)
    return values


def ablate(given: argparse.Namespace) -> None:
    """The options, and that the configuration is a file with keys and values."""
    if given.table is not None:
        _refuse(given, "--table", ("config", "out", "records", "minutes", "jobs", "step", "mechanism", "overrides"))
        return
    if given.config is None or given.out is None:
        raise ValueError("expected --config and --out, or --table")
    if given.minutes is not None and not given.minutes >= 0:
        raise ValueError(f"--minutes {given.minutes:g}: expected at least 0")
    if given.step is not None:
        _refuse(given, "--step", ("minutes", "jobs", "pictures"))
    if given.jobs is not None and given.jobs < 1:
        raise ValueError(f"--jobs {given.jobs}: expected at least 1")
    path = find_config(given.config, "grid")
    values = load_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected keys and values, found {values!r}")
    if "domains" in values:
        _refuse(given, "an adaptation experiment", ("records", "minutes", "step"))
        if given.reference is not None and given.reference not in (values.get("arms") or {}):
            raise ValueError(
                f"--reference {given.reference}: expected one of the arms {', '.join(values.get('arms') or {})}"
            )
        module, name = "clover_peft.experiments.adaptation.plan", "Experiment"
    elif given.reference is not None:
        raise ValueError("--reference: expected an adaptation experiment, found a grid")
    elif given.mechanism:
        raise ValueError("--mechanism: expected an adaptation experiment, found a grid; use clover analyze")
    else:
        module, name = "clover_peft.experiments.ablation.grid", "Grid"
    for override in given.overrides:
        apply_override(values, override)
    known = _fields(module, name)
    if known and not values.keys() <= known.keys():
        raise ValueError(f"{path}: expected the keys {', '.join(known)}, found {', '.join(map(str, values))}")


def evaluate(given: argparse.Namespace) -> None:
    if (given.out / "record.json").exists():
        raise ValueError(f"{given.out}: expected an unfinished evaluation or a new folder, found a finished one")
    for key in ("rows", "batch_size", "beams", "new_tokens"):
        if (value := getattr(given, key)) is not None and value < 1:
            raise ValueError(f"--{key.replace('_', '-')}: expected at least 1, found {value}")
    for what, chosen, keys in (
        ("--harness", given.harness, _UNUSED_BY_HARNESS),
        ("--mode score", given.mode == "score", ("beams", "new_tokens")),
        ("no --harness", not given.harness, ("harness_tasks",)),
    ):
        if chosen and (unused := [key for key in keys if getattr(given, key) not in (None, False)]):
            raise ValueError(f"--{unused[0].replace('_', '-')}: expected none with {what}, which does not use it")
    if given.merge and given.adapter is None:
        raise ValueError("--merge: expected --adapter, found none to merge")
    if given.data is None and not given.harness:
        raise ValueError(
            "--data is needed without --harness: expected a folder that `clover prepare-data` wrote, found no option"
        )
    if given.vllm and (given.adapter or given.mode == "score"):
        raise ValueError("--vllm generates with a merged model: pass its folder as --model (`clover export`)")
    if given.adapter is not None:
        check_adapter(given.adapter, "--adapter ")
    if given.model is not None:
        check_model(given.model, "--model ")


def analyze(given: argparse.Namespace) -> None:
    if not (given.adapter or (given.before and given.after)):
        raise ValueError("expected --adapter, or --before and --after")
    unused = ("before", "after") if given.adapter else ("model",)
    if useless := [key for key in unused if getattr(given, key) is not None]:
        raise ValueError(f"--{useless[0]}: expected none with --{'adapter' if given.adapter else 'before'}")
    names = labels(given)
    if len(set(names)) != len(given.adapter or names[:1]):
        raise ValueError(f"--label: expected a name of its own for each adapter or model, found {names}; pass them")
    if given.top < 1:
        raise ValueError(f"--top: expected at least 1, found {given.top}")
    if not 0 <= given.threshold <= 1:
        raise ValueError(f"--threshold {given.threshold:g}: expected a cosine from 0 to 1")
    if given.texts is not None and not given.texts.is_file():
        raise ValueError(f"--texts {given.texts}: expected a file, found none")
    if (given.out / "analysis.json").exists():
        raise ValueError(f"{given.out}: expected a new folder, found an analysis in it; choose another")
    if not given.no_pictures:
        check_pyplot()
    for adapter in given.adapter or ():
        check_adapter(adapter, "--adapter ")
    for option in ("model", "before", "after"):
        if (model := getattr(given, option)) is not None:
            check_model(model, f"--{option} ")


def labels(given: argparse.Namespace) -> list[str]:
    """The names of the adapters that `clover analyze` compares, or of the model."""
    return given.label or [_label(path.absolute()) for path in given.adapter or ()] or ["after"]


def _label(path: Path) -> str:
    """The name of an adapter's folder, or of the run that it belongs to."""
    return path.parent.name if path.name == "adapter" or path.name.startswith("checkpoint-") else path.name


def convert(given: argparse.Namespace) -> None:
    check_new_folder(given.out, "--out ")
    for option in ("mla", "slice", "prune"):
        share = getattr(given, option)
        is_absent = share is None or (option == "mla" and share == 0)  # --mla alone leaves its share out
        if not is_absent and not 0 < share < 1:
            raise ValueError(f"--{option} {share}: expected a share above 0 and below 1")
    absent = "mla" if given.mla is None else "slice"
    for option in {"mla": ("rope_dims", "kv_lora_rank", "method"), "slice": ("rotation",)}[absent]:
        if getattr(given, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')}: expected --{absent} with it, found none")
    if given.mla is not None:
        _one_size(given)
    if given.calibration is None and given.own_text is None:
        raise ValueError("--calibration: expected text, which the conversion needs, or --own-text, found none")
    if given.multiple is not None and given.prune is None and given.slice is None:
        raise ValueError("--multiple: expected --prune or --slice with it, found none")
    _multiple(given)
    _calibration(given)
    if not given.no_pictures:
        check_pyplot()
    check_model(given.model)


def _one_size(given: argparse.Namespace) -> None:
    if bool(given.mla) == (given.kv_lora_rank is not None):
        raise ValueError("--mla: expected the share of the cache to remove or --kv-lora-rank, and not both")


def _multiple(given: argparse.Namespace) -> None:
    if given.multiple is not None and given.multiple < 1:
        raise ValueError(f"--multiple {given.multiple}: expected at least 1")


def prune(given: argparse.Namespace) -> None:
    check_new_folder(given.out, "--out ")
    if given.ranks is not None and given.ratio is None:
        raise ValueError(f"--ranks {given.ranks}: expected --ratio with it, which it spreads, found none")
    for name in ("ratio", "threshold", "energy"):
        figures(f"--{name}", getattr(given, name))
    _multiple(given)
    if given.ranks == "gradient" and given.calibration is None and given.own_text is None:
        raise ValueError("--ranks gradient: expected --calibration or --own-text with it, found none")
    if given.stock and (given.ranks != "uniform" or given.masked):
        found = "--masked" if given.masked else f"--ranks {given.ranks}" if given.ranks else "no --ranks"
        raise ValueError(f"--stock: expected --ranks uniform, for one width in all layers, found {found}")
    _calibration(given)
    if not given.no_pictures:
        check_pyplot()
    check_model(given.model)


def spectra(given: argparse.Namespace) -> None:
    figures("--threshold", given.threshold)
    _calibration(given)
    if given.out is None and (given.layers or given.no_pictures):
        raise ValueError("--layers and --no-pictures: expected --out with them, found none")
    if given.out is not None and (given.out / "spectra.json").exists():
        raise ValueError(f"--out {given.out}: expected a new folder, found spectra in it; choose another")
    if given.no_pictures and given.layers:
        raise ValueError("--layers: expected pictures to draw them in, found --no-pictures")
    if given.out is not None and not given.no_pictures:
        check_pyplot()
    check_model(given.model)


def _calibration(given: argparse.Namespace) -> None:
    own = getattr(given, "own_text", None)
    for name in _WINDOWS:
        if getattr(given, name) is None or given.calibration is not None:
            continue
        if name != "batch_size" or own is None:
            raise ValueError(f"--{name.replace('_', '-')}: expected --calibration with it, found none")
    if own is not None and own < 1:
        raise ValueError(f"--own-text {own}: expected at least 1")
    if given.calibration is not None:
        find_text(given.calibration)


def figures(option: str, text: str | None) -> float | dict[Any, float] | None:
    """A figure for all kinds of pairs, as "0.5", or one for each, as "qk=0.5,vo=0.25"; None for None.

    Raises:
        ValueError: if it is neither, or out of the option's range.
    """
    if text is None:
        return None
    parts = [part.split("=") for part in text.split(",")] if "=" in text else [["", text]]
    try:
        found = {kind.strip(): float(figure) for kind, figure in parts}
    except ValueError:
        found = {}
    if len(found) != len(parts) or not found.keys() <= ({"qk", "vo"} if "=" in text else {""}):
        raise ValueError(f"{option} {text}: expected a figure such as 0.5, or one for each kind as qk=0.5,vo=0.25")
    for figure in found.values():
        if option == "--threshold" and not 0 <= figure < math.inf:
            raise ValueError(f"{option} {text}: expected a singular value of at least 0")
        if option == "--ratio" and not 0 <= figure < 1:
            raise ValueError(f"{option} {text}: expected a share of at least 0 and below 1, such as 0.25 for 25 %")
        if option == "--energy" and not 0 <= figure <= 1:
            raise ValueError(f"{option} {text}: expected a share from 0 to 1, such as 0.9 for 90 %")
    return found[""] if "" in found else cast("dict[Any, float]", found)


def prepare_data(given: argparse.Namespace) -> None:
    check_new_folder(given.out)


def export(given: argparse.Namespace) -> None:
    check_new_folder(given.out)
    check_adapter(given.adapter)
    if given.base is not None:
        check_model(given.base, "--base ")


def _fields(module: str, name: str) -> dict[str, Any]:
    """The fields of a class; none where its source is not readable, and the class itself finds what is wrong."""
    try:
        return static_fields(module, name)
    except LookupError:
        return {}


def _refuse(given: argparse.Namespace, what: str, keys: tuple[str, ...]) -> None:
    if unused := [key for key in keys if getattr(given, key) not in (None, [], False)]:
        raise ValueError(f"{unused[0]}: expected none beside {what}, which does not use it")


CHECKS: dict[str, Callable[[argparse.Namespace], None]] = {
    "sft": sft,
    "prune": prune,
    "spectra": spectra,
    "convert": convert,
    "export": export,
    "plan": plan,
    "evaluate": evaluate,
    "ablate": ablate,
    "analyze": analyze,
    "prepare-data": prepare_data,
}
