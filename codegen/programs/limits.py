"""Memory limits: plans that fit together, or networks that are computed in turn and in chunks."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import islice, product

from tnconv.codegen.programs.chunks import chunked, whole
from tnconv.codegen.programs.program import Program, together
from tnconv.diagrams.errors import TooLittleMemory
from tnconv.diagrams.expression import Expression

MOST_CHOICES = 64  # combinations of plans that are tried for a limit (0023)


def leaner(program: Program, item: int, limit: int) -> Program:
    """The fastest combination of the terms' plans that fits, else the leanest.

    Args:
        program: The program without a limit.
        item: Bytes of an entry.
        limit: The bytes that a call may hold.
    """
    few = [
        dict.fromkeys((*plans[:3], min(plans, key=lambda plan: plan.peak_of(item))))
        for plans in program.terms
    ]
    ways = [program.taking(choice) for choice in islice(product(*few), MOST_CHOICES)]
    ways.append(program.taking([list(plans)[-1] for plans in few]))
    fitting = [way for way in ways if way.schedule.peak(item) <= limit]
    if fitting:
        return min(fitting, key=lambda way: way.schedule.seconds)
    return min(ways, key=lambda way: way.schedule.peak(item))


def in_turn(
    program: Program, item: int, limit: int, plan: Callable[[Expression, int], Program]
) -> Program:
    """The networks one after the other, in chunks where one does not fit; their results are held.

    Args:
        program: The program without chunks.
        item: Bytes of an entry.
        limit: The bytes that a call may hold.
        plan: The planner: from a network and its limit to a program as lean as it can be.

    Raises:
        ValueError: that still exceeds the limit.
    """
    build = cache(plan)
    chunks, held = [], 0
    for network in program.networks:
        left = limit - held
        ways = [whole(build(network, left))]
        if ways[0].peak(item)[0] > left:
            ways.append(chunked(network, left, item, build))
        fitting = [way for way in ways if way.peak(item)[0] <= left]
        least = min(ways, key=lambda way: way.peak(item)[0])
        chunks.append(min(fitting, key=lambda way: way.seconds) if fitting else least)
        held += chunks[-1].peak(item)[1]
    if (least_peak := together([chunk.peak(item) for chunk in chunks])) > limit:
        raise TooLittleMemory(
            f"memory_limit is {limit} bytes; the least that would do is {least_peak} bytes",
            least_peak,
        )
    return replace(program, terms=(), chunks=tuple(chunks))
