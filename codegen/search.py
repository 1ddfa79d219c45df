"""The search: a network's patterns are covered by routes, depth first, which gives plans."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import inf

from tnconv.codegen.lowering.covers import Cover, Route
from tnconv.codegen.lowering.finish import finished
from tnconv.codegen.lowering.layouts import Layout
from tnconv.codegen.lowering.plans import Plan, risk_of
from tnconv.codegen.lowering.schedule import need
from tnconv.codegen.lowering.selections import opened, scatter, selected
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.lowering.writer import Step
from tnconv.codegen.prices import cost

HOPELESS = 2.0  # a cover that costs this multiple of a complete plan is not continued (0001)
Routes = Mapping[str, Route]


@dataclass(frozen=True)
class Room:
    """The bytes that a plan may hold, for entries of ``item`` bytes; without a limit all fit.

    If it is ``shared`` with other terms, plans that hold less are of use even where one fits.
    """

    limit: int | None = None
    item: int = cost.ITEM
    shared: bool = False

    def fits(self, plan: Plan) -> bool:
        return self.limit is None or plan.peak_of(self.item) <= self.limit

    def too_small(self, steps: Sequence[Step], found: Sequence[Plan]) -> bool:
        """Whether a plan that begins with these steps can neither fit nor be the leanest so far."""
        if self.limit is None:
            return False
        least = max((need(step, self.item) for step in steps), default=0)
        return least > self.limit and any(plan.peak_of(self.item) <= least for plan in found)


UNLIMITED = Room()


@dataclass(frozen=True)
class Search:
    """How plans are searched for: by which routes, and within which bounds.

    Args:
        routes: The routes that may be used, by name.
        optimize: The path search, as for `compile`.
        layout: How the result is to lie in memory.
        room: The memory that a plan may hold.
        several: Whether the network is one of several, which may share its steps.
        alone: A route after which no other one is tried, where it covers a pattern.
    """

    routes: Routes
    optimize: str = "auto"
    layout: Layout = "contiguous"
    room: Room = UNLIMITED
    several: bool = False
    alone: str = ""

    def add(self, found: list[Plan], cover: Cover, form: str, most: float = inf) -> None:
        """Add to ``found`` the plans that continue a cover: depth first, and pruned by seconds.

        A cover is given up if its steps take longer than ``most`` seconds or `HOPELESS` times the
        best plan so far, both times their risk, or if they do not fit into the room and a leaner
        plan is known. The contraction at the end of a plan for one of several networks is not
        pruned, since others may share it.
        """
        most, writer = min(most, self.bound(found)), cover.writer
        limit = most / risk_of(cover.routes)
        if writer.seconds > limit or self.room.too_small(writer.steps, found) or not writer.follows:
            return
        if cover.selection is None and cover.pattern is None:
            limit = inf if self.several or self.room.shared else limit
            plan = finished(cover, form, self.optimize, self.layout, limit)
            found += [] if plan is None else [plan]
            return
        covers = (
            self._covered(cover, lambda: min(most, self.bound(found)))
            if cover.selection is None
            else self._selected(cover)
        )
        for after in covers:  # bounds tighten from one to the next
            self.add(found, after, form, most)

    def bound(self, found: Sequence[Plan]) -> float:
        """The seconds of steps beyond which a cover is hopeless, beside these plans."""
        fitting = (plan.risk * plan.seconds for plan in found if self.room.fits(plan))
        return HOPELESS * min(fitting, default=inf)

    def _selected(self, cover: Cover) -> Iterator[Cover]:
        """Covers of the first selection."""
        both = selected(cover.choosing("scatter", False)), self._scattered(cover)
        return _numbered(chain.from_iterable(both))

    def _scattered(self, cover: Cover) -> Iterator[Cover]:
        """The slices of an open leg that a selection lists: computed alone, then put in place."""
        if (found := opened(cover)) is None:
            return
        one, body = found
        slices: list[Plan] = []
        body = body.choosing("scatter", True)
        Search(self.routes, layout="any").add(slices, body, "body")
        if not slices and body.writer.script:
            return
        best = min(slices, key=lambda plan: plan.risk * plan.seconds)
        writer = replace(cover.writer, steps=best.steps, choices=best.choices)
        yield scatter(one, writer, Value(best.output, body.network.result.legs))

    def _covered(self, cover: Cover, most: Callable[[], float]) -> Iterator[Cover]:
        """Covers of the first pattern; if only dense ones exist, also of the first with others.

        In a chain of layers the pattern of the last one joins no two tensors before the others are
        covered. The second half of a Gram network is covered as the first one was. ``most`` tells
        the seconds beyond which covers are given up.
        """
        used = cover.routes[-1] if cover.routes else ""
        by_used = self._by(used, cover, most()) if used in self.routes else []
        if repeated := [after for after in by_used if _repeats(cover, after)]:
            yield from repeated
            return
        only_dense = True
        for name in self.routes:
            found = by_used if name == used else self._by(name, cover, most())
            only_dense &= all(after.routes[-1:] == ("dense",) for after in found)
            yield from found
            if found and name == self.alone:
                return
        if only_dense:
            yield from self._of_other_patterns(cover, most)

    def _of_other_patterns(self, cover: Cover, most: Callable[[], float]) -> Iterator[Cover]:
        """Covers of the first pattern, after the very first, that others than dense ones cover."""
        names = [name for name in self.routes if name != "dense"]
        for at, _ in islice(cover.network.patterns, 1, None):
            turned = cover.choosing("first", at).turned_to(at)
            if others := [after for name in names for after in self._by(name, turned, most())]:
                yield from others
                return

    def _by(self, name: str, cover: Cover, most: float) -> list[Cover]:
        """The covers that a route gives, the cheapest first. The route is recorded as a choice."""
        start = replace(cover.choosing("route", name), most=most)
        covers = _numbered(self.routes[name](start)) if start.writer.follows else ()
        return sorted(covers, key=lambda after: after.writer.seconds)


def _repeats(cover: Cover, after: Cover) -> bool:
    """Whether a cover adds no steps: the second half of a Gram network, by those of the first."""
    names = [tensor.name for tensor in after.network.tensors]
    return len({*names}) < len(names) and after.writer.steps == cover.writer.steps


def _numbered(covers: Iterable[Cover]) -> Iterator[Cover]:
    return (cover.choosing("cover", number) for number, cover in enumerate(covers))
