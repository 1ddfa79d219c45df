"""Layers and operations as the command line names them: arguments become diagrams and calls."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnconv import diagrams
from tnconv.diagrams import Expression, TensorNetwork

Call = Callable[[], Tensor]
TorchsWay = Callable[..., Call]
SETTINGS = {
    "conv": ("stride", "padding", "dilation", "groups"),
    "conv_transpose": ("stride", "padding", "output_padding", "dilation", "groups"),
    "avg_pool": ("stride", "padding"),
    "linear": (),
}
"""The options of each kind of layer."""
OF_LAYER: dict[str, Callable[[TensorNetwork], Expression]] = {
    "forward": lambda layer: layer,
    "weight_vjp": lambda layer: layer.vjp("weight"),
    "input_vjp": lambda layer: layer.vjp("x"),
    "weight_jvp": lambda layer: layer.jvp("weight"),
    "input_jvp": lambda layer: layer.jvp("x"),
    "per_sample": lambda layer: layer.vjp("weight", per_sample=True),
    "gradient_norms": diagrams.gradient_norms,
    "gradient_dots": diagrams.gradient_dots,
    "ggn_diagonal": diagrams.ggn_diagonal,
    "input_factor": lambda layer: diagrams.input_factor(layer),
    "output_factor": lambda layer: diagrams.output_factor(layer),
}
"""Operations that derive from the diagram of a layer."""
OF_INPUT: dict[str, Callable[..., Expression]] = {
    "unfold": diagrams.unfold,
    "kfac_expand": diagrams.kfac_expand,
    "kfac_reduce": diagrams.kfac_reduce,
}
"""Operations on the input of a layer alone."""


def add_layer(command: ArgumentParser, layers: Sequence[str] = (*SETTINGS,)) -> None:
    """The arguments that say which operation of which layer."""
    command.add_argument("layer", help=f"{', '.join(layers)}, or a model as module:factory")
    command.add_argument("--input", type=int, nargs="+", required=True, metavar="SIZE")
    command.add_argument("--weight", type=int, nargs="+", metavar="SIZE")
    for name in ("stride", "dilation", "output_padding"):
        option = f"--{name.replace('_', '-')}"
        command.add_argument(option, dest=name, type=int, nargs="+", metavar="STEP")
    command.add_argument("--padding", type=_padding, nargs="+", help="or same, valid")
    command.add_argument("--groups", type=int, metavar="COUNT")
    operations = (*OF_LAYER, *OF_INPUT)
    command.add_argument("--operation", choices=operations, default="forward")


def network(given: Namespace) -> Expression:
    """The diagram that the arguments ask for.

    Raises:
        ValueError: an unknown layer, options that the layer does not have, shapes or
            hyper-parameters that do not fit together or give no output.
    """
    settings = settings_of(given)
    shape, weight = tuple(given.input), tuple(given.weight or ())
    if given.layer == "linear":
        return _linear(shape, weight, given.operation)
    if given.layer == "avg_pool":
        if given.operation not in ("forward", "input_vjp", "input_jvp"):
            raise ValueError(f"avg_pool has no weight; --operation is {given.operation!r}")
        return OF_LAYER[given.operation](diagrams.avg_pool(shape, weight, **settings).terms[0])
    transposed = given.layer == "conv_transpose"
    if given.operation in OF_LAYER:
        make = diagrams.conv_transpose if transposed else diagrams.conv
        return OF_LAYER[given.operation](make(shape, weight, **settings))
    if given.operation == "unfold":  # the same for any number of groups
        settings.pop("groups", None)
    if transposed:
        settings["transposed"] = True
    return OF_INPUT[given.operation](shape, weight[2:], **settings)


def settings_of(given: Namespace) -> dict[str, Any]:
    """The hyper-parameters that are given, by torch's names; others are refused."""
    if given.layer not in SETTINGS:
        raise ValueError(f"layer is {given.layer!r}; expected one of {', '.join(SETTINGS)}")
    if given.weight is None:
        what = "kernel sizes" if given.layer == "avg_pool" else "the weight's shape"
        raise ValueError(f"--weight is not given; expected {what} for {given.layer}")
    names = ("stride", "padding", "output_padding", "dilation", "groups")
    asked = {name: value for name in names if (value := getattr(given, name)) is not None}
    for name in asked:
        if name not in SETTINGS[given.layer]:
            option = f"--{name.replace('_', '-')}"
            known = ", ".join(f"--{one.replace('_', '-')}" for one in SETTINGS[given.layer])
            raise ValueError(f"{given.layer} has no {option}; expected {known or 'no options'}")
    return {name: _one_or_all(value) for name, value in asked.items()}


def _linear(shape: tuple[int, ...], weight: tuple[int, ...], operation: str) -> Expression:
    """Operations on the input take it as that of a convolution whose kernel has one position."""
    layer = diagrams.linear(shape, weight)
    if operation in OF_LAYER:
        return OF_LAYER[operation](layer)
    shape = (*shape[:1], *shape[-1:], *shape[1:-1]) if len(shape) > 1 else shape
    return OF_INPUT[operation](shape, (1,) * (len(shape) - 2))


def torchs(given: Namespace) -> TorchsWay | None:
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

    ways: dict[str, TorchsWay] = {
        "forward": forward,
        "weight_vjp": gradient,
        "input_vjp": gradient,
        "per_sample": per_sample,
    }
    return None if kind == "avg_pool" else ways.get(given.operation)


def _padding(text: str) -> int | str:
    if not (text.isdecimal() or text in ("same", "valid")):
        raise ArgumentTypeError(f"{text!r}; expected ints, same or valid")
    return int(text) if text.isdecimal() else text


def _one_or_all(values: Sequence[int | str] | int) -> int | str | Sequence[int | str]:
    """One value for all dimensions, or a sequence with one for each."""
    return values[0] if isinstance(values, Sequence) and len(values) == 1 else values
