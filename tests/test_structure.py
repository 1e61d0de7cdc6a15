"""Dependencies of the package point down, and no file is too long to hold one idea."""

from __future__ import annotations

import ast
import importlib
import re
import warnings
from pathlib import Path

import pytest

import clover_peft
from clover_peft._moved import MOVED

PACKAGE = Path(clover_peft.__file__).parent
# Rooms from the bottom up; a module imports from its own room and from rooms below. Siblings share a floor.
FLOORS = [
    {"linalg", "runtime", "_version", "_moved", "_as_command"},
    {"io"},
    {"base_model"},
    {"tuner", "pruning", "convert"},
    {"__init__"},
    {"experiments"},
    {"cli", "__main__"},
]
MOST_LINES = 450
DATA = {"base_model/families.py"}  # tables, which are read by looking up a line


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def room(module: str) -> str:
    return module.partition(".")[0] or "__init__"


def floor(module: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room(module) in rooms)


def imports(module: str) -> set[str]:
    """The package's own modules that a module names in any import, also within functions and under TYPE_CHECKING."""
    file = FILES[module]
    inside = module if file.name == "__init__.py" and module != "__init__" else module.rpartition(".")[0]
    package = inside.split(".") if inside else []
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == "clover_peft"]
            found |= {name.removeprefix("clover_peft").removeprefix(".") or "__init__" for name in names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif (node.module or "").partition(".")[0] == "clover_peft":
                base = []
            else:
                continue
            own = (node.module or "").removeprefix("clover_peft").removeprefix(".")
            start = ".".join([*base, *([own] if own else [])])
            for alias in node.names:
                whole = f"{start}.{alias.name}".removeprefix(".")
                found.add(whole if whole in FILES else start or "__init__")
    return found - {module}


def test_the_check_sees_imports() -> None:
    assert "linalg.decomposition" in imports("tuner.bases")
    assert "tuner.config" in imports("__init__")


@pytest.mark.parametrize("module", sorted(FILES))
def test_dependencies_point_down(module: str) -> None:
    for other in imports(module):
        same = room(other) == room(module)
        assert same or floor(other) < floor(module), f"{module} imports {other}"


def test_no_imports_go_in_circles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(imports(module) & FILES.keys()):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(FILES):
        visit(module, ())


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_file_holds_one_idea(module: str) -> None:
    file = FILES[module]
    if file.relative_to(PACKAGE).as_posix() not in DATA:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_the_core_is_read_in_half_an_hour() -> None:
    core = [
        *("tuner.config", "tuner.block_spec", "tuner.maps", "linalg.decomposition", "tuner.bases", "tuner.layer"),
        "tuner.merging",
    ]
    assert sum(len(FILES[module].read_text(encoding="utf-8").splitlines()) for module in core) <= 1500


@pytest.mark.parametrize("old", sorted(MOVED))
def test_old_module_paths_are_importable_with_a_warning(old: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(f"clover_peft.{old}")
    first = importlib.import_module(f"clover_peft.{MOVED[old][0]}")
    for name in [name for name in vars(first) if not name.startswith("_")][:1]:  # packages may hold modules alone
        assert getattr(module, name) is getattr(first, name)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = module.nothing_of_this_name


def test_an_old_path_warns_once() -> None:
    import sys

    sys.modules.pop("clover_peft.head_map", None)
    with pytest.warns(DeprecationWarning, match=r"clover_peft\.tuner\.fused_maps"):
        from clover_peft.head_map import apply_maps
    assert apply_maps.__module__ == "clover_peft.tuner.fused_maps"


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.rglob("test_*.py")), ids=lambda file: file.stem)
def test_no_test_imports_another(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not re.findall(r"^ *(?:from|import) tests\.(?:\w+\.)*test_\w+", text, re.MULTILINE)
