"""Contraction of dense values along the best path."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import product
from math import inf, prod

from tnconv.codegen.lowering.exhaustive import best_path
from tnconv.codegen.lowering.greedy import greedy_path
from tnconv.codegen.lowering.matrices import least_seconds
from tnconv.codegen.lowering.pairs import pair, sum_out
from tnconv.codegen.lowering.paths import RANDOM, Path, searched
from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.lowering.writer import Writer
from tnconv.codegen.prices import cost
from tnconv.diagrams.affine import Leg, Sizes
from tnconv.diagrams.network import TensorNetwork

SEARCHES = ("auto", "optimal", "dp")  # of the order of contractions, for `compile`
GREEDY = "greedy"  # the order that the baseline compiler takes without a search
FEW = 8  # largest number of values whose path is found in a table of their subsets
EXHAUSTIVE = 12  # largest number of values for which the search is exhaustive
PROGRAMMED = 24  # largest number for dynamic programming, which takes seconds from 60 values on


def contraction_path(
    inputs: Sequence[Sequence[Leg]], output: Sequence[Leg], sizes: Sizes, optimize: str = "auto"
) -> tuple[tuple[int, ...], ...]:
    """Which values to contract in turn: positions in a list that loses them and gains the product.

    ``optimize`` is ``"optimal"`` (exhaustive: up to 8 values by a table of their subsets, else by
    cotengra), ``"dp"`` (opt_einsum's dynamic programming), or ``"auto"``: the former up to 12
    values, the latter up to 24, and beyond that the best of some random greedy orders, improved
    part by part.

    Raises:
        ValueError: another ``optimize``.
    """
    path = _path_within(inputs, output, sizes, optimize, inf)
    assert path is not None
    return path


def _path_within(
    inputs: Sequence[Sequence[Leg]],
    output: Sequence[Leg],
    sizes: Sizes,
    optimize: str,
    most: float,
) -> Path | None:
    """The path as in `contraction_path`; None for few values if it has ``most`` multiplications."""
    if optimize not in SEARCHES:
        raise ValueError(f"optimize is {optimize!r}; expected 'auto', 'optimal' or 'dp'")
    if len(inputs) < 3:
        return (tuple(range(len(inputs))),)
    number: dict[Leg, int] = {}
    for leg in (leg for legs in (*inputs, output) for leg in legs):
        number.setdefault(leg, len(number))
    numbered = (
        tuple([tuple([number[leg] for leg in legs]) for legs in inputs]),
        tuple([number[leg] for leg in output]),
        tuple([sizes[leg] for leg in number]),
    )
    if len(inputs) <= FEW and optimize != "dp":
        return best_path(*numbered, most)
    return searched(*numbered, _for_many(len(inputs)) if optimize == "auto" else optimize)


def _for_many(values: int) -> str:
    if values <= EXHAUSTIVE:
        return "optimal"
    return "dp" if values <= PROGRAMMED else RANDOM


def path_flops(network: TensorNetwork) -> int:
    """The flops of the best pairwise path if every pattern were a dense array: what rules save.

    >>> from tnconv.diagrams import linear
    >>> path_flops(linear((8, 3), (4, 3)))
    192
    """
    left = [frozenset(node.legs) for node in network.nodes]
    output = frozenset(leg for leg in network.result.legs if network.holders[leg])
    flops = 0
    path = contraction_path([sorted(legs) for legs in left], sorted(output), network.sizes)
    for positions in path if left else ():
        met = frozenset().union(*(left[at] for at in positions))
        left = [legs for at, legs in enumerate(left) if at not in positions]
        left.append(met & output.union(*left))
        flops += 2 * prod(network.sizes[leg] for leg in met)
    return flops


def contract(
    writer: Writer,
    values: Sequence[Value],
    output: Sequence[Leg],
    sizes: Sizes,
    optimize: str = "auto",
    limit: float = inf,
) -> tuple[Writer, Value] | None:
    """``Σ Π values`` over all legs but ``output``, pair by pair along the best path.

    Where the values are two mirrored halves, contracting each half to one value first is tried as
    well. None stands for a contraction that takes longer than the ``limit`` in seconds, all steps
    so far included.

    Args:
        writer: The steps so far.
        values: The dense values.
        output: The legs of the result.
        sizes: The size of each leg.
        optimize: The path search, or `GREEDY`.
        limit: The most seconds of all steps.
    """
    how = output, sizes, optimize
    if optimize == GREEDY or len(values) < 4 or (halves := _halves(values)) is None:
        return _along_path(values, *how, limit, writer)
    given, found = writer.scripted("halves"), None
    if given != 0:
        found = _by_halves(halves, *how, limit, writer.choosing("halves", 1))
    if given != 1:  # no slower than by halves, which bounds the search for a path
        limit = limit if found is None else min(limit, found[0].seconds)
        found = _along_path(values, *how, limit, writer.choosing("halves", 0)) or found
    return found


def _by_halves(
    halves: tuple[list[Value], list[Value]],
    output: Sequence[Leg],
    sizes: Sizes,
    optimize: str,
    limit: float,
    writer: Writer,
) -> tuple[Writer, Value] | None:
    made = []
    for half, other in (halves, halves[::-1]):
        needed = {*output, *_legs(other)}
        kept = [leg for leg in dict.fromkeys(_legs(half)) if leg in needed]
        later = {*kept} - {*output}
        if (found := _along_path(half, kept, sizes, optimize, limit, writer, later)) is None:
            return None
        writer, value = found
        made.append(value)
    writer, value = pair(writer, made[0], made[1], output, output, limit=limit)
    return None if writer.seconds > limit else (writer, value)


def _legs(values: Sequence[Value]) -> Iterator[Leg]:
    return (leg for value in values for leg in value.legs)


def _halves(values: Sequence[Value]) -> tuple[list[Value], list[Value]] | None:
    """Two halves of a network of the same arrays that differ by an exchange of some legs."""
    twins: dict[Strided, list[Value]] = defaultdict(list)
    for value in values:
        twins[value.array].append(value)
    first, *others = twins.values()
    if any(len(two) != 2 for two in (first, *others)):
        return None
    for turns in product((1, -1), repeat=len(others)):
        pairs = [first, *(two[::turn] for two, turn in zip(others, turns, strict=True))]
        one, other = [two[0] for two in pairs], [two[1] for two in pairs]
        exchange = set(zip(_legs(one), _legs(other), strict=True))
        shared = {*_legs(one)} & {*_legs(other)}
        if len(exchange) == len({*_legs(one)}) and all((leg, leg) in exchange for leg in shared):
            return one, other
    return None


def _along_path(
    values: Sequence[Value],
    output: Sequence[Leg],
    sizes: Sizes,
    optimize: str,
    limit: float,
    writer: Writer,
    later: Collection[Leg] = (),
) -> tuple[Writer, Value] | None:
    left = list(values)
    if (path := _path(writer, values, output, sizes, optimize, limit)) is None:
        return None
    writer = writer.choosing("path", path)
    for positions in path:
        chosen = [left[at] for at in positions]
        left = [value for at, value in enumerate(left) if at not in positions]
        needed = {*output, *(leg for value in left for leg in value.legs)}
        made = chosen[0]
        for other in chosen[1:]:
            how = needed, output, optimize != GREEDY, later, limit
            writer, made = pair(writer, made, other, *how)
            if writer.seconds > limit:
                return None
        writer, made = sum_out(writer, made, needed)
        if writer.seconds > limit:
            return None
        left.append(made)
    return writer, left[0]


def _path(
    writer: Writer,
    values: Sequence[Value],
    output: Sequence[Leg],
    sizes: Sizes,
    optimize: str,
    limit: float,
) -> Path | None:
    """The path of a script, or the best one; None if its products alone exceed the limit."""
    path: Path | None = writer.scripted("path")
    if path is None:
        legs = [value.legs for value in values]
        if optimize == GREEDY:
            path = greedy_path(legs, output, sizes)
        else:
            share = 2 if _may_repeat(values) else 1
            most = share * (limit - writer.seconds) / cost.least_product(2)
            path = _path_within(legs, output, sizes, optimize, most)
    if path is None or limit == inf:
        return path
    return None if writer.seconds + _least(path, values, output, sizes) > limit else path


def _may_repeat(values: Sequence[Value]) -> bool:
    """Whether products may be computed for two mirrored halves at once, or be symmetric."""
    twins: dict[Strided, list[Value]] = defaultdict(list)
    for value in values:
        twins[value.array].append(value)
    joined = any({*_legs(two[:1])} & {*_legs(two[1:])} for two in twins.values())
    return joined or sum(len(two) // 2 for two in twins.values()) > 1


def _least(
    path: Sequence[Sequence[int]], values: Sequence[Value], output: Sequence[Leg], sizes: Sizes
) -> float:
    """A lower bound of the seconds of all matrix products along a path.

    Those of the same values may be mirrored halves, which are computed once.
    """
    left: list[tuple[frozenset[Leg], tuple[int, ...]]]
    left = [(frozenset(value.legs), (id(value.array),)) for value in values]
    least: dict[tuple[int, ...], float] = {}
    for positions in path:
        (first, made), *others = (left[at] for at in positions)
        left = [each for at, each in enumerate(left) if at not in positions]
        for other, by in others:
            needed = (
                frozenset(output).union(*(legs for legs, _ in left))
                if len(others) == 1
                else frozenset(sizes)
            )
            one, two = first & (needed | other), other & (needed | first)
            shared, both = one & two, tuple(sorted(made + by))
            if one != two and not shared <= needed:
                batch, rows, summed, columns = (
                    prod([sizes[leg] for leg in legs])
                    for legs in (shared & needed, one - two, shared - needed, two - one)
                )
                mirrored = sorted(made) == sorted(by)
                seconds = least_seconds(batch, rows, summed, columns, mirrored)
                least[both] = max(seconds, least.get(both, 0.0))
            first, made = (one | two) & needed, both
        left.append((first, made))
    return sum(least.values())
