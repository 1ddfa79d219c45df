"""Tiered compilation: new sizes run at once, and sizes that return get a searched program.

As in a just-in-time compiler, a key that is looked up for the first time gets a program of the
`baseline` compiler, which takes a few milliseconds to make. A key that returns gets a searched
program, which takes some ten times longer. A program that was searched for one batch can serve
others as well: see `families`. The results of all agree up to rounding. Everybody who looks up
programs shares one bounded table. See decisions 0009 and 0022.
"""

import os
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import lru_cache
from threading import Lock
from types import TracebackType
from typing import Any, TypeVar, cast

import torch

from tnconv.codegen.baseline import baseline
from tnconv.codegen.compiler import compile, networks_of
from tnconv.codegen.families import Families, kin
from tnconv.codegen.lowering.nested import Nest
from tnconv.codegen.programs.program import Program
from tnconv.diagrams.expression import Expression

MOST_PROGRAMS = 8192  # in memory, of at most some 100 kB each
VARIABLE = "TNCONV_TIERED_COMPILATION"

Build = Callable[..., Program[Any]]
"""From a compiler, `compile` or `baseline`, and hashable arguments to a program."""
Found = TypeVar("Found")


class FirstLookup(Exception):  # a result that is not to be remembered, no error
    """What `searched` raises instead of returning a program: here is one of the baseline tier."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program


@lru_cache(maxsize=MOST_PROGRAMS)
def searched(build: Callable[..., Any], *arguments: Hashable) -> Any:
    """``build(compile, *arguments)``, once; of many programs those that were used last are kept.

    Raises:
        FirstLookup: it was never looked up before, and carries a program of the baseline tier.
        TypeError: an argument that does not hash.
    """
    key = (build, *arguments)
    if not _tiers.enabled or _is_traced():
        program = build(compile, *arguments)
        _waiting.remove(key)
        return program
    compiler = _Compiler(first=key not in _waiting.keys)
    program = build(compiler, *arguments)
    if compiler.provisional:
        _waiting.add(key)
        raise FirstLookup(program)
    _waiting.remove(key)
    return program


class _Compiler:
    """The compiler of the tier that is due: a family's program, a baseline program, or a search.

    A family that returns is searched for, even at another batch size. A program that is
    ``provisional`` is replaced when its key returns; it need not keep to the ``routes`` asked for.
    """

    def __init__(self, first: bool) -> None:
        self.first, self.provisional = first, False

    def __call__(
        self,
        network: Expression | Sequence[Expression],
        memory_limit: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        order: Nest | None = None,
        routes: Sequence[str] | None = None,
        channels_last: Collection[str] = (),
    ) -> Program[Any]:
        options: Any = {"memory_limit": memory_limit, "dtype": dtype, "device": device}
        options |= {"order": order, "channels_last": channels_last}
        networks = networks_of(network)
        alone = memory_limit is None and order is None and routes is None
        if self.first and not (alone and _families.met(networks)):
            self.provisional = True
            return baseline(network, **options)
        how = isinstance(network, Expression), device, dtype, tuple(channels_last)
        found = kin(networks, *how) if alone else None
        if found is not None and (served := _families.serving(found)) is not None:
            return served
        if self.first and (found is None or _families.searched(found)):
            self.provisional = True
            return baseline(network, **options)
        options |= {} if routes is None else {"routes": routes}
        program = compile(network, **options)
        if found is not None:
            _families.add(found, program)
        return program


def is_first(compiler: Callable[..., Program[Any]]) -> bool:
    """Whether a compiler makes programs for a key that is looked up for the first time."""
    return isinstance(compiler, _Compiler) and compiler.first


def looked_up(build: Callable[..., Found], *arguments: Hashable) -> Found:
    """What ``build`` makes of these arguments, with programs of the tier that is due."""
    found: Found
    try:
        found = searched(build, *arguments)
    except FirstLookup as first:
        found = first.program
    return found


class _Waiting:
    """The keys that have run by a baseline program only; the oldest are forgotten."""

    def __init__(self) -> None:
        self.keys: dict[tuple[Hashable, ...], None] = {}
        self.lock = Lock()

    def add(self, key: tuple[Hashable, ...]) -> None:
        with self.lock:
            self.keys[key] = None
            if len(self.keys) > MOST_PROGRAMS:
                del self.keys[next(iter(self.keys))]

    def remove(self, key: tuple[Hashable, ...]) -> None:
        with self.lock:
            self.keys.pop(key, None)

    def clear(self) -> None:
        """Forget all keys."""
        with self.lock:
            self.keys = {}


_waiting = _Waiting()
_families = Families()


class _Tiers:
    enabled = os.environ.get(VARIABLE, "1") != "0"


_tiers = _Tiers()


class tiered_compilation:  # a setting, as torch's
    """Turn tiered compilation on or off, for good or within a block, for the whole process.

    With it off every program is searched for when it is first needed, as by `tnconv.compile`: every
    call with a size takes the same path, and the first one takes longer. The environment variable
    ``TNCONV_TIERED_COMPILATION=0`` turns it off from the start.

    >>> import torch
    >>> from tnconv import functional, tiered_compilation
    >>> with tiered_compilation(False):
    ...     functional.conv(torch.rand(8, 3, 9), torch.rand(4, 3, 3)).shape
    torch.Size([8, 4, 7])
    """

    def __init__(self, enabled: bool) -> None:
        self._before = _tiers.enabled
        _tiers.enabled = enabled

    def __repr__(self) -> str:
        return f"<tiered_compilation: {'on' if _tiers.enabled else 'off'}>"

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _tiers.enabled = self._before


def warm() -> int:
    """Search now for everything that has only run by baseline programs; returns how many those are.

    >>> import torch
    >>> from tnconv import cache_clear, functional, tiered_compilation, warm
    >>> cache_clear()
    >>> with tiered_compilation(True):
    ...     for size in (9, 10):
    ...         y = functional.conv(torch.rand(8, 3, size), torch.rand(4, 3, 3))
    >>> warm()
    2
    """
    keys = list(_waiting.keys)
    for build, *arguments in keys:
        looked_up(cast(Build, build), *arguments)
    return len(keys)


def cache_clear() -> None:
    """Forget all programs, and which ones were looked up."""
    searched.cache_clear()
    _waiting.clear()
    _families.clear()


cache_info = searched.cache_info


def _is_traced() -> bool:
    """Whether a call is traced into a graph that runs later, which should hold the best program."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def device_of(array: object) -> str:
    """The device for whose prices programs on a tensor are chosen."""
    if not isinstance(array, torch.Tensor) or array.is_cpu or array.is_meta:
        return "cpu"
    return str(array.device)
