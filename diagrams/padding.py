"""Padding of every mode, as a sum of networks without patterns: each piece is an affine view."""

from collections.abc import Iterator, Sequence
from itertools import product

from tnconv.diagrams.affine import Axis, Tensor, View
from tnconv.diagrams.expression import Sum
from tnconv.diagrams.hyperparameters import Padding, checked_shape, paddings
from tnconv.diagrams.network import TensorNetwork

Piece = tuple[int, Axis, Axis]
"""How many positions, where they go in the result, and where they come from in the input."""

MODES = ("zeros", "reflect", "replicate", "circular")


def pad(input_shape: Sequence[int], padding: Padding, mode: str = "zeros") -> Sum:
    """``y[n, c, o] = Σ_i P[o, i] x[n, c, i]``: the input, and copies of its border around it.

    Operand ``x`` of shape ``(n, c, *i)``, or ``(c, *i)`` with one (left, right) pair for each
    spatial dimension. Modes as in ``torch.nn.Conv2d``: the input is surrounded by ``"zeros"``, by
    its mirror image (``"reflect"``), by its last entry (``"replicate"``), or continues from its
    other end (``"circular"``); one term per product of pieces, for any number of dimensions.

    >>> pad((8, 3, 32, 32), ((1, 2), (0, 3)), "circular").shape
    (8, 3, 35, 35)

    Raises:
        ValueError: another mode, or a padding that reads outside of the input.
    """
    shape = checked_shape("input", input_shape)
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {MODES}")
    dims = len(shape) - 2
    if isinstance(padding, Sequence) and padding and isinstance(padding[0], Sequence):
        dims = len(padding)
    if len(shape) not in (dims + 1, dims + 2) or dims < 0 or isinstance(padding, str):
        raise ValueError(
            f"input has shape {shape} and padding is {padding!r}; expected (n, c, *spatial) and an "
            "int, or one int or (left, right) pair per spatial dimension"
        )
    ones = (1,) * dims
    sides = zip(shape[len(shape) - dims :], paddings(padding, ones, ones, ones), strict=True)
    pieces = [
        list(_pieces(f"i{at}", size, *pair, mode)) for at, (size, pair) in enumerate(sides, 1)
    ]
    return Sum(tuple(_term(shape[: len(shape) - dims], each) for each in product(*pieces)))


def _term(leading: Sequence[int], pieces: Sequence[Piece]) -> TensorNetwork:
    sizes = dict(zip(("n", "c")[-len(leading) :], leading, strict=True))
    front = View.of(sizes, *sizes)
    result = front.axes + tuple(piece[1] for piece in pieces)
    x = front.axes + tuple(piece[2] for piece in pieces)
    sizes |= {f"i{at}": piece[0] for at, piece in enumerate(pieces, 1)}
    given = Tensor("x", View(tuple(axis.size for axis in x), x))
    return TensorNetwork((given,), View(tuple(axis.size for axis in result), result), sizes)


def _pieces(leg: str, size: int, left: int, right: int, mode: str) -> Iterator[Piece]:
    """The input itself, then its border on the left and on the right, as far as there is one."""
    most = {"zeros": max(left, right), "reflect": size - 1, "replicate": left + right}
    if max(left, right) > most.get(mode, size) or (mode == "replicate" and not size):
        raise ValueError(
            f"padding ({left}, {right}) with mode {mode!r} reads outside of an input of {size}"
        )
    whole, plain = left + size + right, ((leg, 1),)
    yield size, Axis(whole, left, plain), Axis(size, 0, plain)
    borders = {
        "reflect": (Axis(size, left, ((leg, -1),)), Axis(size, size - 2, ((leg, -1),))),
        "replicate": (Axis(size), Axis(size, size - 1)),
        "circular": (Axis(size, size - left, plain), Axis(size, 0, plain)),
    }
    for at, (count, start) in enumerate(((left, 0), (right, left + size))):
        if count and mode in borders:
            yield count, Axis(whole, start, plain), borders[mode][at]
