"""Rewrite rules of form N: each is an identity on diagrams, ``TensorNetwork -> same | None``.

``None`` means that the rule does not match. Every rule lowers the measure of
`tnconv.simplify.driver` by itself, so any order ends. Form N keeps the patterns that native kernels
match; the rules that turn patterns into views are in `tnconv.simplify.view_rules`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from math import gcd

from tnconv.diagrams.affine import (
    Axis,
    Leg,
    Pattern,
    Terms,
    View,
    divisor,
    fresh,
    linear,
    reach,
)
from tnconv.diagrams.network import TensorNetwork
from tnconv.simplify.progressions import affine, clip, meet, met, quotients, within

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
        values = clip(pattern.values, low, high)
        if not values:
            return tn.zero()
        if pattern.terms and len(values) == high - low + 1:
            return tn.without(at)
        if len(values) < len(pattern.values):
            return swap(tn, at, Pattern(pattern.terms, values))
    return None


def content(tn: TensorNetwork) -> TensorNetwork | None:
    """A common factor of the coefficients divides the values.

    [g·form ∈ values] = [form ∈ {v/g : v ∈ values, g | v}]
    """
    for at, pattern in tn.patterns:
        if (g := divisor(pattern.terms)) > 1:
            values = quotients(pattern.values, g)
            terms = tuple((leg, a // g) for leg, a in pattern.terms)
            return swap(tn, at, Pattern(terms, values)) if values else tn.zero()
    return None


def implied(tn: TensorNetwork) -> TensorNetwork | None:
    """What an axis implies is no pattern, and two patterns of one form are one.

    [form ∈ V] x[offset + form] = x[offset + form]  if x is zero outside V;
    [form ∈ U] [form ∈ V] = [form ∈ U ∩ V]
    """
    axes: dict[object, list[Axis]] = defaultdict(list)  # of one form only if of one key
    for axis in (axis for view in _views(tn) for axis in view.axes if axis.terms):
        axes[axis.terms[0][0], len(axis.terms)].append(axis)
    for at, pattern in tn.patterns:
        alike = axes.get((pattern.legs[0], len(pattern.legs)), ()) if pattern.legs else ()
        if any(_implies(tn, axis, pattern) for axis in alike):
            return tn.without(at)
        for other, same in tn.patterns:
            if other > at and same.terms == pattern.terms:
                both = Pattern(pattern.terms, meet(pattern.values, same.values))
                return swap(tn, at, both).without(other)
    return None


def solve(tn: TensorNetwork) -> TensorNetwork | None:
    """Two legs with unit coefficients are one leg: delta, flip, single tap, single output.

    Σ_{i,j} [i ± j = c] T[i] S[j] = Σ_t T[i0 + t] S[j0 ∓ t]
    """
    return solve_pair(tn, lambda a, b: abs(a) == abs(b) == 1)


def difference(tn: TensorNetwork) -> TensorNetwork | None:
    """An exact pattern is subtracted from another that shares most of its legs.

    [p = v] [q ∈ values] = [p = v] [α·p + β·q ∈ α·v + β·values]  for β ≠ 0; with
    p = s·o + d·k - i and q = s·o + d·k - j: Π[k, o, i] Π[k, o, j] = Π[k, o, i] δ[i, j]
    """
    for one, p in tn.patterns:
        if p.value is None:
            continue
        for at, q in tn.patterns:
            if at != one and (less := _reduced(q, p, p.value)) is not None:
                return swap(tn, at, less)
    return None


def crop(tn: TensorNetwork) -> TensorNetwork | None:
    """A leg keeps the positions, and the residue class, that a pattern can meet.

    Σ_i [a·i + rest ∈ values] T[i] = Σ_{j<m} [a·(b + c·j) + rest ∈ values] T[b + c·j]

    Exact patterns of two legs are left to `solve`. Input positions behind the last window stay:
    native kernels skip them at no cost.
    """
    for at, pattern in tn.patterns:
        if len(pattern.terms) == 2 and pattern.value is not None:
            continue
        for leg in pattern.legs:
            kept = met(pattern, leg, tn.sizes)
            if not kept:
                return tn.zero()
            if len(kept) < tn.sizes[leg] and not _left_over(tn, at, leg, kept):
                return tn.substitute(leg, kept[0], {leg: kept.step}, {leg: len(kept)})
    return None


NORMAL_RULES: tuple[Rule, ...] = (
    size_one,
    scalar,
    trivial,
    content,
    implied,
    solve,
    difference,
    crop,
)


def swap(
    tn: TensorNetwork, at: int, pattern: Pattern, sizes: dict[Leg, int] | None = None
) -> TensorNetwork:
    """``pattern`` in place of the node at a position."""
    nodes = (pattern if at == other else node for other, node in enumerate(tn.nodes))
    return tn.with_(nodes, sizes=sizes)


def solve_pair(tn: TensorNetwork, accepts: Callable[[int, int], bool]) -> TensorNetwork | None:
    """Solve a·i + b·j = c: in range i = i0 + |b|·t and j = j0 ∓ a·t for 0 <= t < T."""
    for at, pattern in tn.patterns:
        if len(pattern.terms) != 2 or (c := pattern.value) is None:
            continue
        (i, a), (j, b) = pattern.terms
        if not accepts(a, b):
            continue
        first = c * pow(a, -1, abs(b)) % abs(b) if abs(b) > 1 else 0
        step_j = -a if b > 0 else a
        start_j = (c - a * first) // b
        steps = clip(
            range((tn.sizes[i] - first - 1) // abs(b) + 1), *within(start_j, step_j, tn.sizes[j])
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


def _views(tn: TensorNetwork) -> Iterator[View]:
    yield from (node.view for node in tn.tensors)
    yield tn.result


def _implies(tn: TensorNetwork, axis: Axis, pattern: Pattern) -> bool:
    """Whether an axis whose form is a multiple of the pattern's is inside only for its values."""
    g = divisor(axis.terms)
    allowed = Pattern(axis.terms, range(-axis.offset, axis.size - axis.offset))
    if tuple((leg, a // g) for leg, a in allowed.terms) != pattern.terms:
        return False
    low, high = reach(pattern.terms, tn.sizes)
    inside = clip(quotients(allowed.values, g), low, high)
    return len(meet(inside, pattern.values)) == len(inside)


def _reduced(q: Pattern, p: Pattern, value: int) -> Pattern | None:
    """``α·p + β·q`` in the place of q, for the shared leg that leaves the smallest form."""
    of_p, of_q = dict(p.terms), dict(q.terms)
    shared = of_p.keys() & of_q.keys()
    if 2 * len(shared) < len(of_p) or not q.values:
        return None
    best, least = q, _size(q.terms)
    for leg in sorted(shared):
        g = gcd(of_p[leg], of_q[leg])
        alpha, beta = -of_q[leg] // g, of_p[leg] // g
        terms = linear([(x, alpha * a) for x, a in p.terms] + [(x, beta * a) for x, a in q.terms])
        g = max(1, divisor(terms))
        terms = tuple((leg, a // g) for leg, a in terms)
        if _size(terms) < least:
            values = quotients(affine(q.values, beta, alpha * value), g)
            best, least = Pattern(terms, values), _size(terms)
    return None if best is q else best


def _size(terms: Terms) -> tuple[int, int]:
    return len(terms), sum(abs(a) for _, a in terms)


def _left_over(tn: TensorNetwork, at: int, leg: Leg, kept: range) -> bool:
    """Whether only the tail of an input leg is not met, shorter than a step of the windows."""
    pattern = tn.nodes[at]
    assert isinstance(pattern, Pattern)
    a = dict(pattern.terms)[leg]
    steps = [-a * b for other, b in pattern.terms if other != leg]
    tail = kept[0] == 0 and kept.step == 1 and abs(a) == 1 and pattern.value is not None
    return tail and min(steps, default=0) > 0 and tn.sizes[leg] - len(kept) < max(steps)
