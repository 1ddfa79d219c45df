"""Einsum both ways: networks as equations with operands, and equations as networks."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from string import ascii_letters, ascii_lowercase

import opt_einsum
import torch
from torch import Tensor as Array

from tnconv.diagrams.affine import Leg, Node, Pattern, Selection, Sizes, Tensor, View
from tnconv.diagrams.explicit import explicit
from tnconv.diagrams.expression import Expression
from tnconv.diagrams.network import TensorNetwork
from tnconv.diagrams.reference import check_operands, indicator

Shape = Sequence[int]
_MATRIX = "\0matrix of "  # before the name of an operand that lists positions


def einsum(
    network: Expression,
    operands: Mapping[str, Array],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[str, list[Array]]:
    """The network as an equation and its operands: patterns and odd views are 0/1 tensors.

    Args:
        network: A network, or a sum of one.
        operands: Its operands by name. Without any, they are drawn at random, for timing and for
            path finders; on the device ``"meta"`` they are shapes alone.
        device: Where tensors are made; that of the operands, if there are any.
        dtype: What tensors are made of; that of the operands, if there are any.

    Raises:
        ValueError: the sum has several terms, an operand is missing, unknown or of another shape,
            or a device or a dtype is given beside operands.
    """
    if len(network.terms) != 1:
        raise ValueError(
            f"a sum of {len(network.terms)} networks is no single einsum; export its terms"
        )
    if operands and (device is not None or dtype is not None):
        raise ValueError("device and dtype are those of the operands; expected one or the other")
    (term,) = network.terms
    given = dict(operands) or dict(_random(term, device, dtype))
    check_operands(term.operands, given, term.indices)
    values = [given[name] for name in given if name not in term.indices]
    like = values[0] if values else torch.empty(0, device=device, dtype=dtype)
    return _exported(term, given, like)


def _random(
    network: TensorNetwork, device: torch.device | str | None, dtype: torch.dtype | None
) -> Iterator[tuple[str, Array]]:
    for node in network.tensors:
        if isinstance(node, Selection):
            drawn = torch.randint(max(1, node.view.shape[1]), node.shape, device=device)
        else:
            drawn = torch.randn(node.shape, device=device, dtype=dtype)
        yield node.name, drawn


def _exported(
    network: TensorNetwork, given: Mapping[str, Array], like: Array
) -> tuple[str, list[Array]]:
    plain = explicit(network.with_(_matrices(network)))
    sizes = plain.sizes
    scale = plain.scale
    inputs: list[list[Leg]] = []
    arrays: list[Array] = []
    for node in plain.nodes:
        legs = _long(node, sizes)
        if isinstance(node, Pattern) and not legs:
            scale *= 0 in node.values
            continue
        inputs.append(legs)
        arrays.append(_array(node, given, sizes, like).reshape([sizes[leg] for leg in legs]))
    output = [leg for leg in _plain_legs(plain.result, sizes) if sizes[leg] != 1]
    held = {leg for legs in inputs for leg in legs}
    scale *= prod(size for leg, size in sizes.items() if leg not in {*held, *output})
    for leg in dict.fromkeys(leg for leg in output if leg not in held):
        inputs.append([leg])
        arrays.append(like.new_ones(sizes[leg]))
    if scale != 1 or not arrays:
        inputs.append([])
        arrays.append(like.new_full((), float(scale)))
    letters = _letters(leg for legs in (*inputs, output) for leg in legs)
    terms = ["".join(letters[leg] for leg in legs) for legs in (*inputs, output)]
    return f"{','.join(terms[:-1])}->{terms[-1]}", arrays


def _matrices(network: TensorNetwork) -> Iterator[Node]:
    """The nodes, with lists of positions as operands that are 0/1 matrices."""
    for node in network.nodes:
        if isinstance(node, Selection):
            node = Tensor(_MATRIX + node.name, node.view)
        yield node


def _long(node: Node, sizes: Sizes) -> list[Leg]:
    """The legs of a node that have more than one position, or none."""
    if isinstance(node, Pattern):
        return [leg for leg, _ in node.terms if sizes[leg] != 1]
    return [leg for leg in _plain_legs(node.view, sizes) if sizes[leg] != 1]


def _plain_legs(view: View, sizes: Sizes) -> list[Leg]:
    legs = [axis.plain(sizes) for axis in view.axes]
    return [leg for leg in legs if leg is not None]


def _array(node: Node, given: Mapping[str, Array], sizes: Sizes, like: Array) -> Array:
    if isinstance(node, Pattern):
        return indicator(node.terms, node.values, sizes).to(like)
    if not node.name.startswith(_MATRIX):
        return given[node.name]
    positions = given[node.name.removeprefix(_MATRIX)]
    return torch.nn.functional.one_hot(positions, node.view.shape[1]).to(like)


def _letters(legs: Iterator[Leg]) -> dict[Leg, str]:
    """A letter for each leg: its own first letter, if that is free."""
    found: dict[Leg, str] = {}
    taken: set[str] = set()
    for leg in dict.fromkeys(legs):
        own = (leg[0], leg[0].upper()) if leg[0] in ascii_letters else ()
        free = (letter for letter in (*own, *ascii_letters) if letter not in taken)
        beyond = (opt_einsum.get_symbol(at) for at in range(len(ascii_letters), 2**20))
        found[leg] = next(free, None) or next(x for x in beyond if x not in taken)
        taken.add(found[leg])
    return found


def from_einsum(
    equation: str, shapes: Sequence[Shape], named: Mapping[str, Shape]
) -> TensorNetwork:
    """The network of an equation: a leg for each letter, whose name is the letter.

    Args:
        equation: As of ``torch.einsum``; without ``->`` letters that appear once are kept, sorted.
        shapes: The shapes of operands that are named a, b, c, ...
        named: The shapes of operands by name, instead.

    Raises:
        ValueError: an ellipsis, another number of shapes than of terms, a letter of two sizes, or
            one of the result that repeats or that no operand has.
    """
    if shapes and named:
        raise ValueError("shapes are given by position and by name; expected one or the other")
    operands = dict(named) or dict(zip(_names(), map(tuple, shapes), strict=False))
    terms, output = _parsed(equation)
    if len(terms) != len(operands):
        raise ValueError(
            f"equation {equation!r} has {len(terms)} operands; got {len(operands)} shapes"
        )
    sizes: dict[Leg, int] = {}
    for (name, shape), legs in zip(operands.items(), terms, strict=True):
        if len(shape) != len(legs):
            raise ValueError(
                f"operand {name!r} has shape {tuple(shape)}; expected {len(legs)} dimensions "
                f"for {legs!r}"
            )
        for leg, size in zip(legs, shape, strict=True):
            if sizes.setdefault(leg, size) != size:
                raise ValueError(
                    f"index {leg!r} has size {size} in operand {name!r} and {sizes[leg]} before; "
                    "expected one size"
                )
    for leg in output:
        if leg not in sizes or output.count(leg) > 1:
            raise ValueError(
                f"index {leg!r} of the result {output!r} repeats or is in no operand of "
                f"{equation!r}; expected indices of operands, each once"
            )
    nodes = [
        Tensor(name, View.of(sizes, *legs)) for name, legs in zip(operands, terms, strict=True)
    ]
    return TensorNetwork(tuple(nodes), View.of(sizes, *output), sizes)


def _names() -> Iterator[str]:
    yield from ascii_lowercase
    yield from (f"{letter}{at}" for at in range(1, 2**10) for letter in ascii_lowercase)


def _parsed(equation: str) -> tuple[list[str], str]:
    text = "".join(equation.split())
    left, arrow, output = text.partition("->")
    letters = left.replace(",", "") + output
    if odd := sorted({letter for letter in letters if not letter.isalpha()}):
        what = "an ellipsis" if "." in odd else f"{''.join(odd)!r}"
        raise ValueError(f"equation {equation!r} has {what}; expected letters, commas and one '->'")
    if not arrow:
        output = "".join(sorted(leg for leg in {*letters} if letters.count(leg) == 1))
    return left.split(","), output
