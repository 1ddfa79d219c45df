"""Layers and operations as the command line names them: arguments become diagrams and calls."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from tnconv import diagrams
from tnconv.diagrams import Expression, TensorNetwork

SETTINGS = {
    "conv": ("stride", "padding", "dilation", "groups"),
    "conv_transpose": ("stride", "padding", "output_padding", "dilation", "groups"),
    "avg_pool": ("stride", "padding"),
    "linear": (),
    "bilinear": (),
    "lookup": (),
    "scale": (),
    "bias": (),
}
"""The options of each kind of layer."""
OPTIONS = ("weight", "stride", "padding", "output_padding", "dilation", "groups")
"""What describes a layer beside its input; a model's layers say it themselves."""
LAYERS: dict[str, Callable[..., Expression]] = {
    "conv": diagrams.conv,
    "conv_transpose": diagrams.conv_transpose,
    "avg_pool": diagrams.avg_pool,
    "linear": diagrams.linear,
    "bilinear": lambda shape, weight: diagrams.bilinear(shape, (*shape[:-1], *weight[2:3]), weight),
    "lookup": diagrams.lookup,
    "scale": diagrams.scale,
    "bias": diagrams.bias,
}
OF_LAYER: dict[str, Callable[[TensorNetwork], Expression]] = {
    "forward": lambda layer: layer,
    "weight_vjp": lambda layer: layer.vjp("weight"),
    "input_vjp": lambda layer: layer.vjp("x"),
    "weight_jvp": lambda layer: layer.jvp("weight"),
    "input_jvp": lambda layer: layer.jvp("x"),
    "weight_jacobian": lambda layer: layer.jacobian("weight"),
    "input_jacobian": lambda layer: layer.jacobian("x"),
    "per_sample": lambda layer: layer.vjp("weight", per_sample=True),
    "gradient_norms": diagrams.gradient_norms,
    "gradient_dots": diagrams.gradient_dots,
    "ggn_diagonal": diagrams.ggn_diagonal,
    "ggn_block": diagrams.ggn_block,
    "ggn_vector_product": diagrams.ggn_vector_product,
    "ntk_block": lambda layer: diagrams.ntk_block(layer, layer),
    "diagonal_vjp": diagrams.diagonal_vjp,
    "hessian_vjp": diagrams.hessian_vjp,
    "input_factor": lambda layer: diagrams.input_factor(layer),
    "output_factor": lambda layer: diagrams.output_factor(layer),
}
"""Operations that derive from the diagram of a layer."""
OF_INPUT: dict[str, Callable[..., Expression]] = {
    "unfold": diagrams.unfold,
    "fold": lambda shape, kernel, **settings: diagrams.fold(
        diagrams.unfold(shape, kernel, **settings).shape, shape[2:], kernel, **settings
    ),
    "kfac_expand": diagrams.kfac_expand,
    "kfac_reduce": diagrams.kfac_reduce,
    "mean_patches": diagrams.mean_patches,
}
"""Operations on the input of a layer alone."""
OF_OUTPUT: dict[str, Callable[..., Expression]] = {
    "grad_expand": diagrams.grad_expand,
    "grad_reduce": diagrams.grad_reduce,
}
"""Operations on the gradient after a layer alone."""


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
    operations = (*OF_LAYER, *OF_INPUT, *OF_OUTPUT)
    command.add_argument("--operation", choices=operations, default="forward")


def network(given: Namespace) -> Expression:
    """The diagram that the arguments ask for.

    Raises:
        ValueError: an unknown layer, options that the layer does not have, shapes or
            hyper-parameters that do not fit together or give no output.
    """
    settings = settings_of(given)
    shape, weight, operation = tuple(given.input), tuple(given.weight or ()), given.operation
    if given.layer == "linear" and operation in (*OF_INPUT, *OF_OUTPUT):
        return _linear(shape, weight, operation)
    if operation in OF_INPUT:
        return _of_input(given.layer, operation, shape, weight[2:], settings)
    (layer,) = LAYERS[given.layer](shape, weight, **settings).terms
    if operation in OF_OUTPUT:
        groups = {"groups": settings["groups"]} if "groups" in settings else {}
        return OF_OUTPUT[operation](layer.shape, **groups)
    if "weight" not in layer.operands and operation not in ("forward", "input_vjp", "input_jvp"):
        raise ValueError(f"{given.layer} has no weight; --operation is {operation!r}")
    return OF_LAYER[operation](layer)


def _of_input(
    layer: str, operation: str, shape: tuple[int, ...], kernel: tuple[int, ...], settings: Any
) -> Expression:
    if layer not in ("conv", "conv_transpose"):
        raise ValueError(f"{layer} has no patches; --operation is {operation!r}")
    if operation in ("unfold", "fold"):  # the same for any number of groups
        settings = {name: value for name, value in settings.items() if name != "groups"}
    if layer == "conv_transpose":
        if operation == "fold":
            raise ValueError("conv_transpose has no patches to fold; --operation is 'fold'")
        settings = settings | {"transposed": True}
    return OF_INPUT[operation](shape, kernel, **settings)


def option(name: str) -> str:
    """How the command line spells a hyper-parameter."""
    return f"--{name.replace('_', '-')}"


def settings_of(given: Namespace) -> dict[str, Any]:
    """The hyper-parameters that are given, by torch's names; others are refused."""
    if given.layer not in SETTINGS:
        raise ValueError(f"layer is {given.layer!r}; expected one of {', '.join(SETTINGS)}")
    if given.weight is None:
        what = "kernel sizes" if given.layer == "avg_pool" else "the weight's shape"
        raise ValueError(f"--weight is not given; expected {what} for {given.layer}")
    names = [name for name in OPTIONS if name != "weight"]
    asked = {name: value for name in names if (value := getattr(given, name)) is not None}
    for name in asked:
        if name not in SETTINGS[given.layer]:
            known = ", ".join(map(option, SETTINGS[given.layer]))
            raise ValueError(
                f"{given.layer} has no {option(name)}; expected {known or 'no options'}"
            )
    return {name: _one_or_all(value) for name, value in asked.items()}


def _linear(shape: tuple[int, ...], weight: tuple[int, ...], operation: str) -> Expression:
    """Operations on one side take it as that of a convolution whose kernel has one position."""
    side = shape if operation in OF_INPUT else diagrams.linear(shape, weight).shape
    side = (*side[:1], *side[-1:], *side[1:-1]) if len(side) > 1 else side
    if operation in OF_OUTPUT:
        return OF_OUTPUT[operation](side)
    return OF_INPUT[operation](side, (1,) * (len(side) - 2))


def _padding(text: str) -> int | str:
    if not (text.isdecimal() or text in ("same", "valid")):
        raise ArgumentTypeError(f"{text!r}; expected ints, same or valid")
    return int(text) if text.isdecimal() else text


def _one_or_all(values: Sequence[int | str] | int) -> int | str | Sequence[int | str]:
    """One value for all dimensions, or a sequence with one for each."""
    return values[0] if isinstance(values, Sequence) and len(values) == 1 else values
