"""Other ways to an operation of a layer: torch's, and those of libraries that are installed."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnconv.commands.asked_layers import settings_of

Call = Callable[[], Tensor]
Way = Callable[..., Call]
"""From operands by name to a call."""
_UNFOLDED = ("unfold", "kfac_expand", "kfac_reduce")
_EINCONV: dict[str, tuple[str, Callable[..., tuple[Tensor, ...]]]] = {
    "forward": ("convNd_forward", lambda x, weight: (x, weight)),
    "weight_vjp": ("convNd_weight_vjp", lambda x, grad_output: (x, grad_output)),
    "input_vjp": ("convNd_input_vjp", lambda weight, grad_output: (weight, grad_output)),
    "kfac_reduce": ("convNd_kfac_reduce", lambda x: (x,)),
    "kfac_expand": ("convNd_kfc", lambda x: (x,)),
}
LARGEST = 2**26
"""Entries of an index pattern above which einconv, which makes it dense, is left out."""


def contestants(given: Namespace) -> dict[str, Way]:
    """Every way that there is here, torch's first."""
    own = torchs(given)
    found = {} if own is None else {"torch": own}
    return found | dict(_peers(given))


def _peers(given: Namespace) -> Iterator[tuple[str, Way]]:
    settings = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings_of(given).items()
    }
    if given.layer != "conv" or not all(isinstance(each, int) for each in _plain(settings)):
        return
    if given.operation in _EINCONV and find_spec("einconv") is not None and _small(given):
        yield "einconv", _einconv(given, settings)
    if given.operation == "per_sample" and find_spec("opacus") is not None:
        yield "opacus", _opacus(given, settings)


def _plain(settings: Mapping[str, Any]) -> Iterator[Any]:
    for value in settings.values():
        yield from value if isinstance(value, list | tuple) else (value,)


def _small(given: Namespace) -> bool:
    sides = zip(given.input[2:], given.weight[2:], strict=True)
    return all(side * side * kernel <= LARGEST for side, kernel in sides)


def _einconv(given: Namespace, settings: Mapping[str, Any]) -> Way:
    name, chosen = _EINCONV[given.operation]
    sizes = {"input_vjp": given.input[2:], "forward": ()}.get(given.operation, given.weight[2:])

    def way(**operands: Tensor) -> Call:
        build = import_module(f"einconv.expressions.{name}").einsum_expression
        arguments = (*chosen(**operands), *([tuple(sizes)] if sizes else []))
        equation, arrays, shape = build(*arguments, **settings, simplify=True)
        return lambda: torch.einsum(equation, *arrays).reshape(shape)

    return way


def _opacus(given: Namespace, settings: Mapping[str, Any]) -> Way:
    dims = len(given.weight) - 2
    kind: Callable[..., nn.Module] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    groups = settings.get("groups", 1)
    outer, inner, *kernel = given.weight
    layer = kind(inner * groups, outer, tuple(kernel), **settings, bias=False, device="meta")

    def way(x: Tensor, grad_output: Tensor) -> Call:
        sample = import_module("opacus.grad_sample.conv").compute_conv_grad_sample
        return lambda: sample(layer, [x], grad_output)[layer.weight]

    return way


def torchs(given: Namespace) -> Way | None:
    """Torch's own way to the same value, given operands; None where there is none here.

    What a backward pass has from the forward pass is computed before, but for per-sample gradients
    by ``vmap``, whose forward pass counts.
    """
    settings, kind = settings_of(given), given.layer
    shape, weight_shape = tuple(given.input), tuple(given.weight)

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        if kind == "linear":
            return F.linear(x, weight)
        call: Callable[..., Tensor] = getattr(F, f"{kind}{weight.dim() - 2}d")
        return call(x, weight, **settings)

    def forward(x: Tensor, weight: Tensor) -> Call:
        return lambda: layer(x, weight)

    def gradient(grad_output: Tensor, **operands: Tensor) -> Call:
        x = operands.get("x", grad_output.new_zeros(shape)).requires_grad_("x" not in operands)
        weight = operands.get("weight", grad_output.new_zeros(weight_shape))
        weight.requires_grad_("weight" not in operands)
        with torch.enable_grad():
            y = layer(x, weight)
        wanted = x if x.requires_grad else weight
        return lambda: torch.autograd.grad(y, wanted, grad_output, retain_graph=True)[0]

    def per_sample(x: Tensor, grad_output: Tensor) -> Call:
        weight = x.new_zeros(weight_shape)

        def one(a: Tensor, v: Tensor) -> Tensor:
            pulled: tuple[Tensor] = torch.func.vjp(lambda w: layer(a[None], w), weight)[1](v[None])
            return pulled[0]

        return lambda: torch.vmap(one)(x, grad_output)

    ways: dict[str, Way] = {
        "forward": forward,
        "weight_vjp": gradient,
        "input_vjp": gradient,
        "per_sample": per_sample,
    }
    if kind == "conv" and given.operation in _UNFOLDED and len(shape) == 4:
        return _unfolded(given.operation, weight_shape[2:], settings)
    if kind not in ("conv", "conv_transpose", "linear"):
        return None
    return ways.get(given.operation)


def _unfolded(operation: str, kernel: tuple[int, ...], settings: Mapping[str, Any]) -> Way | None:
    """`F.unfold` and, for Kronecker factors, a matrix product."""
    groups = settings.get("groups", 1)
    steps = {name: value for name, value in settings.items() if name != "groups"}
    if isinstance(steps.get("padding"), str):
        return None

    def way(x: Tensor) -> Call:
        def call() -> Tensor:
            patches: Tensor = F.unfold(x, kernel, **steps)
            if operation == "unfold":
                return patches
            patches = patches.reshape(len(x), groups, -1, patches.shape[-1])  # (n, g, ck, o)
            rows = patches.permute(1, 2, 0, 3).flatten(2)
            if operation == "kfac_reduce":
                rows = patches.mean(-1).permute(1, 2, 0)
            factor: Tensor = rows @ rows.mT / rows.shape[-1]
            return factor

        return call

    return way
