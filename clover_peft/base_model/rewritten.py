"""Models that were rewritten in place: the record of it in their config, and how transformers makes them so again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

_APPLIES: dict[str, Callable[[Any], None]] = {}  # name of a config's entry -> what rewrites a model that has it


def apply_when_made(record: str, apply: Callable[[Any], None]) -> None:
    """Let transformers rewrite every model that it makes, before weights are loaded; in the order of these calls.

    Args:
        record: the entry of a config that `apply` reads; a second call for it changes nothing.
        apply: rewrites a model whose config has the entry, and leaves others alone.
    """
    _APPLIES.setdefault(record, apply)
    post_init: Any = PreTrainedModel.post_init
    if not hasattr(post_init, "clover"):

        @functools.wraps(post_init)
        def rewritten_first(self: PreTrainedModel) -> None:
            for each in _APPLIES.values():
                each(self)
            post_init(self)

        rewritten_first.clover = True  # type: ignore[attr-defined]
        PreTrainedModel.post_init = rewritten_first


def forget_base(model: Any, how: str) -> None:
    """Let a model's name no longer name a base that adapters could be loaded onto.

    Args:
        model: the model.
        how: it was rewritten, as a participle.
    """
    name, ending = getattr(model, "name_or_path", ""), f" ({how}: save it, and load it from there)"
    if name and hasattr(model, "config") and not name.endswith(ending):
        model.name_or_path = name + ending
        model.config._name_or_path = model.name_or_path


def check_version(record: Any, key: str, version: int, how: str) -> dict[str, Any]:
    """A record, if this version can read it.

    Args:
        record: the entry of a config.
        key: its name.
        version: the version that is read.
        how: the model was rewritten, as a participle.

    Raises:
        ValueError: if it cannot.
    """
    if isinstance(record, dict) and record.get("version") == version:
        return record
    found = record.get("version") if isinstance(record, dict) else record
    raise ValueError(
        f"{key} in the config: expected version {version}, found {found!r}; use the clover_peft that the model was "
        f"{how} with"
    )
