"""The planner: enumerate covers of a network's forms, price them, take the cheapest."""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, islice
from math import inf, isqrt, prod, sqrt

from tnconv.codegen.lowering import layouts
from tnconv.codegen.lowering.contraction import contract
from tnconv.codegen.lowering.covers import Cover, Route
from tnconv.codegen.lowering.forms import POLYPHASE
from tnconv.codegen.lowering.layouts import Layout
from tnconv.codegen.lowering.nested import Nest, nested, same_tensors
from tnconv.codegen.lowering.pairs import sum_out
from tnconv.codegen.lowering.plans import Plan
from tnconv.codegen.lowering.ranking import ranked
from tnconv.codegen.lowering.schedule import need
from tnconv.codegen.lowering.selections import opened, scatter, selected
from tnconv.codegen.lowering.strided import ONE, Strided
from tnconv.codegen.lowering.values import Value, write
from tnconv.codegen.lowering.writer import CONTIGUOUS, SCALE, Choices, Step, Writer
from tnconv.codegen.prices import cost
from tnconv.codegen.routes.box_sums import pooling
from tnconv.codegen.routes.dense import dense
from tnconv.codegen.routes.displacement import displacement
from tnconv.codegen.routes.hadamard import multiplied
from tnconv.codegen.routes.late_sums import late_sums
from tnconv.codegen.routes.loops import loops
from tnconv.codegen.routes.native import native
from tnconv.codegen.routes.pixel_gram import pixel_gram
from tnconv.codegen.routes.taps import taps
from tnconv.codegen.routes.window import window
from tnconv.diagrams.affine import Leg, Sizes, View
from tnconv.diagrams.network import TensorNetwork


def looped(
    cover: Cover,
    routes: Sequence[Route] = (native, window, pixel_gram, taps, dense),
    pairs: bool = False,
    most: Callable[[], float] = lambda: inf,
) -> Iterator[Cover]:
    """A network that falls apart along a leg, one position at a time, each by these routes.

    The cheapest way, and the cheapest by native kernels alone, which is what torch would do; none
    that takes more than ``most`` seconds.
    """
    for loop in loops(cover, pairs):
        bodies: list[Plan] = []
        each = most() / cover.network.sizes[loop.leg]
        how: Finish = "auto", "contiguous"
        _search(loop.body, "body", routes, how, bodies, Room(), most=each)
        natively = [plan for plan in bodies if {*plan.routes} == {"native"}]
        best = [min(some, key=lambda p: p.risk * p.seconds) for some in (bodies, natively) if some]
        for body in dict.fromkeys(best):
            yield loop.around(body.steps, body.output, body.routes, body.choices)


def summed_late(cover: Cover, routes: Sequence[Route]) -> Iterator[Cover]:
    """A sum over samples as the sum of what each of them gives, by every plan for that.

    Each plan is a cover of its own: other networks may need the same product, by any of them.
    """
    for late in late_sums(cover):
        bodies: list[Plan] = []
        plain, turned = (late.body.choosing("late", name) for name in ("plain", "loop"))
        for each in (plain, *(looped(turned, routes) if turned.writer.follows else ())):
            _search(each, "body", routes, ("auto", "any"), bodies, Room(), True)
        yield from map(late.after, dict.fromkeys(bodies))


ROUTES: Mapping[str, Route] = {
    "native": native,
    "pooling": pooling,
    "window": window,
    "pixel gram": pixel_gram,
    "taps": taps,
    "displacement": displacement,
    "loop": looped,
    "dense": dense,
}
Finish = tuple[str, Layout]
"""The search of paths, and how the result lies."""
HOPELESS = 2.0  # a cover that costs this multiple of a complete plan is not continued (0001)
NUMBER = 16  # bytes of a factor as a tensor, in double precision and in that of the operands


@dataclass(frozen=True)
class Room:
    """The bytes that plans may hold for items of a size; without a limit all fit.

    If it is ``shared`` with other terms, leaner plans are of use although one fits by itself.
    """

    limit: int | None = None
    item: int = cost.ITEM
    shared: bool = False

    def fits(self, plan: Plan) -> bool:
        return self.limit is None or plan.peak_of(self.item) <= self.limit

    def too_small(self, steps: Sequence[Step], found: Sequence[Plan]) -> bool:
        """Whether plans that begin with these steps neither fit nor are leaner than all others."""
        if self.limit is None:
            return False
        least = max((need(step, self.item) for step in steps), default=0)
        return least > self.limit and any(plan.peak_of(self.item) <= least for plan in found)


def plans(
    forms: Mapping[str, TensorNetwork],
    positions: Mapping[str, int],
    routes: Sequence[str] = tuple(ROUTES),
    optimize: str = "auto",
    layout: Layout = "contiguous",
    room: Room = Room(),
    several: bool = False,
    order: Nest | None = None,
    script: Choices = (),
    channels_last: Collection[str] = (),
) -> list[Plan]:
    """Every complete plan that was not pruned, the chosen one first.

    ``positions`` are those of the operands in a call, of which some have ``channels_last``; the
    result has the ``layout``. One native kernel for the whole network stays
    unless another plan is clearly faster: its time is known better than any prediction. Plans that
    do not fit come last, and prune no others. For one of ``several`` networks there are also loops
    and late sums, which pay if others need the same products. An ``order`` is forced on all forms.
    A ``script``, the choices of a plan for other sizes, is followed as far as it fits: then there
    is that plan alone, or none.
    """
    found: list[Plan] = []

    def most() -> float:
        return inf if several else HOPELESS * _best(found, room)

    if order is not None:
        _search_in_order(forms, positions, routes, (optimize, layout), found, room, order)
    for form, network in forms.items() if not found else ():
        if script and script[0] != ("form", form):
            continue
        skipped = ("loop", "dense") if form == POLYPHASE and len(forms) > 1 else ("loop",)
        tried = [ROUTES[name] for name in routes if name not in skipped]
        given = Cover.of(network, positions, script, channels_last).choosing("form", form)
        start = multiplied(given)
        start = start if several else _scaled_square(start)
        again = form == "as given" and "in form N" in forms
        plain, turned, late = (start.choosing("start", name) for name in ("plain", "loop", "late"))
        loops_too = "loop" in routes and not again and turned.writer.follows
        turns = looped(turned, tried, several, most) if loops_too else ()
        sums = summed_late(late, tried) if several and not again and late.writer.follows else ()
        for some in ((plain,), turns, sums):
            known = [] if several else found  # what is slow by itself may be shared
            for cover in some:
                _search(cover, form, tried, (optimize, layout), known, room, several)
            found += known if several else ()
    return found if script else ranked(found, forms, room.fits)


def _scaled_square(cover: Cover) -> Cover:
    """The one operand of a square takes the root of its scale, if halves and result are larger."""
    network = cover.network
    names = [tensor.name for tensor in network.tensors]
    if len(names) != 2 or network.scale <= 0 or any([*cover.arrays] != [name] for name in names):
        return cover
    (name,) = cover.arrays
    array = cover.arrays[name]
    if network.scale == 1:
        return cover
    small = array.size <= min(prod(network.shape), _half(network))
    writer, small = cover.writer.deciding("scaled operand", small)
    if not small:
        return replace(cover, writer=writer)
    writer, value = _scaled(writer, Value(array, ()), sqrt(network.scale))
    return replace(cover, network=network.with_(scale=1), arrays={name: value.array}, writer=writer)


def _half(network: TensorNetwork) -> int:
    """Entries of one half of a square: what both halves hold, and half of the open legs."""
    kinds = {leg: [type(network.nodes[at]) for at in held] for leg, held in network.holders.items()}
    shared = [leg for leg, held in kinds.items() if len(held) > len({*held})]
    own = prod(network.sizes[leg] for leg in network.open_legs if leg not in shared)
    return prod(network.sizes[leg] for leg in shared) * isqrt(own)


def _search(
    cover: Cover,
    form: str,
    routes: Sequence[Route],
    finish: Finish,
    found: list[Plan],
    room: Room,
    several: bool = False,
    most: float = inf,
) -> None:
    """Depth first; a cover that costs more than a complete plan already is not continued.

    Nor is one that needs more than there is room for, unless no plan needs less. Plans for one of
    ``several`` networks are completed, since others may share their steps. None may take more than
    ``most`` seconds.
    """
    most = min(most, HOPELESS * _best(found, room))
    steps = cover.writer.steps
    if cover.writer.seconds > most or room.too_small(steps, found) or not cover.writer.follows:
        return
    if cover.selection is not None:
        both = selected(cover.choosing("scatter", False)), _scattered(cover, routes)
        for after in _numbered(chain.from_iterable(both)):
            _search(after, form, routes, finish, found, room, several, most)
        return
    if cover.pattern is None:
        limit = inf if several or room.shared else most
        if (plan := finished(cover, form, *finish, limit)) is not None:
            found.append(plan)
        return
    for after in _covered(cover, routes):
        _search(after, form, routes, finish, found, room, several, most)


def _best(found: Sequence[Plan], room: Room) -> float:
    """The seconds of the fastest plan that fits."""
    return min((plan.seconds for plan in found if room.fits(plan)), default=inf)


def _search_in_order(
    forms: Mapping[str, TensorNetwork],
    positions: Mapping[str, int],
    routes: Sequence[str],
    finish: Finish,
    found: list[Plan],
    room: Room,
    order: Nest,
) -> None:
    """Plans for a forced order, of the forms that have all tensors as they are given."""
    tried = [ROUTES[name] for name in routes if name != "loop"]

    def inner(cover: Cover, route: str | None) -> Plan:
        plans: list[Plan] = []
        first = [ROUTES[name] for name in routes if name == route]
        for some in (first, tried):
            if not plans:
                _search(multiplied(cover), "part", some, (finish[0], "any"), plans, Room())
        return min(plans, key=lambda plan: (not room.fits(plan), plan.risk * plan.seconds))

    given = next(iter(forms.values()))
    for form, network in forms.items():
        if same_tensors(network, given) and not network.indices:
            cover = nested(Cover.of(network, positions), order, inner)
            _search(multiplied(cover), form, tried, finish, found, room)


def _scattered(cover: Cover, routes: Sequence[Route]) -> Iterator[Cover]:
    """The slices of an open leg that a selection lists are computed alone, then put in place."""
    if (found := opened(cover)) is None:
        return
    one, body = found
    slices: list[Plan] = []
    body = body.choosing("scatter", True)
    _search(body, "body", routes, ("auto", "any"), slices, Room())
    if not slices and body.writer.script:
        return
    best = min(slices, key=lambda plan: plan.risk * plan.seconds)
    writer = replace(cover.writer, steps=best.steps, choices=best.choices)
    yield scatter(one, writer, Value(best.output, body.network.result.legs))


def _covered(cover: Cover, routes: Sequence[Route]) -> Iterator[Cover]:
    """Covers of the first pattern; where only dense ones exist, also of the first that has others.

    In a chain of layers the pattern of the last one joins no two tensors before the others are
    covered.
    """
    found = [after for at, route in enumerate(routes) for after in _by(route, at, cover)]
    if all(after.routes[-1:] == ("dense",) for after in found):
        for at, _ in islice(cover.network.patterns, 1, None):
            turned = cover.turned_to(at)
            numbered = [(n, route) for n, route in enumerate(routes) if route is not dense]
            others = [after for n, route in numbered for after in _by(route, (at, n), turned)]
            if others:
                found += others
                break
    yield from [after for after in found if _repeats(cover, after)] or found


def _by(route: Route, number: Hashable, cover: Cover) -> Iterator[Cover]:
    """The covers of a route: a choice, like those of any other."""
    start = cover.choosing("route", number)
    return _numbered(route(start)) if start.writer.follows else iter(())


def _numbered(covers: Iterable[Cover]) -> Iterator[Cover]:
    return (cover.choosing("cover", number) for number, cover in enumerate(covers))


def _repeats(cover: Cover, after: Cover) -> bool:
    """Whether a mirrored half is covered as the one before was, so that it costs nothing."""
    names = [tensor.name for tensor in after.network.tensors]
    mirrored = len(set(names)) < len(names) and after.writer.steps == cover.writer.steps
    return mirrored and after.routes[-2:-1] == after.routes[-1:]


def finished(
    cover: Cover, form: str, optimize: str, layout: Layout, limit: float = inf
) -> Plan | None:
    """Contract the dense tensors that are left, scale, and write the result's view.

    None stands for a plan whose contraction exceeds a ``limit`` of seconds.
    """
    network, values = cover.network, []
    for at in range(len(network.nodes)):
        cover, value = cover.value(at)
        values.append(value)
    wanted = _in_memory(network.result, layout)
    output = [leg for leg in wanted if network.holders[leg]]
    loose = [leg for leg in network.sizes if not network.holders[leg]]
    scale = network.scale * prod(
        network.sizes[leg] for leg in loose if leg not in network.open_legs
    )
    how = output, network.sizes, scale, optimize, limit
    if (contracted := _contract_scaled(cover.writer, values, *how)) is None:
        return None
    writer, value = contracted
    writer, result = write(writer, value, network.result, network.sizes)
    writer, result = laid_out(writer, result, layout)
    return Plan(form, cover.routes, writer.steps, result, writer.choices)


def _in_memory(result: View, layout: Layout) -> tuple[Leg, ...]:
    """The legs of a result in the order in which it is to lie in memory."""
    if layout != "channels last":
        return result.legs
    axes, of_dims = iter(result.axes), list[list[Leg]]()
    for size in result.shape:
        legs, found = list[Leg](), 1
        while found != size:
            axis = next(axes)
            legs, found = [*legs, *(leg for leg, _ in axis.terms)], found * axis.size
        of_dims.append(legs)
    moved = [leg for dim in layouts.channels_moved(len(of_dims)) for leg in of_dims[dim]]
    return tuple(dict.fromkeys([*moved, *result.legs]))  # of one position: in any order


def laid_out(writer: Writer, array: Strided, layout: Layout) -> tuple[Writer, Strided]:
    """The array in a layout: a copy, unless it lies so."""
    there = array.channels_moved() if layout == "channels last" else array
    if layout == "any" or there.run == there.size:
        return writer, array
    kernel = cost.copy(there.size, *there.innermost)
    writer, there = writer.run(CONTIGUOUS, [there], there.shape, kernel)
    return writer, there.channels_moved(back=True) if layout == "channels last" else there


def _contract_scaled(
    writer: Writer,
    values: list[Value],
    output: list[Leg],
    sizes: Sizes,
    scale: Fraction,
    optimize: str,
    limit: float,
) -> tuple[Writer, Value] | None:
    """Contract, and scale the result; a half of a square that is smaller takes the scale's root."""
    if not values:
        return _scaled(writer, Value(ONE, ()), scale)
    if len(values) == 2:
        a, b = values
        writer, a = sum_out(writer, a, {*output, *b.legs})
        writer, b = sum_out(writer, b, {*output, *a.legs})
        values = [a, b]
    if len(values) == 2 and values[0].array is values[1].array:
        size = prod(values[0].array.shape)
        small = scale > 0 and size < prod(sizes[leg] for leg in output)
        writer, small = writer.deciding("scaled half", small)
        if small:
            writer, half = _scaled(writer, values[0], sqrt(scale))
            values = [Value(half.array, value.legs) for value in values]
            scale = Fraction(1)
    if (contracted := contract(writer, values, output, sizes, optimize, limit)) is None:
        return None
    return _scaled(*contracted, scale)


def _scaled(writer: Writer, value: Value, scale: Fraction | float) -> tuple[Writer, Value]:
    if scale == 1:
        return writer, value
    kernel = cost.elementwise(value.array.size, value.array.size)
    kernel = replace(kernel, scratch=NUMBER)
    comment = f"scale {scale}" if isinstance(scale, Fraction) else f"root of scale {scale**2:.6g}"
    array = value.array
    strides = layouts.of_entries(array.shape, [array.strides])
    call = SCALE, [array], array.shape, kernel, comment, (float(scale),)
    writer, array = writer.run(*call, strides)
    return writer, Value(array, value.legs)
