"""The module paths of version 0.1.0, which stay importable for one version, with a warning.

This file and its one call in `clover_peft/__init__.py` go with the next version.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence

# Old path below `clover_peft` -> where its names are now. The first of several is where most of them are.
MOVED: dict[str, tuple[str, ...]] = {
    "ablation": ("experiments.ablation",),
    "ablation.making": ("experiments.ablation.trial_runner",),
    "ablation.table": ("experiments.ablation.results",),
    "analysis": ("experiments.analysis",),
    "analysis.measures": ("experiments.analysis.measures", "linalg.spectra"),
    "analysis.pictures": ("experiments.analysis.figures", "io.figures"),
    "architectures": (
        "base_model.families",
        "base_model.slices",
        "base_model.attention",
        "base_model.resolve",
        "base_model.weight",
    ),
    "bases": (
        "tuner.bases",
        "tuner.layers",
        "tuner.base_check",
        "tuner.activation_bases",
        "tuner.explicit_factors",
        "base_model.weight",
    ),
    "blocks": ("tuner.block_spec",),
    "checkpoint": ("tuner.adapter_file", "tuner.base_check", "tuner.adapter_folder"),
    "commonsense": ("experiments.commonsense",),
    "config": ("tuner.config",),
    "decomposition": ("linalg.decomposition", "tuner.explicit_factors"),
    "downloads": ("io.downloads", "io.atomic"),
    "folded": ("tuner.execution",),
    "head_map": ("tuner.fused_maps", "tuner.maps", "runtime.tracing"),
    "layer": ("tuner.layer", "tuner.adapter_tensors", "runtime.tensors", "runtime.sharding", "runtime.bitsandbytes"),
    "model": ("tuner.model",),
    "moments": ("linalg.moments", "base_model.activations"),
    "pruning.attention": ("pruning.narrow.attention",),
    "pruning.options": ("cli.pruning_options", "cli.checks", "cli.parsers"),
    "pruning.loading": ("pruning.narrow.loading",),
    "pruning.pictures": ("pruning.figures",),
    "pruning.rewriting": ("pruning.narrow.rewriting",),
    "pruning.text": ("io.text_windows",),
    "records": ("io.run_record",),
    "registration": ("runtime.peft_registry",),
    "serving": ("tuner.hotswap", "tuner.lora_approximation"),
    "settings_text": ("io.overrides",),
    "training": ("experiments.training",),
    "training.cards": ("experiments.training.card",),
    "training.job": ("experiments.training.job_arguments",),
    "training.models": ("io.hub_models", "experiments.training.loading"),
    "transfer": ("tuner.dequantize",),
    "warn": ("io.user_warning",),
}
_PACKAGE = __name__.partition(".")[0]


def _moved_to(name: str) -> tuple[str, ...]:
    """The new paths of an old one; those of a package hold for the modules in it as well."""
    old = name.removeprefix(f"{_PACKAGE}.")
    if old in MOVED:
        return MOVED[old]
    package, _, module = old.rpartition(".")
    return (f"{MOVED[package][0]}.{module}",) if package in MOVED else ()


class _MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules by their old paths: a module that looks its names up where they are now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{_PACKAGE}.") or not _moved_to(fullname):
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        paths = [f"{_PACKAGE}.{path}" for path in _moved_to(module.__name__)]
        warnings.warn(f"{module.__name__} is now {', '.join(paths)}", DeprecationWarning, stacklevel=2)

        def look_up(name: str) -> object:
            if not name.startswith("__"):
                for path in paths:
                    if hasattr(found := importlib.import_module(path), name):
                        return getattr(found, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = look_up  # type: ignore[method-assign]


def keep_old_paths() -> None:
    """Let old module paths be imported; once."""
    if not any(type(finder).__qualname__ == _MovedFinder.__qualname__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _MovedFinder())  # before a folder that an older checkout left behind
