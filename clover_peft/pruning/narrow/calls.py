"""How calls of an attention module are read: by the signature of the class that it was made narrow from.

A narrow module has a forward of its own, and must not swallow what the stock one would read. A table says what each
parameter of a stock forward is; a class with a parameter that the table does not name is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import Cache

# Name of a parameter of a stock forward -> its role, which is what the forwards of narrow modules call it.
ROLES = {
    "hidden_states": "hidden_states",
    "cache": "cache",
    "past_key_values": "cache",
    "past_key_value": "cache",
    "layer_past": "cache",
    "attention_mask": "mask",
    "mask": "mask",
    "position_embeddings": "positions",
    "key_value_states": "source",
    "encoder_hidden_states": "source",
    "encoder_attention_mask": "source_mask",
    "position_bias": "position_bias",
    "residual": "residual",
    "alibi": "alibi",
    # Flags that change nothing of what is computed.
    "use_cache": "unused",
    "output_attentions": "unused",
}
# The versions of transformers that the table was made from.
KNOWN_VERSIONS = "5.23 or 5.24"


@dataclass(frozen=True)
class Call:
    """How a call of one stock class is read.

    Attributes:
        name: of the class and its forward, for errors.
        order: names of the parameters that may be given by place.
        required: roles of the parameters that have no default.
        own: names of all parameters of the stock forward.
        roles: name that is honoured -> role: the class's own names, and others of the same roles.
        is_open: the stock forward takes other keywords and hands them to the attention function.
    """

    name: str
    order: tuple[str, ...]
    required: tuple[str, ...]
    own: frozenset[str]
    roles: dict[str, str]
    is_open: bool

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by role, and under "rest" the keywords that go to the attention function.

        Args:
            args: what was given by place, without the module.
            kwargs: what was given by name.

        Returns:
            Role -> what was given for it; "rest" -> a dict of all other keywords.

        Raises:
            TypeError: if an argument is missing, given twice or unknown, or a cache is among the other keywords.
        """
        if len(args) > len(self.order):
            raise TypeError(f"{self.name}: expected at most {len(self.order)} arguments by place, found {len(args)}")
        values: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for name, value in (*zip(self.order, args, strict=False), *kwargs.items()):
            role = self.roles.get(name)
            if role == "cache" and name not in self.own and not (value is None or isinstance(value, Cache)):
                role = None  # continuous batching in 5.23 gives the attention function a store of pages as `cache`
            if role is None:
                rest[name] = value
            elif values.get(role) is None:
                values[role] = value
            elif value is not None and role != "unused":
                raise TypeError(f"{self.name}: expected one argument for the {role}, found another as {name}")
        if rest:
            self._check_rest(rest)
        for role in self.required:
            if role not in values:
                raise TypeError(f"{self.name}: expected an argument for the {role}, found none")
        values.pop("unused", None)
        values["rest"] = rest
        return values

    def _check_rest(self, rest: dict[str, Any]) -> None:
        if not self.is_open:
            raise TypeError(f"{self.name}: expected {', '.join(sorted(self.own))}, found {', '.join(rest)} too")
        for name, value in rest.items():
            if isinstance(value, Cache):
                raise TypeError(
                    f"{self.name}: expected no cache but that of its own, found a {type(value).__name__} as {name}; "
                    f"use transformers {KNOWN_VERSIONS}, or prune with masked=True"
                )


@functools.cache
def call_of(stock: Any, forward: Callable[..., Any]) -> Call:
    """How calls of a stock class are read for a forward of its narrow form.

    Args:
        stock: a class of attention modules.
        forward: takes the module, arguments by role, and "rest".

    Raises:
        ValueError: if the stock forward has a parameter that the table does not name, or whose role `forward` lacks.
    """
    parameters = list(inspect.signature(stock.forward).parameters.values())[1:]  # without the module
    taken = {*inspect.signature(forward).parameters, "unused"}
    check_parameters(stock.__name__, stock.forward, [name for name, role in ROLES.items() if role in taken])
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    roles = {ROLES[p.name] for p in named}
    return Call(
        name=f"{stock.__name__}.forward (pruned)",
        order=tuple(p.name for p in named if p.kind is not p.KEYWORD_ONLY),
        required=tuple(ROLES[p.name] for p in named if p.default is p.empty),
        own=frozenset(p.name for p in named),
        # A flag that the class does not name goes to the attention function, as in the stock forward.
        roles={
            name: role
            for name, role in ROLES.items()
            if role in roles and (role != "unused" or name in {p.name for p in named})
        },
        is_open=len(named) < len(parameters),
    )


def check_parameters(
    name: str,
    function: Callable[..., Any],
    known: Iterable[str],
    version: str = f"transformers {transformers.__version__}",
) -> None:
    """Raises ValueError, naming the class, if a stock function has a parameter besides `self` and **kwargs that is not
    among the known names; decorators are looked through."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    unknown = sorted({p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - set(known))
    if unknown:
        library = version.partition(" ")[0]
        remedy = f"{library} {KNOWN_VERSIONS}" if library == "transformers" else f"an older {library}"
        raise ValueError(
            f"{name}: expected a forward whose parameters are known, found {', '.join(unknown)} in {version}; install "
            f"{remedy}, or prune with masked=True, which keeps the stock forward"
        )
