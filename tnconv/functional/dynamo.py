"""What torch.compile has to know of this library, told when its tracer is first imported.

Marking a function imports ``torch._dynamo``, which takes as long as ``import torch``. Who never
compiles a model does not wait for it.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar, cast

DYNAMO = "torch._dynamo"
Tell = Callable[[Any], object]
F = TypeVar("F", bound=Callable[..., Any])
_waiting: list[Tell] = []


def allow_in_graph(function: F) -> F:
    """A function that is one node of a graph: the tracer does not look into it."""
    _when_imported(lambda dynamo: dynamo.allow_in_graph(function))
    return function


def untraced(method: F) -> F:
    """A method that runs as it is wherever torch.compile meets it: a decorator."""
    return cast(F, _Untraced(method))


class _Untraced:
    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def __set_name__(self, owner: type, name: str) -> None:
        setattr(owner, name, self.method)
        _when_imported(lambda dynamo: setattr(owner, name, dynamo.disable(self.method)))


def _when_imported(tell: Tell) -> None:
    if DYNAMO in sys.modules and not _waiting:
        tell(sys.modules[DYNAMO])
        return
    if not _waiting:
        sys.meta_path.insert(0, _Finder())
    _waiting.append(tell)


class _Finder(MetaPathFinder):
    """Finds the tracer like other finders, and tells those who wait when it is imported."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != DYNAMO:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module
            spec.loader.exec_module = partial(self._load, load)  # type: ignore[method-assign]
        return spec

    def _load(self, load: Callable[[ModuleType], None], module: ModuleType) -> None:
        load(module)
        sys.meta_path.remove(self)
        while _waiting:
            _waiting.pop()(module)
