"""Contraction paths: searched for once, remembered in memory, and long searches on disk."""

from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version

from tnconv.codegen.lowering.greedy import greedy_flops
from tnconv.codegen.prices import store
from tnconv.codegen.prices.store import Json

KIND = "paths"
KEPT = 2**14  # paths in memory
ON_DISK_FROM = 9  # values: searches among fewer take less time than files
RANDOM = "random"  # for many values: the best of several greedy orders is improved
SUBTREE = 8  # number of values whose order is improved at a time
SWEEPS = 4  # passes over the whole tree: chains of 60 and 120 are then within 1 % of the best order
Numbers = tuple[int, ...]
Path = tuple[Numbers, ...]


@lru_cache(maxsize=KEPT)
def searched(
    inputs: tuple[Numbers, ...], output: Numbers, sizes: Numbers, optimize: str
) -> tuple[Numbers, ...]:
    """The best path, by ``optimize``: legs are numbers, in the order in which they are met.

    The numbers make it independent of names and of what is stored: always the same path.
    """
    if len(inputs) < ON_DISK_FROM:
        return _search(inputs, output, sizes, optimize)
    key: dict[str, Json] = {
        "finders": [version("cotengra"), version("opt_einsum")],
        "inputs": [list(legs) for legs in inputs],
        "output": list(output),
        "sizes": list(sizes),
        "optimize": optimize,
    }
    if (value := store.load(KIND, key)) is not None:
        if (path := _valid(value, len(inputs))) is not None:
            return path
        store.ignored(KIND, key)
    path = _search(inputs, output, sizes, optimize)
    store.save(KIND, key, [list(positions) for positions in path])
    return path


def _search(inputs: tuple[Numbers, ...], output: Numbers, sizes: Numbers, optimize: str) -> Path:
    import cotengra  # takes a while, which programs without a search need not wait for
    import opt_einsum

    names = [[chr(ord("a") + leg) for leg in legs] for legs in (*inputs, output)]
    sized = {chr(ord("a") + leg): size for leg, size in enumerate(sizes)}
    path: Sequence[Sequence[int]]
    if optimize == "dp":
        sets = [frozenset(legs) for legs in names[:-1]]
        search = opt_einsum.DynamicProgramming(minimize="flops")
        path = search(sets, frozenset(names[-1]), sized, None)
    elif optimize == RANDOM:
        many = cotengra.RandomGreedyOptimizer(seed=0, accel=False, parallel=False)
        tree = cotengra.array_contract_tree(
            [tuple(legs) for legs in names[:-1]], tuple(names[-1]), sized, optimize=many
        )
        for seed in range(SWEEPS):
            how = {"select": "random", "minimize": "flops", "seed": seed}
            tree.subtree_reconfigure_(subtree_size=SUBTREE, **how)
        path = tree.get_path()
    else:
        # the search begins with paths of at most 2 flops, and begins again with twice as many
        cap = greedy_flops(inputs, output, dict(enumerate(sizes)))
        tree = cotengra.array_contract_tree(
            [tuple(legs) for legs in names[:-1]],
            tuple(names[-1]),
            sized,
            optimize=cotengra.OptimalOptimizer(minimize="flops", cost_cap=cap),
        )
        path = tree.get_path()
    return tuple(tuple(pair) for pair in path)


def _valid(value: Json, count: int) -> Path | None:
    """The path, if it is one: positions in a list that ends with one value."""
    if not isinstance(value, list):
        return None
    path = []
    for positions in value:
        if not isinstance(positions, list) or len(positions) < 2:
            return None
        numbers = tuple(at for at in positions if type(at) is int and 0 <= at < count)
        if len(set(numbers)) < len(positions):
            return None
        path.append(numbers)
        count -= len(numbers) - 1
    return tuple(path) if count == 1 else None
