"""Where it is recorded that a model is narrow, its config, and how it is made so again before weights are loaded."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from ...base_model.attention import WIDTHS, AttentionBlock
from ...base_model.resolve import attention_block
from ...base_model.rewritten import apply_when_made, check_version, forget_base, wrap_once
from ...base_model.weight import has_module
from .modules import MADE, check_supported, narrow, widths

# The entry of a model's config that says how it was pruned, and its form.
RECORD = "clover_pruning"
VERSION = 1
# What torch puts between a module and its path when it shards, checkpoints or compiles it.
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}


def write_record(model: Any, record: Mapping[str, Any]) -> None:
    """Enter how a model was pruned in its config, which no longer names a base that adapters could be loaded onto."""
    forget_base(model, "pruned")
    if hasattr(model, "register_to_config"):
        model.register_to_config(**{RECORD: dict(record)})
    else:
        setattr(model.config, RECORD, dict(record))


def read_record(model: Any) -> dict[str, Any] | None:
    """How a model was pruned, from its config; None if it was not.

    Raises:
        ValueError: if the entry is none that `prune` writes.
    """
    config = getattr(model, "config", None)
    record = config.get(RECORD) if isinstance(config, Mapping) else getattr(config, RECORD, None)
    if record is None:
        return None
    record = check_version(record, RECORD, VERSION, "pruned")
    blocks = record.get("blocks")
    if not isinstance(blocks, dict) or not isinstance(record.get("steps"), list):
        raise ValueError(f"{RECORD} in the config: expected blocks and steps, found {sorted(record)}")
    for path, entry in blocks.items():
        kinds = [type(figure) for figure in entry] if isinstance(entry, (list, tuple)) else None
        # Latent attention whose keys are rotated throughout has no others, and records 0.
        if kinds != [int, int, bool] or entry[0] < 0 or entry[1] < 1:
            raise ValueError(
                f"{RECORD} in the config: {path}: expected two widths and whether there is a bias, found {entry!r}"
            )
    return record


def current_record(model: nn.Module) -> dict[str, Any]:
    """How a model was pruned: its record, with the widths that its modules have now."""
    record = read_record(model) or {"version": VERSION, "blocks": {}, "steps": []}
    prefix, blocks = _relative_prefix(model), {}
    for name, module in model.named_modules():
        if MADE in vars(module):
            path = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
            blocks[path.removeprefix(prefix)] = list(getattr(module, MADE))
    return {key: value for key, value in record.items() if key != "tower"} | {"blocks": blocks}


@contextlib.contextmanager
def _recorded_by_parts(model: PreTrainedModel) -> Iterator[None]:
    """Within it the config of a model, and those of its parts, say which of their own heads are narrow.

    Whatever was pruned, the whole or a part, each can then be loaded from what is saved of the whole or of a part. A
    config may be a copy, or shared: then it is that of the outermost, because that is what is saved.
    """
    made = any(MADE in vars(module) for module in model.modules())
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if not made and not any(hasattr(part.config, RECORD) for part in parts):
        yield
        return
    before = {id(part.config): (part.config, getattr(part.config, RECORD, None)) for part in parts}
    steps: list[Any] = next((record["steps"] for record in map(read_record, parts) if record), [])
    try:
        for part in reversed(parts):
            record = current_record(part)
            if record["blocks"] or hasattr(part.config, RECORD):
                setattr(part.config, RECORD, {**record, "steps": record["steps"] or steps})
        yield
    finally:
        for config, was in before.values():
            vars(config).pop(RECORD, None)
            if was is not None:
                setattr(config, RECORD, was)


def _relative_prefix(model: nn.Module) -> str:
    """The prefix of the paths in a model's trunk, which it shares with models of other heads; "" where it is one."""
    base = getattr(model, "base_model", model)
    name = next((name for name, module in model.named_modules() if module is base), "")
    return f"{name}." if name else ""


def apply_record(model: nn.Module) -> None:
    """Make the attention blocks narrow that the model's config says are. Those that are narrow, or that this part of
    the model does not have, are left alone."""
    record = read_record(model)
    # Earlier versions recorded which part had been pruned of a model whose parts share one config.
    if record and record.get("tower") not in (None, type(model).__name__):
        return
    prefix = _relative_prefix(model) if record else ""
    for path, (key_width, value_width, output_bias) in (record or {}).get("blocks", {}).items():
        place = next((p for p in (path, prefix + path) if has_module(model, p)), None)
        block = None if place is None else _block_at(model, place)
        if block is None:
            continue
        there = (*widths(block), block.module_of(block.family.output).bias is not None)
        if there == (key_width, value_width, output_bias):
            continue
        check_supported(block)
        narrow(block, key_width, value_width, output_bias)


def _block_at(model: nn.Module, path: str) -> AttentionBlock | None:
    """The attention block whose module is at `path`."""
    children = (name for name, _ in model.get_submodule(path).named_children())
    found = (attention_block(model, f"{path}.{name}") for name in children)
    return next((block for block in found if block is not None and block.path == path), None)


def _recording(save: Callable[..., Any]) -> Callable[..., Any]:
    """Let transformers record which heads are narrow when it saves a model."""

    def recorded(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        with _recorded_by_parts(self):
            return save(self, *args, **kwargs)

    return recorded


def _lazy_caches(shape: Callable[..., Any]) -> Callable[..., Any]:
    """Let `generate` make a static cache for chunks of a prompt when it is first used, where heads are narrow.

    It would make the cache before, with keys and values of the head size that stands in the config.
    """

    def none_if_narrow(self: nn.Module) -> Any:
        return None if any(hasattr(module, WIDTHS) for module in self.modules()) else shape(self)

    return none_if_narrow


def _no_pages(start: Callable[..., Any]) -> Callable[..., Any]:
    """Let `generate_batch` refuse narrow heads: its pages have the config's head size, and it would wait forever for
    the thread that fails to write into them."""

    def unless_narrow(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = next((name for name, module in self.named_modules() if hasattr(module, WIDTHS)), None)
        if name is not None:
            raise ValueError(
                f"{name}: expected heads as wide as the config says, which continuous batching (generate_batch) needs "
                "for its paged cache, found pruned ones; use generate, or prune with masked=True"
            )
        return start(self, *args, **kwargs)

    return unless_narrow


def _narrow_diffusers(from_config: Callable[..., Any]) -> Callable[..., Any]:
    """Let diffusers make narrow what the config says is, before weights are loaded."""

    def and_narrow(cls: type, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        record = config.get(RECORD) if isinstance(config, Mapping) else None
        if record:  # diffusers would warn that it ignores an entry that the class does not name
            config = {key: value for key, value in config.items() if key != RECORD}
        result = from_config(cls, config, *args, **kwargs)
        if record:
            model = result[0] if isinstance(result, tuple) else result
            write_record(model, record)
            apply_record(model)
        return result

    return and_narrow


def install() -> None:
    """Let transformers and diffusers save and load pruned models; once."""
    apply_when_made(RECORD, apply_record)
    wrap_once(PreTrainedModel, "save_pretrained", _recording)
    # Versions before that of this method make all caches when they are used.
    wrap_once(GenerationMixin, "_get_static_cache_init_shape", _lazy_caches)
    wrap_once(GenerationMixin, "init_continuous_batching", _no_pages)
    if importlib.util.find_spec("diffusers") is None:
        return
    try:
        from diffusers.configuration_utils import ConfigMixin
    except (ImportError, RuntimeError):  # installed and broken: no reason to fail for those who do not use it
        return
    wrap_once(ConfigMixin, "from_config", _narrow_diffusers)
