"""Settings in YAML files, and `key=value` overrides on the command line."""

from __future__ import annotations

import re
from typing import Any

import yaml


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one value, in place; a block that holds it is copied first, and made where it is missing.

    Args:
        values: settings; a block is a dict in a dict.
        override: `key=value`, the value in YAML (see `load_yaml`); dots reach into blocks, leading dashes are ignored.

    Raises:
        ValueError: the override has another form, or finds a plain value where it expects a block.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override}: expected key=value, as in max_steps=100 or peft.r=8")
    *blocks, last = key.lstrip("-").split(".")
    for name in blocks:
        if not isinstance(values.get(name) or {}, dict):
            raise ValueError(f"{override}: expected a block {name}, found {values[name]!r}")
        values[name] = dict(values.get(name) or {})
        values = values[name]
    values[last] = load_yaml(text, override)


def load_yaml(text: str, name: str) -> Any:
    """Read YAML safely, with scalars as in YAML 1.2: `1e-3` is a number, and the `no` of `save_strategy` a word.

    Args:
        text: the YAML.
        name: the name of the file or the setting, for the message.

    Raises:
        ValueError: the text is not YAML, or a block has a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{name}: expected YAML, found {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, less its YAML 1.1 booleans (`no`, `on`), and with an error where a key occurs twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice} twice", node.start_mark)
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))
