"""Rewrite rules: each is an identity on diagrams, ``TensorNetwork -> TensorNetwork | None``.

``None`` means that the rule does not match. Every rule lowers the measure of
`tnconv.simplify.driver` by itself, so any order ends.
"""

from collections.abc import Callable, Iterator
from math import gcd

from tnconv.diagrams.affine import Leg, Pattern, View, divisor, fresh, injective, linear, reach
from tnconv.diagrams.network import TensorNetwork

Rule = Callable[[TensorNetwork], TensorNetwork | None]


def size_one(tn: TensorNetwork) -> TensorNetwork | None:
    """A leg of size one is the constant 0.

    Σ_i T[.., i, ..] = T[.., 0, ..]  if i < 1
    """
    ones = [leg for leg, size in tn.sizes.items() if size == 1]
    if not ones:
        return None
    for leg in ones:
        tn = tn.substitute(leg)
    return tn


def scalar(tn: TensorNetwork) -> TensorNetwork | None:
    """What touches no leg is a number: constant patterns, unheld closed legs, empty sums.

    Σ_i 1 = I,   [0 ∈ values] is 0 or 1,   a leg of size 0 makes everything zero
    """
    if tn.scale == 0 or 0 in tn.sizes.values():
        return tn.zero() if tn.nodes or tn.sizes else None
    constants = {at: 0 in node.values for at, node in tn.patterns if not node.terms}
    if not all(constants.values()):
        return tn.zero()
    loose = [leg for leg, held in tn.holders.items() if not held and leg not in tn.open_legs]
    if not constants and not loose:
        return None
    for leg in loose:
        tn = tn.scaled(tn.sizes[leg])
    left = {leg: size for leg, size in tn.sizes.items() if leg not in loose}
    return tn.without(*constants).with_(sizes=left)


def trivial(tn: TensorNetwork) -> TensorNetwork | None:
    """A pattern keeps the values that its legs can reach; without a choice left it is 1, or 0.

    [form ∈ values] = [form ∈ values ∩ reach],   = 1 if the reach lies in values
    """
    for view in _views(tn):
        for axis in view.axes:
            low, high = reach(axis.terms, tn.sizes)
            if tn.nodes and (axis.offset + high < 0 or axis.offset + low >= axis.size):
                return tn.zero()
    for at, pattern in tn.patterns:
        low, high = reach(pattern.terms, tn.sizes)
        values = _clip(pattern.values, low, high)
        if not values:
            return tn.zero()
        if pattern.terms and len(values) == high - low + 1:
            return tn.without(at)
        if len(values) < len(pattern.values):
            return _swap(tn, at, Pattern(pattern.terms, values))
    return None


def content(tn: TensorNetwork) -> TensorNetwork | None:
    """A common factor of the coefficients divides the values.

    [g·form ∈ values] = [form ∈ {v/g : v ∈ values, g | v}]
    """
    for at, pattern in tn.patterns:
        if (g := divisor(pattern.terms)) > 1:
            values = _quotients(pattern.values, g)
            terms = tuple((leg, a // g) for leg, a in pattern.terms)
            return _swap(tn, at, Pattern(terms, values)) if values else tn.zero()
    return None


def implied(tn: TensorNetwork) -> TensorNetwork | None:
    """A pattern that an axis or another pattern of the same form implies is dropped.

    [form ∈ V] x[offset + form] = x[offset + form]  if x is zero outside V;
    [form ∈ U] [form ∈ V] = [form ∈ U]  if U ⊆ V
    """
    for at, pattern in tn.patterns:
        if any(_implies(tn, view, pattern) for view in _views(tn)):
            return tn.without(at)
        for other, same in tn.patterns:
            if other != at and same.terms == pattern.terms and _subset(same.values, pattern.values):
                return tn.without(at)
    return None


def crop(tn: TensorNetwork) -> TensorNetwork | None:
    """A pattern on one leg narrows the leg to an arithmetic progression.

    Σ_i [i ∈ a + b·{0..m-1}] T[i] = Σ_{j<m} T[a + b·j]
    """
    for at, pattern in tn.patterns:
        if len(pattern.terms) == 1 and pattern.terms[0][1] == 1:
            ((leg, _),) = pattern.terms
            values = _clip(pattern.values, 0, tn.sizes[leg] - 1)
            if not values:
                return tn.zero()
            rest = tn.without(at)
            return rest.substitute(leg, values[0], {leg: values.step}, {leg: len(values)})
    return None


def solve(tn: TensorNetwork) -> TensorNetwork | None:
    """Two legs with unit coefficients are one leg: delta, flip, single tap, single output.

    Σ_{i,j} [i ± j = c] T[i] S[j] = Σ_t T[i0 + t] S[j0 ∓ t]
    """
    return _solve_pair(tn, lambda a, b: abs(a) == abs(b) == 1)


def solve_step(tn: TensorNetwork) -> TensorNetwork | None:
    """Two legs with coprime coefficients are one leg: a 1x1 kernel with stride, a single output.

    Σ_{i,j} [a·i + b·j = c] T[i] S[j] = Σ_t T[i0 + |b|·t] S[j0 ∓ a·t]
    """
    return _solve_pair(tn, lambda a, b: gcd(a, b) == 1)


def injective_view(tn: TensorNetwork) -> TensorNetwork | None:
    """An injective pattern is a view: i splits into the legs that it is made of.

    Σ_i Π[k, o, i] x[i] = x[s·o + d·k - p]  and (o, k) -> i meets nothing twice:
    s/g >= K or d/g >= O, g = gcd(s, d)
    """
    for at, pattern in tn.patterns:
        if pattern.value is None or len(pattern.terms) < 3:
            continue
        for leg, a in pattern.terms:
            others = tuple(t for t in pattern.terms if t[0] != leg)
            if abs(a) == 1 and injective(others, tn.sizes):
                return solve_for(tn, at, leg)
    return None


def free(tn: TensorNetwork) -> TensorNetwork | None:
    """A leg that nothing else holds turns a pattern into a band, in closed form.

    Σ_{f<F} [form + a·f = v] = [form ∈ v - a·{0..F-1}]
    """
    for at, pattern in tn.patterns:
        for leg, a in pattern.terms:
            if tn.holders[leg] == (at,) and leg not in tn.open_legs:
                if (values := _band(pattern.values, a, tn.sizes[leg])) is not None:
                    terms = tuple(t for t in pattern.terms if t[0] != leg)
                    left = {other: size for other, size in tn.sizes.items() if other != leg}
                    return _swap(tn, at, Pattern(terms, values), left)
    return None


NORMAL_RULES: tuple[Rule, ...] = (size_one, scalar, trivial, content, implied, crop, solve)
VIEW_RULES: tuple[Rule, ...] = (*NORMAL_RULES, solve_step, injective_view, free)


def solve_for(tn: TensorNetwork, at: int, leg: Leg) -> TensorNetwork:
    """Put ``leg = ±(value - rest)``, for a pattern in which ``leg`` has a unit coefficient.

    Always an identity; where the pattern is not injective it makes overlapping windows.
    """
    pattern = tn.nodes[at]
    assert isinstance(pattern, Pattern) and pattern.value is not None
    a = dict(pattern.terms)[leg]
    assert abs(a) == 1
    others = linear((other, -a * b) for other, b in pattern.terms if other != leg)
    return tn.without(at).substitute(leg, a * pattern.value, others)


def _solve_pair(tn: TensorNetwork, accepts: Callable[[int, int], bool]) -> TensorNetwork | None:
    """All solutions of a·i + b·j = c in range are i = i0 + |b|·t, j = j0 ∓ a·t for 0 <= t < T."""
    for at, pattern in tn.patterns:
        if len(pattern.terms) != 2 or (c := pattern.value) is None:
            continue
        (i, a), (j, b) = pattern.terms
        if not accepts(a, b):
            continue
        first = c * pow(a, -1, abs(b)) % abs(b) if abs(b) > 1 else 0
        step_j = -a if b > 0 else a
        start_j = (c - a * first) // b
        steps = _clip(
            range((tn.sizes[i] - first - 1) // abs(b) + 1), *_within(start_j, step_j, tn.sizes[j])
        )
        if not steps:
            return tn.zero()
        i0, j0, count = first + abs(b) * steps[0], start_j + step_j * steps[0], len(steps)
        whole = (j0, step_j, count) == (0, 1, tn.sizes[j])
        t = j if whole else i if (i0, abs(b), count) == (0, 1, tn.sizes[i]) else fresh(i, tn.sizes)
        solved = tn.without(at)
        if t != i:
            solved = solved.substitute(i, i0, {t: abs(b)}, {t: count})
        return solved if t == j else solved.substitute(j, j0, {t: step_j}, {t: count})
    return None


def _within(start: int, step: int, size: int) -> tuple[int, int]:
    """The least and greatest t with 0 <= start + step·t < size."""
    if step > 0:
        return -(start // step), (size - 1 - start) // step
    return -((size - 1 - start) // -step), start // -step


def _views(tn: TensorNetwork) -> Iterator[View]:
    yield from (node.view for node in tn.tensors)
    yield tn.result


def _swap(
    tn: TensorNetwork, at: int, pattern: Pattern, sizes: dict[Leg, int] | None = None
) -> TensorNetwork:
    nodes = (pattern if at == other else node for other, node in enumerate(tn.nodes))
    return tn.with_(nodes, sizes=sizes)


def _clip(values: range, low: int, high: int) -> range:
    """The values within [low, high]."""
    start, step = values.start, values.step
    first = max(0, -((start - low) // step))
    last = min(len(values) - 1, (high - start) // step)
    return values[first : last + 1] if first <= last else range(0)


def _quotients(values: range, g: int) -> range:
    """v/g for the values that g divides."""
    common = gcd(values.step, g)
    multiples = [v for v in values[: g // common] if v % g == 0]
    if not multiples:
        return range(0)
    step = values.step // common
    return range(multiples[0] // g, values[-1] // g + 1, step)


def _subset(inner: range, outer: range) -> bool:
    return all(value in outer for value in inner)


def _implies(tn: TensorNetwork, view: View, pattern: Pattern) -> bool:
    low, high = reach(pattern.terms, tn.sizes)
    for axis in view.axes:
        allowed = Pattern(axis.terms, range(-axis.offset, axis.size - axis.offset))
        if axis.terms and allowed.terms == pattern.terms:
            if _subset(_clip(allowed.values, low, high), pattern.values):
                return True
    return False


def _band(values: range, a: int, size: int) -> range | None:
    """{v - a·f : v in values, f < size} if it is a progression that meets nothing twice."""
    if size == 0:
        return range(0)
    low, high = min(0, -a * (size - 1)), max(0, -a * (size - 1))
    step, count = abs(a), len(values)
    if count == 1:
        return range(values[0] + low, values[0] + high + 1, step)
    if step == values.step * count:
        return range(values[0] + low, values[-1] + high + 1, values.step)
    if values.step == step * size:
        return range(values[0] + low, values[-1] + high + 1, step)
    return None
