"""The baseline compiler: a program by the structure of its networks alone, without a search."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from tnconv.codegen.compiler import (
    check_channels_last,
    check_operands,
    compile,
    layout_of,
    networks_of,
    without_plans,
)
from tnconv.codegen.lowering.contraction import GREEDY
from tnconv.codegen.lowering.covers import Cover, Route
from tnconv.codegen.lowering.finish import finished
from tnconv.codegen.lowering.layouts import Layout
from tnconv.codegen.lowering.nested import Nest
from tnconv.codegen.lowering.plans import Plan
from tnconv.codegen.lowering.selections import selected
from tnconv.codegen.prices import cost
from tnconv.codegen.prices.calibration import coefficients
from tnconv.codegen.programs.program import Program
from tnconv.codegen.routes.dense import dense
from tnconv.codegen.routes.hadamard import multiplied
from tnconv.codegen.routes.native import native
from tnconv.codegen.routes.window import window
from tnconv.diagrams.expression import Expression
from tnconv.diagrams.network import TensorNetwork
from tnconv.simplify import simplify

SEARCH = 0.1  # seconds that a search takes; slower baseline programs do not pay (0009)


def baseline(
    network: Expression | Sequence[Expression],
    memory_limit: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    order: Nest | None = None,
    channels_last: Collection[str] = (),
) -> Program[Any]:
    """A program in a few milliseconds: native kernels, or windows and products in a greedy order.

    Its results are those of `compile`, up to rounding. Networks for which it is predicted to take
    longer than a search would, or to need more than the limit, are compiled.

    Args:
        network: One network or several, as for `compile`.
        memory_limit: The bytes that a call may hold, on operands of ``dtype``.
        dtype: The operands' precision, for what the program holds.
        device: Where it runs, for the prices of kernels.
        order: A forced order of contraction, as for `compile`, which then takes over.
        channels_last: Operands with channels last, as for `compile`.
    """
    options: Any = {"memory_limit": memory_limit, "dtype": dtype, "device": device}
    options |= {"channels_last": channels_last}
    if order is not None:
        return compile(network, order=order, **options)
    networks = networks_of(network)
    check_operands(networks)
    one, last = isinstance(network, Expression), check_channels_last(networks, channels_last)
    with cost.using(coefficients(torch.device(device), dtype), dtype.itemsize):
        given = networks[0] if one else networks
        empty: Program[Any] = without_plans(given, channels_last=last)
        terms = tuple(
            (first_plan(term, empty.positions, layout_of(term, len(net.terms), last), last),)
            for net in networks
            for term in net.terms
        )
        program = replace(empty, terms=terms)
        slow = sum(plan.seconds for (plan,) in terms) > SEARCH
    if slow or (memory_limit is not None and program.peak_memory(dtype) > memory_limit):
        return compile(network, **options)
    return program


def first_plan(
    network: TensorNetwork,
    positions: Mapping[str, int],
    layout: Layout,
    channels_last: Collection[str] = (),
) -> Plan:
    """The native kernel of the whole network, or the faster of native kernels and of windows."""
    if network.scale == 0 or 0 in network.sizes.values():
        normal = simplify(network).normal
        assert isinstance(normal, TensorNetwork)
        network = normal
    start = multiplied(Cover.of(network, positions, channels_last=channels_last))

    def plan(routes: Sequence[Route]) -> Plan:
        found = finished(_covered(start, routes), "as given", GREEDY, layout)
        assert found is not None
        return found

    names = [tensor.name for tensor in network.tensors]
    if start.pattern is None or len(names) < 2 or len({*names}) < len(names):
        return plan(BY_WINDOWS)  # no native kernel, nor for Gram networks
    natively = plan(NATIVELY)
    if natively.is_torchs:
        return natively
    return min(natively, plan(BY_WINDOWS), key=lambda way: way.risk * way.seconds)


def _cheapest_native(cover: Cover) -> Iterator[Cover]:
    if found := [*native(cover)]:
        yield min(found, key=lambda after: after.writer.seconds)


NATIVELY: tuple[Route, ...] = (_cheapest_native, window, dense)
BY_WINDOWS: tuple[Route, ...] = (window, _cheapest_native, dense)


def _covered(cover: Cover, routes: Sequence[Route]) -> Cover:
    """Every pattern by the first route that can, in the first way."""
    while cover.selection is not None:
        cover = next(selected(cover))
    while cover.pattern is not None:
        cover = next(chain.from_iterable(route(cover) for route in routes))
    return cover
