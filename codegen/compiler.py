"""The compiler: forms of networks, the plans for them, and the program of the best ones."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from tnconv.codegen.lowering.contraction import SEARCHES
from tnconv.codegen.lowering.forms import forms_of
from tnconv.codegen.lowering.layouts import Layout
from tnconv.codegen.lowering.nested import Nest, check_nest
from tnconv.codegen.planner import ROUTES, plans
from tnconv.codegen.prices import cost
from tnconv.codegen.prices.calibration import coefficients
from tnconv.codegen.prices.store import Json
from tnconv.codegen.programs.explanation import explain
from tnconv.codegen.programs.joint import chosen_together
from tnconv.codegen.programs.limits import in_turn, leaner
from tnconv.codegen.programs.program import SPARE, Program, Services
from tnconv.codegen.programs.styles import STYLES
from tnconv.codegen.programs.tuning import tuned
from tnconv.codegen.search import Room
from tnconv.diagrams.expression import Expression
from tnconv.diagrams.network import TensorNetwork

REAL = ("native", "pooling", "patch gram")  # routes by kernels for real dtypes only


@dataclass(frozen=True)
class Options:
    """What the search may do, as in `compile`, and ``item``, the bytes of an entry."""

    simplify: bool
    optimize: str
    routes: tuple[str, ...]
    item: int
    memory_limit: int | None
    style: str = "torch"
    order: Nest | None = None
    channels_last: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise unless the options exist and go together.

        Raises:
            ValueError: they do not.
        """
        if self.optimize not in SEARCHES:
            raise ValueError(f"optimize is {self.optimize!r}; expected one of {list(SEARCHES)}")
        limit = self.memory_limit
        if limit is not None and limit <= 0:
            raise ValueError(f"memory_limit is {limit}; expected a positive number of bytes")
        if self.style not in STYLES:
            raise ValueError(f"style is {self.style!r}; expected one of {list(STYLES)}")
        if self.style != "torch" and limit is not None:
            raise ValueError(f"memory_limit is {limit} and style {self.style!r}; expected 'torch'")


@overload
def compile(
    network: Expression | str,
    /,
    *shapes: Sequence[int],
    simplify: bool = True,
    optimize: str = "auto",
    routes: Sequence[str] = tuple(ROUTES),
    memory_limit: int | None = None,
    dtype: torch.dtype = torch.float32,
    tune: bool = False,
    device: torch.device | str = "cpu",
    style: str = "torch",
    order: Nest | None = None,
    channels_last: Collection[str] = (),
) -> Program: ...
@overload
def compile(
    network: Sequence[Expression],
    /,
    *,
    simplify: bool = True,
    optimize: str = "auto",
    routes: Sequence[str] = tuple(ROUTES),
    memory_limit: int | None = None,
    dtype: torch.dtype = torch.float32,
    tune: bool = False,
    device: torch.device | str = "cpu",
    style: str = "torch",
    order: Nest | None = None,
    channels_last: Collection[str] = (),
) -> Program[tuple[Tensor, ...]]: ...
def compile(
    network: Expression | Sequence[Expression] | str,
    /,
    *shapes: Sequence[int],
    simplify: bool = True,
    optimize: str = "auto",
    routes: Sequence[str] = tuple(ROUTES),
    memory_limit: int | None = None,
    dtype: torch.dtype = torch.float32,
    tune: bool = False,
    device: torch.device | str = "cpu",
    style: str = "torch",
    order: Nest | None = None,
    channels_last: Collection[str] = (),
) -> Program | Program[tuple[Tensor, ...]]:
    """Find the cheapest program for a network, or one for several that shares what they can.

    The program runs on any device and dtype; it is chosen by the prices of kernels on ``device``:
    see `calibrate`.

    Args:
        network: A network, several of them, or an equation as of ``torch.einsum``.
        shapes: The shapes of the equation's operands, which are named a, b, c, ...
        simplify: Whether simplified forms of the network are planned as well as the given one.
        optimize: The search for a contraction path: ``"optimal"``, ``"dp"`` (dynamic programming),
            or ``"auto"``, which chooses by the number of tensors.
        routes: The names of the routes that may be used; ``"dense"`` may always be.
        memory_limit: The bytes that a call on operands of ``dtype`` may hold beside the operands,
            without autograd. Within them leaner plans are taken, or the network is computed in
            chunks.
        dtype: The dtype of the operands for which the program is chosen.
        tune: Whether to measure the best few programs on ``device`` and take the fastest. Times
            are remembered on disk. A network in chunks is not measured.
        device: The device on which the program is to be fast.
        style: ``"torch"``, or ``"einsum"`` for calls of ``torch.einsum`` in the order of the best
            path, with patterns as 0/1 tensors: for reading, and as slow as einsums are.
        order: An order of contraction that is forced on one network: nests of its tensors, each of
            which becomes one dense tensor first. What is inside of a nest is planned freely.
        channels_last: The operands, images or volumes, that are in torch's channels-last memory
            format. Results with as many dimensions are then written in it, as by torch's kernels.

    >>> from tnconv.diagrams import conv
    >>> print(compile(conv((8, 3, 32, 32), (16, 3, 3, 3), padding=1)).source)
    import torch.nn.functional as F
    <BLANKLINE>
    <BLANKLINE>
    def contraction(x, weight):
        t1 = F.conv2d(x, weight, padding=1)  # convolution over i1, i2
        return t1
    <BLANKLINE>
    >>> print(compile("ab,bc->ac", (8, 3), (3, 4)).source)
    def contraction(a, b):
        t1 = a @ b  # [a, c] = sum over b
        return t1
    <BLANKLINE>

    Raises:
        ValueError: an equation that does not fit its shapes, shapes without one, an unknown route,
            path search or style, no network, an operand that has two shapes, a memory limit below
            what the network needs, or in einsum style, an order of other tensors, or of several
            networks, or channels last of no operand, or one of other than 4 or 5 dimensions.
    """
    network = _imported(network, shapes)
    one = isinstance(network, Expression)
    networks = networks_of(network)
    check_operands(networks)
    if order is not None:
        _check_order(order, networks)
    last = check_channels_last(networks, channels_last)
    used = _usable(routes, style, dtype)
    options = Options(simplify, optimize, used, dtype.itemsize, memory_limit, style, order, last)
    options.check()
    with cost.using(coefficients(torch.device(device), dtype), dtype.itemsize):
        program = _planned(networks[0] if one else networks, options)
        if memory_limit is not None and program.peak_memory(dtype) > memory_limit:
            program = in_turn(program, options.item, memory_limit, partial(_limited, options))
        elif tune:
            program = tuned(program, torch.device(device), dtype, _named(options), memory_limit)
    return program.prepared()


def _usable(routes: Sequence[str], style: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The routes that a search may take, in the order of `ROUTES`.

    Raises:
        ValueError: an unknown route, or none.
    """
    if not routes or any(name not in ROUTES for name in routes):
        raise ValueError(f"routes are {list(routes)}; expected some of {list(ROUTES)}")
    if style != "torch":
        return ("dense",)
    left_out = REAL if dtype.is_complex else ()
    return tuple(name for name in ROUTES if name in (*routes, "dense") and name not in left_out)


def _imported(
    network: Expression | Sequence[Expression] | str, shapes: Sequence[Sequence[int]]
) -> Expression | Sequence[Expression]:
    """The network that is given, or that of an equation."""
    if isinstance(network, str):
        return TensorNetwork.from_einsum(network, *shapes)
    if shapes:
        raise ValueError(
            f"got {len(shapes)} more positional arguments; expected shapes after an equation, or "
            "options by name"
        )
    return network


def _named(options: Options) -> dict[str, Json]:
    """The options in a key on disk."""
    named = {**asdict(options), "routes": list(options.routes), "order": repr(options.order)}
    named["channels_last"] = list(options.channels_last)
    new = {"order": options.order, "channels_last": options.channels_last}
    return {k: v for k, v in named.items() if new.get(k, True)}


def _check_order(order: Nest, networks: Sequence[Expression]) -> None:
    terms = [term for network in networks for term in network.terms]
    if len(terms) != 1:
        raise ValueError(f"an order is given for {len(terms)} networks; expected one")
    check_nest(order, terms[0])


def networks_of(network: Expression | Sequence[Expression]) -> tuple[Expression, ...]:
    """The networks to compile, also where it is one."""
    return (network,) if isinstance(network, Expression) else tuple(network)


def check_operands(networks: Sequence[Expression]) -> None:
    """Raise unless there are networks, and each operand has one shape.

    Raises:
        ValueError: no network, or an operand that has two shapes.
    """
    if not networks:
        raise ValueError("no networks are given; expected at least one")
    shapes: dict[str, tuple[int, ...]] = {}
    for net in networks:
        for name, shape in net.operands.items():
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"operand {name!r} has shapes {shapes[name]} and {shape} in two networks; "
                    "expected one shape"
                )


def check_channels_last(
    networks: Sequence[Expression], channels_last: Collection[str]
) -> tuple[str, ...]:
    """The operands that are said to have channels last, each once.

    Raises:
        ValueError: one that is no operand, or has other than 4 or 5 dimensions.
    """
    shapes = {name: shape for net in networks for name, shape in net.operands.items()}
    for name in channels_last:
        if len(shapes.get(name, ())) not in (4, 5):
            found = f"has shape {shapes[name]}" if name in shapes else "is no operand"
            raise ValueError(
                f"channels_last names {name!r}, which {found}; expected operands of 4 or 5 "
                "dimensions"
            )
    return tuple(name for name in shapes if name in channels_last)


def _limited(options: Options, network: Expression, limit: int) -> Program:
    """A network by itself, within this limit if that can be."""
    return _planned(network, replace(options, memory_limit=limit))


def without_plans(
    network: Expression | tuple[Expression, ...],
    spare_memory: int = SPARE,
    style: str = "torch",
    channels_last: tuple[str, ...] = (),
) -> Program:
    """A program without plans yet: what planning does not change."""
    services = Services(compile, explain)
    return Program(network, (), (), (), spare_memory, services, style, None, channels_last)


def layout_of(term: TensorNetwork, terms: int, channels_last: Collection[str]) -> Layout:
    """How a plan's result is to lie, for a term of a sum of so many.

    As torch's own kernels write it: with channels last like an operand of as many dimensions. The
    sum of several terms is contiguous anyway.
    """
    dims = [len(shape) for name, shape in term.operands.items() if name in channels_last]
    if len(term.shape) in dims:
        return "channels last"
    return "contiguous" if terms == 1 else "any"


def _planned(network: Expression | tuple[Expression, ...], options: Options) -> Program:
    """The program of the plans that are best together; within a limit, or as lean as it can be."""
    limit = options.memory_limit
    spare, last = SPARE if limit is None else 0, options.channels_last
    program = without_plans(network, spare, options.style, last)
    alone = isinstance(network, Expression) and len(network.terms) == 1
    lists, firings = [], []
    room = Room(limit, options.item, shared=limit is not None and not alone)
    for net in program.networks:
        for term in net.terms:
            forms, fired = forms_of(term, options.simplify, options.style)
            layout = layout_of(term, len(net.terms), last)
            how = program.positions, options.routes, options.optimize, layout, room
            several, order = len(program.networks) > 1, options.order
            lists.append(plans(forms, *how, several=several, order=order, channels_last=last))
            firings += fired
    program = replace(program, firings=tuple(firings))
    best = replace(program, terms=tuple(map(tuple, lists))).taking(chosen_together(lists))
    if limit is None or (alone and best.schedule.peak(options.item) <= limit):
        return best
    return leaner(best, options.item, limit)


def again(
    program: Program[Any], networks: Sequence[Expression], rivals: Sequence[int]
) -> Program[Any] | None:
    """A program's plans for networks of other sizes, by the same choices and without a search.

    For each term the chosen plan is written, and up to ``rivals`` of the plans ranked behind it.
    The result is None if the choices of a chosen plan do not fit the new sizes. Prices are those of
    the table in use.
    """
    last = program.channels_last
    one = isinstance(program.network, Expression)
    empty = without_plans(networks[0] if one else (*networks,), channels_last=last)
    known, terms = iter(zip(program.terms, rivals, strict=True)), []
    for net in networks:
        for term in net.terms:
            forms, _ = forms_of(term)
            ranked, most = next(known)
            write = partial(
                plans,
                forms,
                empty.positions,
                layout=layout_of(term, len(net.terms), last),
                several=len(networks) > 1,
                channels_last=last,
            )
            first, *others = [write(script=plan.choices) for plan in ranked[: 1 + most]]
            if not first:
                return None
            terms.append((*first, *(plan for found in others for plan in found)))
    return replace(empty, terms=tuple(terms))
