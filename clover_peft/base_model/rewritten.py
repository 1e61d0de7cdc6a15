"""Models that were rewritten in place: the record of it in their config, and how transformers makes them so again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_APPLIES: dict[str, Callable[[Any], None]] = {}  # name of a config's entry -> what rewrites a model that has it


def apply_when_made(record: str, apply: Callable[[Any], None]) -> None:
    """Let transformers rewrite every model that it makes, before weights are loaded; in the order of these calls.

    Args:
        record: the entry of a config that `apply` reads; a second call for it changes nothing.
        apply: rewrites a model whose config has the entry, and leaves others alone.
    """
    _APPLIES.setdefault(record, apply)
    wrap_once(PreTrainedModel, "post_init", _rewritten_first)


def _rewritten_first(post_init: Callable[..., None]) -> Callable[..., None]:
    def rewritten_first(self: PreTrainedModel) -> None:
        for each in _APPLIES.values():
            each(self)
        post_init(self)

    return rewritten_first


def wrap_once(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method of another library's class by one that calls it; a second call for it changes nothing.

    Args:
        owner: the class.
        name: of the method, or of a class method. Nothing is replaced where a version of the library lacks it.
        make: function of the method -> the function to put in its place.
    """
    method = inspect.getattr_static(owner, name, None)
    function = getattr(method, "__func__", method)  # of a class method
    if function is None or hasattr(function, "clover"):
        return
    made: Any = functools.wraps(function)(make(function))
    made.clover = True
    setattr(owner, name, classmethod(made) if isinstance(method, classmethod) else made)


def become(module: nn.Module, describe: Callable[..., tuple[str, dict[str, Any]]], *arguments: Any) -> None:
    """Give a module a subclass of its class, once. The class that it had is the subclass's `clover_stock`.

    No name leads to the subclass, so copies and pickles of the module make it again from the class that it had.

    Args:
        module: the module, in place.
        describe: a function that a name leads to. It takes the class and the arguments, and returns the name and the
            attributes of the subclass.
        arguments: hashable.
    """
    kind: Any = type(module)
    if not hasattr(kind, "clover_stock"):
        module.__class__ = _subclass(kind, describe, *arguments)


@functools.cache
def _subclass(stock: Any, describe: Any, *arguments: Any) -> Any:
    name, attributes = describe(stock, *arguments)
    again = {
        "clover_stock": stock,
        "__module__": describe.__module__,
        "__reduce_ex__": lambda self, protocol: (_empty, (stock, describe, *arguments), vars(self)),
    }
    return type(name, (stock,), attributes | again)


def _empty(stock: Any, describe: Any, *arguments: Any) -> Any:
    """A module of the subclass, without content."""
    made = _subclass(stock, describe, *arguments)
    return made.__new__(made)


def forget_base(model: Any, how: str) -> None:
    """Let a model's name no longer name a base that adapters could be loaded onto.

    `how`, a participle, says how it was rewritten.
    """
    name, ending = getattr(model, "name_or_path", ""), f" ({how}: save it, and load it from there)"
    if name and hasattr(model, "config") and not name.endswith(ending):
        model.name_or_path = name + ending
        model.config._name_or_path = model.name_or_path


def check_version(record: Any, key: str, version: int, how: str) -> dict[str, Any]:
    """The entry `key` of a config, if its version is the one that is read.

    `how`, a participle, says how the model was rewritten.
    """
    if isinstance(record, dict) and record.get("version") == version:
        return record
    found = record.get("version") if isinstance(record, dict) else record
    raise ValueError(
        f"{key} in the config: expected version {version}, found {found!r}; use the clover_peft that the model was "
        f"{how} with"
    )
