"""Fitting: the coefficients with which prices of probes are their times."""

from collections.abc import Mapping
from math import isfinite, sqrt

from tnconv.codegen.prices.kinds import Coefficient, every_coefficient
from tnconv.codegen.prices.tables import Table

SWEEPS = 12
HALVINGS = 40  # of a range of values, on a logarithmic scale
CLOSE = 1e-6  # relative difference of price and time at which a coefficient stays
MOST_MISS = 2.0  # a probe is refused if its fitted price is more than this factor off its time
WITHIN = 8.0  # times smaller or larger than where it starts: no coefficient is fitted beyond (0011)


def visible(table: Table, one: Coefficient) -> bool:
    """Whether the price of its probe depends on a coefficient, on this table's machine.

    Sizes of the machine can turn a term off: accelerators take no new pages, for instance.
    """
    low, high = (one.probe.seconds(table.changed({one.name: bound})) for bound in one.bounds)
    return low != high


def fitted(start: Table, times: Mapping[str, float]) -> tuple[Table, dict[str, str]]:
    """The table in which every probe's price is its time, and why probes were refused.

    ``times`` are seconds by the coefficient's name. Prices contain other coefficients as well, so
    each is found several times in turn, at most a factor of `WITHIN` from its value in ``start``:
    a probe whose time the other coefficients explain already does not determine its own, which
    would go to where its term takes no time, and large kernels be priced without it. What failed,
    or has a price far from its time even so, is refused: then ``start`` keeps its value, and the
    others are found without it.
    """
    refused = {name: "it failed" for name, t in times.items() if not (isfinite(t) and t > 0)}
    known = {one.name: one for one in every_coefficient()}
    ranges = {name: _range(one, start.value(name)) for name, one in known.items()}
    while True:
        left = {known[name]: t for name, t in times.items() if name not in refused}
        table = start
        for _ in range(SWEEPS):
            before = table
            for one, seconds in left.items():
                table = _with(table, one, seconds, ranges[one.name])
            if table is before:
                break
        misses = {
            one.name: f"its price is {ratio:.2g} times its time"
            for one, seconds in left.items()
            if not 1 / MOST_MISS <= (ratio := one.probe.seconds(table) / seconds) <= MOST_MISS
        }
        if not misses:
            return table, refused
        refused |= misses


def _range(one: Coefficient, start: float) -> tuple[float, float]:
    """Where a coefficient is looked for: near its start, within its physical bounds."""
    low, high = one.bounds
    return max(low, start / WITHIN), min(high, start * WITHIN)


def _with(table: Table, one: Coefficient, seconds: float, ends: tuple[float, float]) -> Table:
    """With the nearest value of one coefficient for which its probe takes so many seconds.

    By bisection between the value that it has and the end in the direction of these seconds. The
    end is taken if no value between them gives as much, or as little.
    """

    def priced(value: float) -> float:
        return one.probe.seconds(table.changed({one.name: value}))

    near, (low, high) = table.value(one.name), ends
    before = priced(near)
    if abs(before - seconds) <= CLOSE * seconds:
        return table
    rises = before < seconds
    far = high if rises == (priced(high) > priced(low)) else low
    for _ in range(HALVINGS):
        middle = sqrt(near * far)
        reached = priced(middle) * (1 + CLOSE) >= seconds
        if not rises:
            reached = priced(middle) <= seconds * (1 + CLOSE)
        near, far = (near, middle) if reached else (middle, far)
    return table.changed({one.name: sqrt(near * far)})
