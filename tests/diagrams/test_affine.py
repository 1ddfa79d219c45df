"""Linear forms, axes, views and patterns against evaluating them point by point."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import COEFFICIENTS
from tnconv.diagrams import Axis, Pattern, Tensor, View, delta, exactly, index_pattern, mask
from tnconv.diagrams.affine import divisor, fresh, injective, linear, reach, replace

LEGS = ("a", "b", "c")
FORMS = st.lists(st.tuples(st.sampled_from(LEGS), st.integers(-3, 3)), max_size=5)
SIZES = st.fixed_dictionaries({leg: st.integers(1, 4) for leg in LEGS})
RANGES = st.builds(range, st.integers(-5, 5), st.integers(-5, 9), COEFFICIENTS)


def points(sizes):
    """All assignments of values to legs."""
    return [dict(zip(sizes, at, strict=True)) for at in product(*map(range, sizes.values()))]


def value(terms, at):
    return sum(a * at[leg] for leg, a in terms)


@given(form=FORMS, sizes=SIZES)
def test_normal_form_has_equal_values(form, sizes):
    terms = linear(form)
    assert [leg for leg, _ in terms] == sorted({leg for leg, _ in terms})
    assert all(a for _, a in terms)
    values = [value(terms, at) for at in points(sizes)]
    assert values == [value(form, at) for at in points(sizes)]
    assert reach(terms, sizes) == (min(values), max(values))
    assert all(v % divisor(terms) == 0 if terms else v == 0 for v in values)


@given(form=FORMS, sizes=SIZES)
def test_injective(form, sizes):
    """Sufficient always, exact for up to two legs."""
    terms = linear(form)
    values = [value(terms, at) for at in points({leg: sizes[leg] for leg, _ in terms})]
    distinct = len(set(values)) == len(values)
    if len(terms) <= 2:
        assert injective(terms, sizes) == distinct
    else:
        assert distinct or not injective(terms, sizes)


@given(form=FORMS, by=FORMS, shift=st.integers(-3, 3), sizes=SIZES, values=RANGES)
def test_substitution_is_evaluation(form, by, shift, sizes, values):
    """Putting ``a = shift + by`` into forms, axes and patterns, then evaluating."""
    by = linear(t for t in by if t[0] != "a")
    axis, pattern = Axis(5, 2, linear(form)), Pattern(linear(form), values)
    after, narrowed = axis.substitute("a", shift, by), pattern.substitute("a", shift, by)
    for at in points(sizes):
        put = at | {"a": shift + value(by, at)}
        assert after.offset + value(after.terms, at) == 2 + value(form, put)
        assert (value(narrowed.terms, at) in narrowed.values) == (value(form, put) in values)
    if "a" in dict(linear(form)):
        at = {"a": 0, "b": 1, "c": 2}
        replaced = value(replace(linear(form), "a", by), at)
        assert replaced == value(form, at | {"a": value(by, at)})


@given(form=FORMS, values=RANGES, sizes=SIZES)
def test_pattern_normal_form(form, values, sizes):
    pattern = Pattern(tuple(form), values)
    assert pattern.terms == () or pattern.terms[0][1] > 0
    assert pattern.values.step > 0
    mirrored = Pattern(tuple((leg, -a) for leg, a in form), range(*_negated(values)))
    assert pattern == mirrored or not pattern.terms
    assert (pattern.value is None) == (len(values) != 1)
    for at in points(sizes):
        assert (value(pattern.terms, at) in pattern.values) == (value(form, at) in values)


def _negated(values):
    return -values.start, -values.stop, -values.step


@pytest.mark.parametrize(
    ("pattern", "truth"),
    [
        (index_pattern("a", "b", "c", 2, 3, 1), lambda a, b, c: c == 2 * b + 3 * a - 1),
        (delta("a", "b"), lambda a, b, c: a == b),
        (exactly({"b": 2, "a": -1}, 1), lambda a, b, c: 2 * b - a == 1),
        (mask([("b", 1), ("a", -2)], 1, 3), lambda a, b, c: 0 <= 1 + b - 2 * a < 3),
        (delta("a", "a"), lambda a, b, c: True),
        (exactly({}, 1), lambda a, b, c: False),
    ],
)
def test_constructors(pattern, truth):
    for at in points(dict.fromkeys(LEGS, 5)):
        assert (value(pattern.terms, at) in pattern.values) == truth(**at)


@given(
    size=st.integers(1, 6),
    offset=st.integers(-5, 5),
    form=st.lists(st.tuples(st.sampled_from(LEGS), COEFFICIENTS), max_size=2),
    sizes=SIZES,
)
def test_axis(size, offset, form, sizes):
    axis = Axis(size, offset, linear(form))
    read = [offset + value(axis.terms, at) for at in points(sizes)]
    below, above = axis.overhang(sizes)
    assert below == max(0, -min(read)) and above == max(0, max(read) - size + 1)
    leg = axis.plain(sizes)
    if leg is not None:
        assert sizes[leg] == size
        assert all(offset + value(axis.terms, at) == at[leg] for at in points(sizes))
    assert Axis(sizes["a"], 0, (("a", 1),)).plain(sizes) == "a"


def test_view():
    sizes = {"n": 2, "g": 3, "c": 4}
    view = View.of(sizes, "n", ("g", "c"), "n")
    assert view.shape == (2, 12, 2) and view.legs == ("n", "g", "c")
    assert [axis.plain(sizes) for axis in view.axes] == ["n", "g", "c", "n"]
    led = view.prepend(sizes, ("c",))
    assert led.shape == (4, 2, 12, 2) and led.axes[1:] == view.axes
    assert View.of(sizes) == View((), ()) and View.of(sizes, ()).shape == (1,)
    assert Tensor("x", view).legs == view.legs
    assert view.substitute("z", 0, ()) is view
    with pytest.raises(ValueError, match=r"shape \(2, 3\) cannot have axes of sizes \(2, 2\)"):
        View((2, 3), (Axis(2), Axis(2)))


def test_fresh():
    assert [fresh("a", taken) for taken in ((), ("a",), ("a", "a'"))] == ["a", "a'", "a''"]


def test_axes_add_equal_legs():
    axis = Axis(5, 0, (("b", 2), ("a", 1), ("a", 1), ("c", 0)))
    assert axis == Axis(5, 0, (("a", 2), ("b", 2)))
    assert axis.substitute("a", 1, (("b", 1),)) == Axis(5, 2, (("b", 4),))
