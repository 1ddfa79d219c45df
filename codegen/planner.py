"""The planner: enumerate covers of a network's forms, price them, take the cheapest."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from math import inf

from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.finish import with_scaled_operand
from tnconv.codegen.lowering.forms import POLYPHASE
from tnconv.codegen.lowering.layouts import Layout
from tnconv.codegen.lowering.nested import Nest, nested, same_tensors
from tnconv.codegen.lowering.plans import Plan
from tnconv.codegen.lowering.ranking import ranked
from tnconv.codegen.lowering.turns import held
from tnconv.codegen.lowering.writer import Choices
from tnconv.codegen.prices import cost
from tnconv.codegen.routes.box_sums import pooling
from tnconv.codegen.routes.dense import dense
from tnconv.codegen.routes.displacement import displacement
from tnconv.codegen.routes.hadamard import multiplied
from tnconv.codegen.routes.late_sums import late_sums
from tnconv.codegen.routes.loops import Loop, inner_loops, loops
from tnconv.codegen.routes.native import native
from tnconv.codegen.routes.patch_products import patch_products
from tnconv.codegen.routes.pixel_gram import pixel_gram
from tnconv.codegen.routes.taps import taps
from tnconv.codegen.routes.window import window
from tnconv.codegen.search import UNLIMITED, Room, Routes, Search
from tnconv.diagrams.network import TensorNetwork


def looped(
    cover: Cover,
    routes: Routes | None = None,
    pairs: bool = False,
    most: Callable[[], float] = lambda: inf,
) -> Iterator[Cover]:
    """Loops over a leg along which the network separates: one position of it at a time.

    For each leg there are up to two covers: the cheapest, and the cheapest by native kernels alone,
    which is what torch itself would do. Where what two turns hold leaves the caches, squares are
    summed in a loop within, if that is possible.

    Args:
        cover: The whole network.
        routes: The routes for the network of one position: by default all. Displacement is left
            out, since what it shares within a sample it shares among all samples as well, and dense
            patterns unless nothing else is found at all.
        pairs: Whether products of two tensors are looped as well: see `loops`.
        most: Tells the seconds beyond which a loop is left out.
    """
    every = ROUTES if routes is None else routes
    inside = {name: each for name, each in every.items() if each not in (looped, displacement)}
    for loop in loops(cover, pairs):
        bodies: list[Plan] = []
        each = most() / cover.network.sizes[loop.leg]
        Search({name: inside[name] for name in inside if name != "dense"}).add(
            bodies, loop.body, "body", each
        )
        if not bodies and each == inf:
            Search(inside).add(bodies, loop.body, "body", each)
        natively = [plan for plan in bodies if {*plan.routes} == {"native"}]
        kinds = [kind for kind in (bodies, natively) if kind]
        best = [min(kind, key=lambda plan: plan.risk * plan.seconds) for kind in kinds]
        if not bodies or any(held(p.steps, p.output.size) > cost.cached() for p in best):
            squares = _squares(loop, bodies, inside, each)
            best = sorted(squares, key=lambda plan: plan.risk * plan.seconds)[:1] or best
        for body in dict.fromkeys(best):
            yield loop.around(body.steps, body.output, body.routes, body.choices)


def _squares(loop: Loop, bodies: Sequence[Plan], routes: Routes, most: float) -> list[Plan]:
    """Plans of one position that sum squares in a loop of their own, beside others.

    Torch's own kernels would unfold the sample again for every square.
    """
    found: list[Plan] = []
    for inner in inner_loops(loop.body):
        if not inner.cover.writer.follows:
            continue
        turns: list[Plan] = []
        usual = {name: routes[name] for name in routes if name not in ("dense", "native")}
        search = Search(usual)
        bound = min(most, search.bound(bodies))
        search.add(turns, inner.body, "body", bound / loop.cover.network.sizes[inner.leg])
        for turn in turns:
            around = inner.around(turn.steps, turn.output, turn.routes, turn.choices)
            search.add(found, around, "body", bound)
    return found


def summed_late(cover: Cover, routes: Routes) -> Iterator[Cover]:
    """Sums over samples that are computed last, after the result for each sample.

    Every plan for the results per sample gives a cover: another network may need those results,
    and which plan it shares is chosen later.
    """
    search = Search(routes, layout="any", several=True)
    for late in late_sums(cover):
        bodies: list[Plan] = []
        plain, turned = (late.body.choosing("late", name) for name in ("plain", "loop"))
        for each in (plain, *(looped(turned, routes) if turned.writer.follows else ())):
            search.add(bodies, each, "body")
        yield from map(late.after, dict.fromkeys(bodies))


ROUTES: Routes = {
    "native": native,
    "pooling": pooling,
    "window": window,
    "pixel gram": pixel_gram,
    "taps": taps,
    "displacement": displacement,
    "patch gram": patch_products,
    "loop": looped,
    "dense": dense,
}


def plans(
    forms: Mapping[str, TensorNetwork],
    positions: Mapping[str, int],
    routes: Sequence[str] = tuple(ROUTES),
    optimize: str = "auto",
    layout: Layout = "contiguous",
    room: Room = UNLIMITED,
    several: bool = False,
    order: Nest | None = None,
    script: Choices = (),
    channels_last: Collection[str] = (),
) -> list[Plan]:
    """Every complete plan that was not pruned, the chosen one first.

    One native kernel for the whole network is kept unless another plan is predicted to be clearly
    faster, because its time is known better than any prediction. Plans that do not fit come last,
    and prune no others.

    Args:
        forms: The forms of the network, by name.
        positions: The positions of the operands in a call.
        routes: The names of the routes that may be used.
        optimize: The path search, as for `compile`.
        layout: How the result is to lie in memory.
        room: The memory that a plan may hold.
        several: Whether it is one of several networks. Then loops and late sums are planned as
            well, which pay if other networks need the same products.
        order: An order of contraction that is forced on all forms.
        script: The choices of a plan for other sizes. They are followed, and the result is that
            plan alone, or nothing if it does not fit these sizes.
        channels_last: The operands that are in this memory format.
    """
    found: list[Plan] = []
    if order is not None:
        ordered = Search(_named(routes), optimize, layout, room)
        _add_in_order(found, forms, positions, ordered, order)
    for form, network in forms.items() if not found else ():
        if script and script[0] != ("form", form):
            continue
        rewritten = form == POLYPHASE and len(forms) > 1
        tried = _named(_of_polyphase(routes) if rewritten else routes)
        alone = "displacement" if rewritten else ""
        search = Search(tried, optimize, layout, room, several, alone)
        given = Cover.of(network, positions, script, channels_last).choosing("form", form)
        again = form == "as given" and "in form N" in forms
        _add_form(found, given, form, search, "loop" in routes and not again, not again)
    return found if script else ranked(found, forms, room.fits)


def _of_polyphase(routes: Sequence[str]) -> list[str]:
    """Displacement first, and no dense patterns.

    Where it applies nothing else is tried: windows of this form are no smaller than as given.
    """
    some = [name for name in routes if name != "dense"]
    return sorted(some, key=lambda name: name != "displacement")


def _named(routes: Sequence[str]) -> Routes:
    """The routes of these names that cover patterns: all but loops."""
    return {name: ROUTES[name] for name in routes if name != "loop"}


def _add_form(
    found: list[Plan], given: Cover, form: str, search: Search, in_loops: bool, late: bool
) -> None:
    """Add the plans for one form of a network: as it is, in loops, and with late sums."""
    several = search.several
    start = multiplied(given)
    start = start if several else with_scaled_operand(start)
    plain, turned, summed = (start.choosing("start", name) for name in ("plain", "loop", "late"))

    def most() -> float:
        return inf if several else search.bound(found)

    in_loops = in_loops and turned.writer.follows
    turns = looped(turned, search.routes, several, most) if in_loops else ()
    late = late and several and summed.writer.follows
    sums = summed_late(summed, search.routes) if late else ()
    for covers in ((plain,), turns, sums):
        known = [] if several else found  # what is slow by itself may be shared
        for cover in covers:
            search.add(known, cover, form)
        found += known if several else ()


def _add_in_order(
    found: list[Plan],
    forms: Mapping[str, TensorNetwork],
    positions: Mapping[str, int],
    search: Search,
    order: Nest,
) -> None:
    """Add plans for a forced order, of the forms that have all tensors as they are given."""

    def inner(cover: Cover, route: str | None) -> Plan:
        plans: list[Plan] = []
        only = {name: each for name, each in search.routes.items() if name == route}
        for routes in (only, search.routes):
            if not plans:
                inside = Search(routes, search.optimize, layout="any")
                inside.add(plans, multiplied(cover), "part")
        fits = search.room.fits
        return min(plans, key=lambda plan: (not fits(plan), plan.risk * plan.seconds))

    given = next(iter(forms.values()))
    for form, network in forms.items():
        if same_tensors(network, given) and not network.indices:
            cover = nested(Cover.of(network, positions), order, inner)
            search.add(found, multiplied(cover), form)
