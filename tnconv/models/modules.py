"""Questions to modules: what they wrap, give, and compute with."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def tensors(output: Any) -> tuple[Tensor, ...]:
    """The float and complex tensors in what a module gives, also in nested collections."""
    if isinstance(output, Tensor):
        return (output,) if is_differentiable(output) else ()
    if isinstance(output, Mapping):
        return tuple(t for each in output.values() for t in tensors(each))
    if isinstance(output, list | tuple):
        return tuple(t for each in output for t in tensors(each))
    return ()


def is_differentiable(tensor: Tensor) -> bool:
    """Whether a tensor's dtype can have gradients."""
    return tensor.is_floating_point() or tensor.is_complex()


def refuse_complex(named: Iterable[tuple[str, Tensor]]) -> None:
    """Diagrams conjugate nothing, so that squares and products of complex gradients were wrong.

    Raises:
        NotImplementedError: a complex parameter that learns.
    """
    for name, parameter in named:
        if parameter.is_complex() and parameter.requires_grad:
            raise NotImplementedError(
                f"parameter {name!r} has dtype {parameter.dtype}; expected real parameters: "
                "hold the real and the imaginary part as two"
            )


def own_parameters(module: nn.Module) -> tuple[tuple[str, nn.Parameter], ...]:
    """A module's parameters that are not those of a module in it, each once, with their names.

    As ``module.named_parameters(recurse=False)``, which walks through modules to find them.
    """
    found: dict[nn.Parameter, str] = {}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            found.setdefault(parameter, name)
    return tuple((name, parameter) for parameter, name in found.items())


def named_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Each module of a model once, with its first name, in torch's order.

    As ``model.named_modules()``, whose generators inside generators take several times as long.
    """
    found: dict[nn.Module, str] = {}
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module in found:
            continue
        found[module] = name
        if children := module._modules:
            start = f"{name}." if name else ""
            waiting += [(start + k, m) for k, m in reversed(children.items()) if m is not None]
    return found


def named_parameters(
    model: nn.Module, modules: Mapping[nn.Module, str] | None = None
) -> dict[nn.Parameter, str]:
    """Each parameter of a model once, with its first name, in torch's order.

    Its `named_modules` may be given, where they are known already.
    """
    if type(model).named_parameters is not nn.Module.named_parameters:
        return {p: name for name, p in model.named_parameters()}
    found: dict[nn.Parameter, str] = {}
    for module, start in (named_modules(model) if modules is None else modules).items():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter not in found:
                found[parameter] = f"{start}.{key}" if start else key
    return found


def makes_another(module: nn.Module, name: str) -> bool:
    """Whether a module computes with what is made of a parameter: ``weight`` of ``weight_orig``.

    Pruning, spectral and weight normalisation by hooks are of that kind.
    """
    base = name.rpartition("_")[0]
    made = bool(base) and base not in module._parameters
    return made and isinstance(getattr(module, base, None), Tensor)


@contextmanager
def uncompiled(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Compiled parts of a model run as they were written, as long as the context is open.

    Its modules may be given, where they are known already.
    """
    with ExitStack() as stack:
        if any(map(is_compiled, named_modules(model) if modules is None else modules)):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def mixes_samples(module: nn.Module) -> bool:
    """Whether a module normalises by the batch's own statistics."""
    own = isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    return bool(own)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that a compiled or distributed model wraps."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` made a module, or its call."""
    own = "_orig_mod" in module._modules or "_orig_mod" in module.__dict__
    return own or module._compiled_call_impl is not None


def weak(method: Callable[..., None]) -> Callable[..., None]:
    """A method that does nothing once its object is gone."""
    reference = WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> None:
        if (found := reference()) is not None:
            found(*args, **kwargs)

    return call
