"""The public surface explains itself: docstrings, and an Args section where there are many."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from torch import nn

import tnconv


def public():
    """Every function, class and method that a package of the library exports, by its name."""
    packages = [tnconv]
    for found in pkgutil.walk_packages(tnconv.__path__, "tnconv."):
        if found.ispkg:
            packages.append(importlib.import_module(found.name))
    for package in packages:
        for name in getattr(package, "__all__", ()):
            value = getattr(package, name)
            if not str(getattr(value, "__module__", "")).startswith("tnconv"):
                continue
            if inspect.isclass(value) or inspect.isfunction(value):
                yield f"{package.__name__}.{name}", value, value
            for key, method in vars(value).items() if inspect.isclass(value) else ():
                if inspect.isfunction(method) and not key.startswith("_"):
                    yield f"{package.__name__}.{name}.{key}", method, getattr(value, key)


PUBLIC = {name: pair for name, *pair in public()}


def arguments(function):
    try:
        found = inspect.signature(function).parameters
    except ValueError:
        return []
    return [name for name in found if name not in ("self", "cls")]


def is_torchs(function):
    """Whether it is a layer with the arguments of the torch layer that its docstring names."""
    if not (inspect.isclass(function) and issubclass(function, nn.Module)):
        return False
    return re.search(r"torch\.nn\.\w+|[Tt]orch's|`TensorDropout", inspect.getdoc(function) or "")


def test_all_is_found():
    assert len(PUBLIC) > 400
    some = {"tnconv.compile", "tnconv.optim.KFAC", "tnconv.diagrams.TensorNetwork.gram"}
    assert some <= {*PUBLIC}


def test_every_public_name_has_a_docstring():
    silent = [name for name, (_, found) in PUBLIC.items() if not inspect.getdoc(found)]
    assert not silent, silent


def test_many_arguments_are_explained():
    for name, (function, found) in PUBLIC.items():
        given = arguments(function)
        if len(given) <= 3 or is_torchs(function):
            continue
        text = inspect.getdoc(found) or ""
        explained = re.findall(r"^    \*{0,2}(\w+): \S", text.partition("Args:")[2], re.M)
        explained += re.findall(r"^    (\w+): \S", text.partition("Attributes:")[2], re.M)
        missing = {*given} - {*explained}
        assert not missing, f"{name} does not explain {', '.join(sorted(missing))}"


@pytest.mark.parametrize("word", ["Raises:", "Args:"])
def test_sections_are_indented_as_sphinx_reads_them(word):
    for name, (_, found) in PUBLIC.items():
        lines = (inspect.getdoc(found) or "").splitlines()
        for at, line in enumerate(lines):
            if line.strip() == word:
                assert line == word and lines[at + 1].startswith("    "), name


def test_every_package_is_in_the_reference():
    page = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
    named = {name.rpartition(".")[0] for name, (each, _) in PUBLIC.items() if not is_method(name)}
    for package in named - {"tnconv", "tnconv.nn.memory", "tnconv.operators.low_rank"}:
        assert f".. automodule:: {package}\n   :members:" in page, (
            f"{package} is not in docs/api.md"
        )


def is_method(name):
    return name.rpartition(".")[0] in PUBLIC
