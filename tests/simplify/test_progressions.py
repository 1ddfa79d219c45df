import itertools
from math import gcd

from hypothesis import given
from hypothesis import strategies as st

from tnconv.diagrams import Pattern
from tnconv.diagrams.affine import reach
from tnconv.simplify.progressions import affine, clip, meet, met, quotients, spread, within

RANGES = st.builds(
    lambda start, length, step: range(start, start + length, step),
    st.integers(-20, 20),
    st.integers(0, 30),
    st.integers(1, 6),
)
COEFFICIENTS = st.integers(-6, 6).filter(bool)
SIZES = st.integers(1, 6)


@given(values=RANGES, low=st.integers(-20, 20), high=st.integers(-20, 30))
def test_clip(values: range, low: int, high: int) -> None:
    assert list(clip(values, low, high)) == [v for v in values if low <= v <= high]


@given(values=RANGES, g=st.integers(1, 9))
def test_quotients(values: range, g: int) -> None:
    assert list(quotients(values, g)) == [v // g for v in values if v % g == 0]


@given(a=RANGES, b=RANGES)
def test_meet(a: range, b: range) -> None:
    assert list(meet(a, b)) == sorted(set(a) & set(b))


@given(values=RANGES.filter(len), a=COEFFICIENTS, c=st.integers(-9, 9))
def test_affine(values: range, a: int, c: int) -> None:
    assert list(affine(values, a, c)) == sorted(a * v + c for v in values)


@given(start=st.integers(-20, 20), step=COEFFICIENTS, size=SIZES)
def test_within(start: int, step: int, size: int) -> None:
    low, high = within(start, step, size)
    inside = [t for t in range(-50, 50) if 0 <= start + step * t < size]
    assert list(range(low, high + 1)) == inside


@given(values=RANGES, a=COEFFICIENTS, size=st.integers(0, 6))
def test_spread_is_exact_or_refuses(values: range, a: int, size: int) -> None:
    """It refuses only where a value is met twice, or where the values are no progression."""
    every = sorted(v - a * f for v in values for f in range(size))
    spread_out = spread(values, a, size)
    if spread_out is not None:
        assert list(spread_out) == every
    elif len(set(every)) == len(every):
        steps = {after - before for before, after in itertools.pairwise(every)}
        assert len(steps) > 1


@given(a=COEFFICIENTS, b=COEFFICIENTS, sizes=st.tuples(SIZES, SIZES), values=RANGES)
def test_met_with_one_other_leg(a: int, b: int, sizes: tuple[int, int], values: range) -> None:
    i, j = sizes
    kept = met(Pattern((("i", a), ("j", b)), values), "i", {"i": i, "j": j})
    every = [p for p in range(i) if any(a * p + b * q in values for q in range(j))]
    assert set(every) <= set(kept)
    if len(values) == 1 and abs(b) == 1:
        assert list(kept) == every


@given(a=COEFFICIENTS, size=SIZES, values=RANGES)
def test_met_alone_is_exact(a: int, size: int, values: range) -> None:
    kept = met(Pattern((("i", a),), values), "i", {"i": size})
    inside = [p for p in range(size) if a * p in values]
    assert list(kept) == inside


@given(
    coefficients=st.tuples(COEFFICIENTS, COEFFICIENTS, COEFFICIENTS),
    sizes=st.tuples(SIZES, SIZES, SIZES),
    data=st.data(),
)
def test_met_is_tight_at_both_ends_up_to_residues(
    coefficients: tuple[int, int, int], sizes: tuple[int, int, int], data: st.DataObject
) -> None:
    """Kept positions are those within the reach of the rest and of its residue class."""
    terms = tuple(zip("iok", coefficients, strict=True))
    size = dict(zip("iok", sizes, strict=True))
    low, high = reach(terms, size)
    value = data.draw(st.integers(low, high))
    pattern = Pattern(terms, range(value, value + 1))
    a, g = coefficients[0], gcd(*coefficients[1:])
    low, high = reach(terms[1:], size)
    possible = [
        p for p in range(size["i"]) if low <= value - a * p <= high and (value - a * p) % g == 0
    ]
    assert list(met(pattern, "i", size)) == possible
