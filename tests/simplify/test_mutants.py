"""The checks of the rules catch every mutant of a table: wrong guards and wrong right-hand sides.

A mutant is one replaced piece of source; it is caught by a check that fails, or by an error.
"""

import inspect
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from math import prod
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor as Array

from tests.simplify.test_rules import FIRES
from tests.simplify.triggers import firing
from tests.strategies import assert_close, networks, operands_for
from tnconv.diagrams import Pattern, Tensor, TensorNetwork, View, conv, exactly, unfold
from tnconv.simplify import Rule, fixed_point, measure

MODULES = "progressions", "rules", "view_rules"
MUTANTS = [
    ("tn = tn.substitute(leg)", "tn = tn.substitute(leg, 1)"),
    ("tn = tn.scaled(tn.sizes[leg])", "tn = tn.scaled(1)"),
    ("if not held and leg not in tn.open_legs", "if not held"),
    ("constants = {at: 0 in node.values for", "constants = {at: True for"),
    ("len(values) == high - low + 1", "len(values) >= high - low"),
    ("axis.offset + high < 0", "axis.offset + high <= 0"),
    ("values = quotients(pattern.values, g)", "values = pattern.values"),
    ("values[-1] // g + 1, values.step // common)", "values[-1] // g + 1, values.step)"),
    ("meet(pattern.values, same.values))", "pattern.values)"),
    ("same.terms == pattern.terms", "same.legs == pattern.legs"),
    ("range(-axis.offset, axis.size - axis.offset)", "range(-axis.offset, axis.size)"),
    ("== len(inside)", "<= len(inside)"),
    ("step_j = -a if b > 0 else a", "step_j = -a"),
    ("start_j = (c - a * first) // b", "start_j = (c + a * first) // b"),
    ("lambda a, b: gcd(a, b) == 1", "lambda a, b: True"),
    ("range((tn.sizes[i] - first - 1) // abs(b) + 1)", "range(tn.sizes[i])"),
    ("whole = (j0, step_j, count) == (0, 1, tn.sizes[j])", "whole = count == tn.sizes[j]"),
    ("affine(q.values, beta, alpha * value)", "affine(q.values, beta, value)"),
    ("abs(a) * values.step)", "values.step)"),
    ("if _size(terms) < least:", "if _size(terms) <= least:"),
    (
        "values = quotients(affine(q.values, beta, alpha * value), g)",
        "values = affine(q.values, beta, alpha * value)",
    ),
    ("leg, kept[0], {leg: kept.step}", "leg, 0, {leg: kept.step}"),
    ("leg, kept[0], {leg: kept.step}", "leg, kept[0], {leg: 1}"),
    ("values[0] // common * pow(a // common, -1, step) % step", "values[0] // common % step"),
    ("values[0] - high, values[-1] - low", "values[0] - high, values[0] - low"),
    ("-(-first // a), last // a", "first // a, last // a"),
    ("values.step if len(values) > 1 else 0", "0"),
    ("return tail and min", "return not tail and min"),
    ("return tail and min", "return True or min"),
    ("if len(pattern.terms) == 2 and pattern.value is not None:", "if False:"),
    ("if abs(a) == 1 and injective(others, tn.sizes):", "if injective(others, tn.sizes):"),
    ("if abs(a) == 1 and injective(others, tn.sizes):", "if abs(a) == 1:"),
    ("pattern.value is None or len(pattern.terms) < 3:", "len(pattern.terms) < 3:"),
    ("tn.holders[leg] == (at,) and leg not in tn.open_legs", "tn.holders[leg] == (at,)"),
    ("tn.holders[leg] == (at,) and leg not", "at in tn.holders[leg] and leg not"),
    ("min(0, -a * (size - 1)), max(0, -a * (size - 1))", "0, abs(a) * (size - 1)"),
    ("if step == values.step * count:", "if True:"),
    ("if values.step == step * size:", "if values.step >= step:"),
    ("substitute(leg, a * pattern.value, others)", "substitute(leg, pattern.value, others)"),
]


def test_the_rules_themselves_pass() -> None:
    check({name: sys.modules[f"tnconv.simplify.{name}"] for name in MODULES})


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_mutants_are_caught(old: str, new: str) -> None:
    modules = mutated(old, new)
    with pytest.raises((AssertionError, ValueError, KeyError, IndexError, StopIteration)):
        check(modules)


def mutated(old: str, new: str) -> dict[str, ModuleType]:
    """The modules of the rules, with a text replaced that occurs once in their sources."""
    names = [f"tnconv.simplify.{name}" for name in MODULES]
    kept = {name: sys.modules[name] for name in names}
    sources = {name: inspect.getsource(module) for name, module in kept.items()}
    assert sum(source.count(old) for source in sources.values()) == 1
    changed = {}
    try:
        for name, source in sources.items():
            sys.modules[name] = changed[name] = ModuleType(name)
            exec(compile(source.replace(old, new), name, "exec"), changed[name].__dict__)
    finally:
        sys.modules.update(kept)
    return dict(zip(MODULES, changed.values(), strict=True))


def check(modules: dict[str, ModuleType]) -> None:
    """What the tests of the rules assert, on fixed examples; raises where it does not hold."""
    check_progressions(modules["progressions"])
    rules: tuple[Rule, ...] = modules["view_rules"].VIEW_RULES
    for rule in rules:
        must, may = corpus(rule.__name__)
        for at, example in enumerate((*must, *may)):
            after = rule(example.network)
            assert after is not None or at >= len(must)
            if after is not None:
                assert measure(after) < measure(example.network)
                example.check(after)
                if rule.__name__ != "injective_view":  # which may leave a mask
                    solved = rule.__name__.startswith("solve")
                    assert len(after.nodes) <= len(example.network.nodes) - solved
    check_convolutions(rules, modules["rules"].NORMAL_RULES)


def check_progressions(module: ModuleType) -> None:
    ranges = [range(a, a + n, s) for a in (-3, 0, 2) for n in (0, 1, 7, 12) for s in (1, 2, 3, 6)]
    for values, g in product(ranges, range(1, 7)):
        quotients = [v // g for v in values if v % g == 0]
        assert list(module.quotients(values, g)) == quotients
        if values and g > 1:
            assert list(module.affine(values, -g, 1)) == sorted(1 - g * v for v in values)
    for values, a, size in product(ranges, (-3, -2, -1, 1, 2, 3), range(4)):
        spread = module.spread(values, a, size)
        assert spread is None or list(spread) == sorted(
            v - a * f for v in values for f in range(size)
        )
    for a, b, value in product((-3, 2, 3, 4), (-5, 1, 5), range(-9, 9)):
        pattern = Pattern((("i", a), ("j", b)), range(value, value + 1))
        met = [i for i in range(9) for j in range(9) if a * i + b * j == value]
        assert list(module.met(pattern, "i", {"i": 9, "j": 9})) == sorted(met)


def check_convolutions(rules: tuple[Rule, ...], normal: tuple[Rule, ...]) -> None:
    for example in convolutions():
        for some in (normal, rules):
            after, trace = fixed_point(example.network, some)
            example.check(after)
            assert all(measure(firing.after) < measure(firing.before) for firing in trace)
            assert overlap(after) <= overlap(example.network)
        assert_tight(fixed_point(example.network, normal)[0])
    strided, _ = fixed_point(conv((2, 3, 9), (4, 3, 1), stride=2), normal)
    assert strided.sizes["i1"] == 9  # as native kernels take it
    longer, _ = fixed_point(conv((2, 3, 10), (4, 3, 3), stride=2), normal)
    assert longer.sizes["i1"] == 10


@dataclass(eq=False)
class Example:
    """A network and its value, computed once."""

    network: TensorNetwork

    @cached_property
    def operands(self) -> dict[str, Array]:
        return operands_for(self.network)

    @cached_property
    def value(self) -> Array:
        return self.network.reference(**self.operands)

    def check(self, after: TensorNetwork) -> None:
        given = {name: self.operands[name] for name in after.operands}
        assert_close(after.reference(**given), self.value)


@cache
def corpus(rule: str) -> tuple[list[Example], list[Example]]:
    """Networks on which a rule has to fire, and others."""
    must = [*FIRES[rule], *drawn(firing(rule), 25)]
    return list(map(Example, must)), others()


@cache
def others() -> list[Example]:
    terms = (("i", 1), ("k", -1), ("o", -3))
    sizes = {"i": 9, "k": 2, "o": 3}
    tensors = [Tensor(leg, View.of(sizes, leg)) for leg in sizes]
    band = TensorNetwork((*tensors, Pattern(terms, range(2))), View((), ()), sizes)
    even = band.with_((*tensors, exactly({"i": 2, "o": -2}, 2)))
    forms = exactly({"i": 1, "k": -1}, 1), exactly({"i": 1, "k": -2}, 0)  # of the same legs
    both = band.with_((*tensors, *forms))
    return list(map(Example, [band, even, both, *drawn(networks(max_points=300), 60)]))


def drawn(strategy: st.SearchStrategy[TensorNetwork], count: int) -> list[TensorNetwork]:
    found: list[TensorNetwork] = []

    @settings(max_examples=count, derandomize=True, database=None)
    @given(network=strategy)
    def collect(network: TensorNetwork) -> None:
        found.append(network)

    collect()
    return found


@cache
def convolutions() -> list[Example]:
    """Overlapping windows, also where the input leg is open, with taps and inputs never met."""
    options_of = [
        {},
        {"padding": 1},
        {"padding": ((3, 0),)},
        {"stride": 2},
        {"stride": 2, "dilation": 2},
        {"stride": 3, "padding": 2},
        {"dilation": 2, "padding": 4},
    ]
    found = []
    for kernel, size, options in product((2, 3), (2, 8), options_of):
        if (kernel - 1) * options.get("dilation", 1) < size:
            forward = conv((2, 2, size), (3, 2, kernel), **options)  # type: ignore[arg-type]
            found += [forward, forward.vjp("x").terms[0], forward.vjp("weight").terms[0]]
            found.append(unfold((2, 2, size), kernel, **options))  # type: ignore[arg-type]
    skipping = conv((2, 2, 8), (3, 2, 3)).substitute("i1", 0, {"j": 1}, {"j": 8})
    x, pattern, weight = skipping.nodes
    moved = skipping.with_((x, pattern.substitute("j", -4, (("j", 1),)), weight))
    return list(map(Example, [*found, moved]))


def overlap(network: TensorNetwork) -> int:
    """How many assignments of the open legs point where another points, too."""
    positions = list(places(network.result, network))
    return len(positions) - len(set(positions))


def places(view: View, network: TensorNetwork):  # type: ignore[no-untyped-def]
    legs = view.legs
    for values in product(*(range(network.sizes[leg]) for leg in legs)):
        at = dict(zip(legs, values, strict=True))
        yield tuple(axis.offset + sum(a * at[leg] for leg, a in axis.terms) for axis in view.axes)


def assert_tight(network: TensorNetwork) -> None:
    """Both ends of every leg of a pattern with unit steps can be met, but for left over inputs."""
    for _, pattern in network.patterns:
        steps = sorted(abs(a) for _, a in pattern.terms)
        if len(steps) < 3 or steps[:2] != [1, 1] or pattern.value is None:
            continue
        sizes = [network.sizes[leg] for leg in pattern.legs]
        assert prod(sizes) < 10**4
        met = [
            point
            for point in product(*map(range, sizes))
            if sum(a * p for (_, a), p in zip(pattern.terms, point, strict=True)) == pattern.value
        ]
        for at, (leg, size) in enumerate(zip(pattern.legs, sizes, strict=True)):
            last = max(point[at] for point in met)
            rest = steps[2] - 1 if leg.startswith(("i", "j")) else 0
            assert min(point[at] for point in met) == 0 and size - 1 - rest <= last
