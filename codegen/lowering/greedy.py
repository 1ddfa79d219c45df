"""Greedy contraction paths: without a search, and an upper bound for one."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import TypeVar

L = TypeVar("L", bound=Hashable)  # a leg, or its number


def greedy_path(
    inputs: Sequence[Sequence[L]], output: Sequence[L], sizes: Mapping[L, int]
) -> tuple[tuple[int, ...], ...]:
    """A path that always contracts two neighbours with the smallest product.

    >>> greedy_path(["ij", "jk", "kl"], "il", {"i": 8, "j": 8, "k": 8, "l": 2})
    ((1, 2), (0, 1))
    """
    return _greedy(inputs, output, sizes)[0]


def greedy_flops(inputs: Sequence[Sequence[L]], output: Sequence[L], sizes: Mapping[L, int]) -> int:
    """The multiplications along the greedy path: the best path takes no more.

    >>> greedy_flops(["ij", "jk", "kl"], "il", {"i": 8, "j": 8, "k": 8, "l": 2})
    256
    """
    return _greedy(inputs, output, sizes)[1]


def _greedy(
    inputs: Sequence[Sequence[L]], output: Sequence[L], sizes: Mapping[L, int]
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """The path, and its multiplications."""
    if len(inputs) < 3:
        return (tuple(range(len(inputs))),), _size(set().union(*inputs), sizes)
    left, path, flops = [frozenset(legs) for legs in inputs], [], 0
    while len(left) > 1:
        held = Counter(leg for legs in (*left, frozenset(output)) for leg in legs)
        made = {pair: _product_legs(left, pair, held) for pair in _neighbours(left)}
        best = min(made, key=lambda pair: _size(made[pair], sizes))
        flops += _size(left[best[0]] | left[best[1]], sizes)
        path.append(best)
        left = [*(legs for at, legs in enumerate(left) if at not in best), made[best]]
    return tuple(path), flops


def _size(legs: frozenset[L] | set[L], sizes: Mapping[L, int]) -> int:
    return prod([sizes[leg] for leg in legs])


def _neighbours(left: Sequence[frozenset[L]]) -> list[tuple[int, int]]:
    """Pairs of values that hold one leg, next to each other among its holders; or any pair."""
    holders: dict[L, list[int]] = defaultdict(list)
    for at, legs in enumerate(left):
        for leg in legs:
            holders[leg].append(at)
    found = dict.fromkeys(pair for held in holders.values() for pair in pairwise(held))
    return sorted(found) or [(0, 1)]


def _product_legs(
    left: Sequence[frozenset[L]], pair: tuple[int, int], held: Counter[L]
) -> frozenset[L]:
    """The legs of two values that others, or the result, hold as well."""
    first, second = (left[at] for at in pair)
    return frozenset(leg for leg in first | second if held[leg] > (leg in first) + (leg in second))
