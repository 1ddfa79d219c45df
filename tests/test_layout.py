"""How the house is built: links, the direction of imports, and documented public names."""

import ast
import importlib
import inspect
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("diagrams", "simplify", "codegen", "tnconv")
SOURCES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.resolve() == path  # each file once, not again through the links
]


@pytest.mark.parametrize("folder", FOLDERS[:3])
def test_links(folder):
    link = ROOT / "tnconv" / folder
    assert link.is_symlink() and os.readlink(link) == f"../{folder}"
    assert (link / "__init__.py").is_file()


def imported(path):
    """The absolute names of everything that a file imports, also inside its functions."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = (parts if parts[0] == "tnconv" else ("tnconv", *parts))[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    """diagrams <- simplify <- codegen <- tnconv, and never a bare folder name."""
    rank = FOLDERS.index(path.relative_to(ROOT).parts[0])
    for name in imported(path):
        top, *rest = name.split(".")
        assert top not in FOLDERS[:3], f"imports {name}; write tnconv.{name}"
        if top == "tnconv" and rank < 3:
            assert rest and rest[0] in FOLDERS[: rank + 1], f"imports {name} from above"


ROOMS = {
    "tnconv/codegen": (
        *("kernels", "prices", "lowering", "routes", "search", "planner", "programs"),
        *("compiler", "baseline", "families", "tiers"),
    ),
    "tnconv": (
        *(
            "displays",
            "generators",
            "functional",
            "nn",
            "losses",
            "recursions",
            "quantities",
            "models",
        ),
        *("models", "operators", "optim"),
        *("monitor", "ntk", "geometry", "commands", "demo", "cli"),
    ),
}
"""The rooms of a folder, in the order in which they may import each other: never a later one."""


def room(names, rooms):
    return rooms.index(names[0]) if names and names[0] in rooms else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_earlier_rooms_only(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "tnconv" else ("tnconv", *parts)
    for folder, rooms in ROOMS.items():
        prefix = tuple(folder.split("/"))
        here = room(parts[len(prefix) :], rooms) if parts[: len(prefix)] == prefix else None
        for name in imported(path) if here is not None else ():
            names = tuple(name.split("."))
            there = room(names[len(prefix) :], rooms) if names[: len(prefix)] == prefix else None
            assert there is None or there <= here, f"imports {name} from a later room"


def test_the_import_test_sees_imports():
    names = {name for path in SOURCES for name in imported(path)}
    assert "tnconv.diagrams.network.TensorNetwork" in names


@pytest.mark.parametrize("folder", FOLDERS[:3])
def test_public_names_are_documented(folder):
    module = importlib.import_module(f"tnconv.{folder}")
    assert module.__doc__
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    for name in names:
        thing = getattr(module, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            text = inspect.getdoc(thing) or ""
            assert text and not text.startswith(f"{name}("), f"{name} has no docstring"


def test_diagrams_are_public():
    assert {"TensorNetwork", "conv"} <= set(importlib.import_module("tnconv.diagrams").__all__)


def test_is_typed():
    assert (ROOT / "tnconv" / "py.typed").is_file()


def test_one_name_means_one_thing() -> None:
    """No two modules share a name: then a word of an import says where it leads."""
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        places.setdefault(path.stem, []).append(str(path.relative_to(ROOT)))
    shared = {name: found for name, found in places.items() if len(found) > 1}
    assert shared.keys() <= {"__init__", "__main__"}, shared
