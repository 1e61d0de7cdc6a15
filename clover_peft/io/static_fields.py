"""The fields of a dataclass, read from its source: importing TRL or peft to learn their names takes many seconds."""

from __future__ import annotations

import ast
import functools
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any, Literal, Optional, Union

_TYPES = {kind.__name__: kind for kind in (bool, int, float, str, list, dict, set, tuple)}
_NAMES: dict[str, Any] = {"__builtins__": {}, "Any": Any, "Literal": Literal, "Optional": Optional, "Union": Union}
_NAMES |= _TYPES


@functools.cache
def static_fields(module: str, name: str) -> dict[str, Any]:
    """Reads the fields that `__init__` takes, of the class and its bases.

    Args:
        module: the module that defines or imports the class.
        name: of the class.

    Returns:
        Name of the field -> its type, or `Any` where that is made of other than plain types.

    Raises:
        LookupError: the source is not there, or not written as expected.
    """
    module, found = _find_class(module, name)
    fields: dict[str, Any] = {}
    for base in found.bases:
        if isinstance(base, ast.Name) and base.id != "object":
            fields |= static_fields(module, base.id)
    if not any("dataclass" in ast.unparse(decorator) for decorator in found.decorator_list):
        return fields
    for node in found.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        given = node.value.keywords if isinstance(node.value, ast.Call) else []
        outside = any(each.arg == "init" and ast.unparse(each.value) == "False" for each in given)
        if not outside and "ClassVar" not in ast.unparse(node.annotation):
            fields[node.target.id] = _type(node.annotation)
    return fields


def _find_class(module: str, name: str) -> tuple[str, ast.ClassDef]:
    """The module that defines a class, and the definition."""
    path = _path(module)
    tree = _parse(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    source = "." * node.level + (node.module or "")
                    return _find_class(resolve_name(source, package), alias.name)
    raise LookupError(f"{module}.{name}: expected a class, found none")


def _path(module: str) -> Path:
    top, *parts = module.split(".")
    try:
        spec = find_spec(top)
    except ValueError:
        spec = None
    if spec is None or spec.origin is None:
        raise LookupError(f"{top}: expected a package with sources, found none")
    path = Path(spec.origin).parent.joinpath(*parts)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise LookupError(f"{path}: {error}") from error


def _type(annotation: ast.expr) -> Any:
    text = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
    try:
        return eval(str(text), dict(_NAMES))  # the text of an installed package, with names of plain types alone
    except (NameError, TypeError, AttributeError, SyntaxError):  # made of other types
        return Any
