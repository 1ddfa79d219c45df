"""The best contraction path of few values: a table over all their subsets."""

from collections.abc import Iterator, Sequence
from math import inf

Numbers = tuple[int, ...]


def best_path(
    inputs: Sequence[Numbers], output: Numbers, sizes: Numbers, most: float = inf
) -> tuple[Numbers, ...] | None:
    """The path with the fewest multiplications, or None if it takes more than ``most``.

    Dynamic programming over subsets of the values (Pfeifer, Haegeman & Verstraete 2014), as in
    cotengra, whose search takes 3 to 10 times as long for few values (decision 0024). Values and
    legs are bits of integers. There are outer products of whole components only.

    >>> best_path([(0, 1), (1, 2), (2, 3)], (0, 3), (8, 8, 8, 2))
    ((1, 2), (0, 1))

    Args:
        inputs: The legs of each value.
        output: The legs of the result.
        sizes: The size of each leg.
        most: The most multiplications.
    """
    table, every = _Table(inputs, output, sizes, most), (1 << len(inputs)) - 1
    for subset in range(1, every + 1):
        table.add(subset)
    return tuple(_positions(table.parts, len(inputs))) if every in table.parts else None


class _Table:
    """What is known of each subset: multiplications, legs, and how it is split in two."""

    def __init__(
        self, inputs: Sequence[Numbers], output: Numbers, sizes: Numbers, most: float
    ) -> None:
        self._inputs, self._sizes, self._most = inputs, sizes, most
        self._holders = [
            sum([1 << at for at, legs in enumerate(inputs) if leg in legs])
            for leg in range(len(sizes))
        ]
        self._output = sum(1 << leg for leg in output)
        self._entries = {0: 1}
        self._flops: dict[int, int] = {}
        self._legs: dict[int, int] = {}
        self._connected: set[int] = set()
        self.parts: dict[int, int] = {}

    def add(self, subset: int) -> None:
        """A subset whose parts were added: the cheapest way to split it, if there is one.

        Parts that share a leg have to be connected themselves.
        """
        if not subset & (subset - 1):
            legs = self._inputs[subset.bit_length() - 1]
            self._put(subset, 0, sum([1 << leg for leg in legs]), connected=True)
        elif (best := self._split(subset)) is not None:
            flops, _, part = best
            self.parts[subset] = part
            one, two = self._legs[part], self._legs[subset ^ part]
            joined = bool(one & two) or not (one and two)  # scalars are connected to everything
            joined = joined and part in self._connected and subset ^ part in self._connected
            self._put(subset, flops, one | two, joined)

    def _put(self, subset: int, flops: int, legs: int, connected: bool) -> None:
        """A subset that holds these legs; those that nothing else holds are summed."""
        left, rest = legs, legs & ~self._output
        while rest:
            low = rest & -rest
            if not self._holders[low.bit_length() - 1] & ~subset:
                left ^= low
            rest ^= low
        self._flops[subset], self._legs[subset] = flops, left
        if connected:
            self._connected.add(subset)

    def _split(self, subset: int) -> tuple[int, int, int] | None:
        """The cheapest split: multiplications, values of the smaller part, and that part."""
        flops, legs, connected, most = self._flops, self._legs, self._connected, self._most
        best: tuple[int, int, int] | None = None
        values, part = subset.bit_count(), (subset - 1) & subset
        while part > (other := subset ^ part):
            if part in flops and other in flops:
                one, two = legs[part], legs[other]
                least = flops[part] + flops[other]
                if least <= most and (not one & two or (part in connected and other in connected)):
                    total = least + self._size(one | two)
                    if total <= most:
                        smaller = part if 2 * part.bit_count() < values else other
                        way = total, smaller.bit_count(), smaller
                        if best is None or way < best:
                            best, most = way, total
            part = (part - 1) & subset
        return best

    def _size(self, legs: int) -> int:
        if (known := self._entries.get(legs)) is None:
            last = legs.bit_length() - 1
            known = self._sizes[last] * self._size(legs ^ (1 << last))
            self._entries[legs] = known
        return known


def _positions(parts: dict[int, int], count: int) -> Iterator[Numbers]:
    """The path of a tree: positions in a list that loses two values and gains their product."""
    left = [1 << at for at in range(count)]

    def contracted(subset: int) -> Iterator[Numbers]:
        if subset in parts:
            one, two = parts[subset], subset ^ parts[subset]
            yield from contracted(one)
            yield from contracted(two)
            pair = sorted((left.index(one), left.index(two)))
            left.remove(one)
            left.remove(two)
            left.append(subset)
            yield tuple(pair)

    yield from contracted((1 << count) - 1)
