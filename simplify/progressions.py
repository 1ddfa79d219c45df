"""Arithmetic of progressions: the values of patterns, and the positions that they leave to legs."""

from math import gcd

from tnconv.diagrams.affine import Leg, Pattern, Sizes, reach


def clip(values: range, low: int, high: int) -> range:
    """The values within [low, high].

    >>> list(clip(range(0, 20, 3), 4, 10))
    [6, 9]
    """
    start, step = values.start, values.step
    first = max(0, -((start - low) // step))
    last = min(len(values) - 1, (high - start) // step)
    return values[first : last + 1] if first <= last else range(0)


def within(start: int, step: int, size: int) -> tuple[int, int]:
    """The least and greatest t with 0 <= start + step·t < size."""
    if step > 0:
        return -(start // step), (size - 1 - start) // step
    return -((size - 1 - start) // -step), start // -step


def quotients(values: range, g: int) -> range:
    """v/g for the values that g divides."""
    common = gcd(values.step, g)
    multiples = [v for v in values[: g // common] if v % g == 0]
    if not multiples:
        return range(0)
    return range(multiples[0] // g, values[-1] // g + 1, values.step // common)


def meet(a: range, b: range) -> range:
    """The common values of two ascending progressions: a progression, by the Chinese remainders.

    >>> list(meet(range(0, 30, 4), range(1, 30, 3)))
    [4, 16, 28]
    """
    if not a or not b:
        return range(0)
    g = gcd(a.step, b.step)
    shift, odd = divmod(b[0] - a[0], g)
    if odd:
        return range(0)
    m = b.step // g
    first = a[0] + a.step * (shift * pow(a.step // g, -1, m) % m)
    last = min(a[-1], b[-1])
    return clip(range(first, last + 1, a.step * m), max(a[0], b[0]), last)


def affine(values: range, a: int, c: int) -> range:
    """``{a·v + c : v in values}`` for a ≠ 0, ascending."""
    ends = sorted((a * values[0] + c, a * values[-1] + c))
    return range(ends[0], ends[1] + 1, abs(a) * values.step)


def spread(values: range, a: int, size: int) -> range | None:
    """``{v - a·f : v in values, f < size}`` if it is a progression that meets nothing twice."""
    if size == 0 or not values:
        return range(0)
    if size == 1:
        return values
    low, high = min(0, -a * (size - 1)), max(0, -a * (size - 1))
    step, count = abs(a), len(values)
    if count == 1:
        return range(values[0] + low, values[0] + high + 1, step)
    if step == values.step * count:
        return range(values[0] + low, values[-1] + high + 1, values.step)
    if values.step == step * size:
        return range(values[0] + low, values[-1] + high + 1, step)
    return None


def met(pattern: Pattern, leg: Leg, sizes: Sizes) -> range:
    """The positions of a leg at which a pattern can be 1, as far as reach and residues tell.

    ``a·leg`` lies within ``values - reach(rest)``, and modulo g, which divides all steps of both,
    is a single residue.
    """
    a, values = dict(pattern.terms)[leg], pattern.values
    if not values:
        return range(0)
    rest = tuple(term for term in pattern.terms if term[0] != leg)
    g = gcd(*(b for _, b in rest), values.step if len(values) > 1 else 0)
    common = gcd(a, g)
    if values[0] % common:
        return range(0)
    low, high = reach(rest, sizes)
    low, high = values[0] - high, values[-1] - low
    first, last = sorted((low, high), key=lambda end: a * end)
    first, last = -(-first // a), last // a
    if g == 0:  # nothing else: the equation a·leg = value
        return clip(range(values[0] // a, values[0] // a + 1), 0, sizes[leg] - 1)
    step = g // common
    residue = values[0] // common * pow(a // common, -1, step) % step
    return clip(range(residue, sizes[leg], step), first, last)
