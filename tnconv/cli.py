"""The command line: explain and draw the diagrams of a layer, and run the demo."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tnconv import diagrams
from tnconv.codegen import compile
from tnconv.diagrams import Expression, TensorNetwork
from tnconv.diagrams.drawing import draw_steps
from tnconv.monitor.monitor_command import add_command
from tnconv.simplify import simplify

OF_LAYER: dict[str, Callable[[TensorNetwork], Expression]] = {
    "forward": lambda layer: layer,
    "weight_vjp": lambda layer: layer.vjp("weight"),
    "input_vjp": lambda layer: layer.vjp("x"),
    "per_sample": lambda layer: layer.vjp("weight", per_sample=True),
}
"""Operations that derive from the diagram of a layer."""
OF_INPUT: dict[str, Callable[..., Expression]] = {
    "unfold": diagrams.unfold,
    "kfac_expand": diagrams.kfac_expand,
    "kfac_reduce": diagrams.kfac_reduce,
}
"""Operations on the input of a layer alone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 2 with one line for arguments that do not fit.

    >>> main("explain linear --input 8 3 --weight 4 3".split())  # doctest: +ELLIPSIS
    network
      [n, d] = Σ_{c} x[n, c] · weight[d, c]
    ...
    0
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except (ValueError, TypeError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("rich", "sklearn"):
            raise
        parser.exit(1, f"{parser.prog}: no module {error.name}; pip install 'tnconv[demo]'\n")
    return 0


def network(given: Namespace) -> Expression:
    """The diagram that the arguments of ``explain`` and ``draw`` ask for.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    if given.layer == "linear":
        return _linear(tuple(given.input), tuple(given.weight), given.operation)
    shape, weight = tuple(given.input), tuple(given.weight)
    names = ("stride", "padding", "dilation", "groups")
    settings: dict[str, Any] = {name: _one_or_all(getattr(given, name)) for name in names}
    layer = diagrams.conv(shape, weight, **settings)
    if given.operation in OF_LAYER:
        return OF_LAYER[given.operation](layer)
    if given.operation == "unfold":  # the same for any number of groups
        del settings["groups"]
    return OF_INPUT[given.operation](shape, weight[2:], **settings)


def _linear(shape: tuple[int, ...], weight: tuple[int, ...], operation: str) -> Expression:
    """Operations on the input take it as that of a convolution whose kernel has one position."""
    layer = diagrams.linear(shape, weight)
    if operation in OF_LAYER:
        return OF_LAYER[operation](layer)
    shape = (*shape[:1], *shape[-1:], *shape[1:-1]) if len(shape) > 1 else shape
    return OF_INPUT[operation](shape, (1,) * (len(shape) - 2))


def _explain(given: Namespace) -> None:
    print(compile(network(given)).explain())


def _draw(given: Namespace) -> None:
    net = network(given)
    if not (given.simplified or given.steps):
        print(net.draw(given.output))
        return
    result = simplify(net)
    (before,), (after,) = net.terms, result.views.terms
    pictures = [("as given", before), ("simplified", after)]
    if given.steps:
        pictures = [("as given", before)] + [(step.rule, step.after) for step in result.trace]
    print(draw_steps(pictures, given.output))


def _demo(given: Namespace) -> None:
    from tnconv import demo  # needs the packages of tnconv[demo]

    seeds = tuple(range(given.first_seed, given.first_seed + given.seeds))
    settings = demo.Settings(given.folder, given.epochs, seeds)
    demo.run(settings.quick if given.quick else settings)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("python -m tnconv", description="Tensor networks of convolutions.")
    commands = parser.add_subparsers(title="commands", required=True)
    explain = commands.add_parser("explain", help="how an operation of a layer is compiled")
    draw = commands.add_parser("draw", help="a picture of an operation of a layer")
    for command in (explain, draw):
        _add_layer(command)
    draw.add_argument(
        "--output", type=Path, default=Path("diagram.svg"), help=".svg .pdf .png .dot"
    )
    draw.add_argument("--simplified", action="store_true", help="draw it before and after")
    draw.add_argument("--steps", action="store_true", help="draw it after every rule that fires")
    demo = commands.add_parser("demo", help="KFAC beside SGD on handwritten digits, in a minute")
    demo.add_argument("--folder", type=Path, default=Path("demo-output"), help="for the pictures")
    demo.add_argument("--epochs", type=_positive, default=3)
    demo.add_argument("--seeds", type=_positive, default=3, help="how many")
    demo.add_argument("--first-seed", type=int, default=0)
    demo.add_argument("--quick", action="store_true", help="one epoch, one seed, two grid points")
    for command, run in ((explain, _explain), (draw, _draw), (demo, _demo)):
        command.set_defaults(run=run)
    add_command(commands)
    return parser


def _add_layer(command: ArgumentParser) -> None:
    """The arguments that say which operation of which layer."""
    command.add_argument("layer", choices=("conv", "linear"))
    command.add_argument("--input", type=int, nargs="+", required=True, metavar="SIZE")
    command.add_argument("--weight", type=int, nargs="+", required=True, metavar="SIZE")
    command.add_argument("--stride", type=int, nargs="+", default=[1])
    command.add_argument("--padding", type=_padding, nargs="+", default=[0], help="or same, valid")
    command.add_argument("--dilation", type=int, nargs="+", default=[1])
    command.add_argument("--groups", type=int, default=1)
    command.add_argument("--operation", choices=(*OF_LAYER, *OF_INPUT), default="forward")


def _padding(text: str) -> int | str:
    if not (text.isdecimal() or text in ("same", "valid")):
        raise ArgumentTypeError(f"{text!r}; expected ints, same or valid")
    return int(text) if text.isdecimal() else text


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ArgumentTypeError(f"{number}; expected at least 1")
    return number


def _one_or_all(values: Sequence[int | str] | int) -> int | str | Sequence[int | str]:
    """One value for all dimensions, or a sequence with one for each."""
    return values[0] if isinstance(values, Sequence) and len(values) == 1 else values
