"""Between ``torch.nn``'s modules and ours: new modules around the same parameters and buffers."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from operator import is_
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.modules.utils import _pair
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from tnconv.diagrams.notices import warn
from tnconv.given import instances
from tnconv.nn import convolution as ours
from tnconv.nn.folding import FoldNd, UnfoldNd

Kind = type[nn.Module]

_COUNTERPARTS: tuple[tuple[Kind, int, Kind, Kind], ...] = (
    (nn.Conv1d, 1, ours.Conv1d, ours.ConvNd),
    (nn.Conv2d, 2, ours.Conv2d, ours.ConvNd),
    (nn.Conv3d, 3, ours.Conv3d, ours.ConvNd),
    (nn.ConvTranspose1d, 1, ours.ConvTranspose1d, ours.ConvTransposeNd),
    (nn.ConvTranspose2d, 2, ours.ConvTranspose2d, ours.ConvTransposeNd),
    (nn.ConvTranspose3d, 3, ours.ConvTranspose3d, ours.ConvTransposeNd),
    (nn.Unfold, 2, UnfoldNd, UnfoldNd),
    (nn.Fold, 2, FoldNd, FoldNd),
)
"""Torch's class, its dimensions, our class, and our class for any number of dimensions."""

_OURS = {torchs: here for torchs, _, here, _ in _COUNTERPARTS}
_TORCHS = {(kind, dims): torchs for torchs, dims, *kinds in _COUNTERPARTS for kind in kinds}
_ORIGINALS: dict[Kind, Kind] = {}
_FAMILY = (ours.Convolution, ours.Transposed, UnfoldNd, FoldNd)
_REGISTRIES = [name for name, at in vars(nn.Module()).items() if isinstance(at, (dict, set))]


def from_torch(module: nn.Module) -> nn.Module:
    """Our module for one of torch's, with its parameters, settings, mode and hooks.

    >>> from_torch(nn.Conv2d(3, 8, 3)).__module__
    'tnconv.nn.convolution'

    Raises:
        TypeError: not one of torch's convolutions, Unfold or Fold, or a subclass of one.
    """
    if _our_kind(module) is None:
        names = ", ".join(kind.__name__ for kind in _OURS)
        raise TypeError(f"module is a {_words(module)}; expected exactly one of torch's {names}")
    return _swapped(module, _our_kind)


def to_torch(module: nn.Module) -> nn.Module:
    """Torch's module for one of ours, the inverse of `from_torch`.

    >>> type(to_torch(ours.ConvNd(2, 3, 8, kernel_size=3)))
    <class 'torch.nn.modules.conv.Conv2d'>

    Raises:
        TypeError: none of our modules, or a subclass of one.
        NotImplementedError: a number of dimensions for which torch has no module.
    """
    if patched(module) or type(module) not in {kind for kind, _ in _TORCHS}:
        raise TypeError(f"module is a {_words(module)}; expected exactly one of tnconv.nn's")
    if _torch_kind(module) is None:
        raise NotImplementedError(
            f"module is {module} with dims={module.dims}; expected dims that torch.nn has"
        )
    return _swapped(module, _torch_kind)


def convert(model: nn.Module) -> nn.Module:
    """A new model in which every module that `from_torch` takes was swapped.

    It shares all but the modules with the given one, which stays as it is: parameters, buffers, and
    what else the modules hold. Methods bound to a module, as hooks can be, are bound to the new
    one. Subclasses of torch's modules are left alone, with a warning.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    >>> convert(model)[0].weight is model[0].weight
    True
    """
    return swapped_with_warning(model, _our_kind, tuple(_OURS), _FAMILY)


def revert(model: nn.Module) -> nn.Module:
    """A new model of torch's modules: the inverse of `convert`, `save_memory`, `tensor_dropout`.

    It shares all but the modules with the given one, which stays as it is.

    >>> type(revert(convert(nn.Conv2d(1, 4, 3))))
    <class 'torch.nn.modules.conv.Conv2d'>
    """
    return swapped_with_warning(model, _torch_kind, (*_FAMILY, *_ORIGINALS))


def register_originals(originals: Mapping[Kind, Kind]) -> None:
    """Let `revert` know which of torch's classes each of ours stands for."""
    _ORIGINALS.update(originals)


def _our_kind(module: nn.Module) -> Kind | None:
    return None if patched(module) else _OURS.get(type(module))


def _torch_kind(module: nn.Module) -> Kind | None:
    if type(module) in _ORIGINALS:
        return None if patched(module) else _ORIGINALS[type(module)]
    dims = module.dims if isinstance(module, _FAMILY) else None
    return None if dims is None or patched(module) else _TORCHS.get((type(module), dims))


def patched(module: nn.Module) -> bool:
    """Whether this one object computes something else than its class."""
    return not vars(module).keys().isdisjoint(("forward", "_conv_forward"))


def _words(module: nn.Module) -> str:
    return type(module).__name__ + " with a forward of its own" * patched(module)


def swapped_with_warning(
    model: nn.Module,
    kind: Callable[[nn.Module], Kind | None],
    family: tuple[Kind, ...],
    but: tuple[Kind, ...] = (),
) -> nn.Module:
    """`_swapped`, with one warning that names the modules of the family that are left alone."""
    instances(model=model)
    named = [
        f"{name or 'the model'} ({_words(module)})"
        for name, module in model.named_modules()
        if isinstance(module, family) and not isinstance(module, but) and kind(module) is None
    ]
    if named:
        warn(f"no exact counterpart, left alone: {', '.join(named)}")
    return _swapped(model, kind)


def _swapped(model: nn.Module, kind: Callable[[nn.Module], Kind | None]) -> nn.Module:
    """The model of new modules, each of its kind or else of its old class."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    twins = {module: object.__new__(kind(module) or type(module)) for module in modules}
    copy = _Copy(twins)
    for module in reversed(modules):  # inner ones first, which outer ones may want to use
        twin: Any = twins[module]
        kept = nn.Module if is_parametrized(module) else type(module)  # those refuse to be pickled
        state = kept.__getstate__(module)  # type: ignore[no-untyped-call]
        twin.__setstate__(copy(state))
        for name in getattr(module, "own_state", ()):
            if not hasattr(type(twin), "own_state"):
                vars(twin).pop(name, None)
        if isinstance(twin, (UnfoldNd, FoldNd)) and type(module) in _OURS:
            for name in twin.__constants__:  # ints alone do not tell that torch's are two
                setattr(twin, name, _pair(getattr(twin, name)))
    return twins.get(model, model)


class _Copy:
    """Replaces modules by their twins, in containers, methods, hooks and handles; else shares.

    Torch's own registries are always new: what one model registers, the other does not see.
    """

    def __init__(self, twins: dict[nn.Module, nn.Module]) -> None:
        pairs: list[tuple[Any, Any]] = list(twins.items())
        for module in twins:
            registries = [vars(module)[name] for name in _REGISTRIES if name in vars(module)]
            pairs += [(registry, type(registry)()) for registry in registries]
        self._known = {id(old): (old, new) for old, new in pairs}  # old ones keep their id
        for old, new in pairs[len(twins) :]:
            new.update(self._rebuilt(old))

    def __call__(self, value: Any) -> Any:
        if id(value) not in self._known:
            self._known[id(value)] = value, value  # ends cycles
            self._known[id(value)] = value, self._rebuilt(value)
        return self._known[id(value)][1]

    def _rebuilt(self, value: Any) -> Any:
        """The value itself if none of its parts changes."""
        old, build = _parts(value)
        new = list(map(self, old))
        return value if all(map(is_, new, old)) else build(new)


def _parts(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """What can hold modules, and how to make such a value of other parts."""
    kind = type(value)
    if kind in (list, tuple, set):
        return list(value), kind
    if kind in (dict, OrderedDict):
        return list(value.items()), kind
    if kind is MethodType:
        return [value.__func__, value.__self__], lambda p: MethodType(*p)
    if kind is partial:
        return [value.func, value.args, value.keywords], lambda p: partial(p[0], *p[1], **p[2])
    if kind is _WrappedHook or (kind is RemovableHandle and value.hooks_dict_ref() is not None):
        return [value.__getstate__()], lambda p: _from_state(kind, p[0])
    return [], lambda _: value


def _from_state(kind: type, state: Any) -> Any:
    new: Any = object.__new__(kind)
    new.__setstate__(state)
    return new
