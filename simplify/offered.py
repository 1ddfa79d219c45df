"""Rewrites that are offered, not applied: each is an identity that pays in some networks only.

An offer yields every network that one use of it leads to. Whoever takes one prices it; they are
never part of the fixed point, which they would not end.
"""

from collections.abc import Callable, Iterator
from itertools import permutations
from math import gcd

from tnconv.diagrams.affine import Axis, Leg, Pattern, Tensor, Terms, View, exactly, fresh, reach
from tnconv.diagrams.network import TensorNetwork
from tnconv.simplify.rules import implied, swap
from tnconv.simplify.view_rules import solve_for

Offer = Callable[[TensorNetwork], Iterator[TensorNetwork]]


def polyphase(tn: TensorNetwork) -> Iterator[TensorNetwork]:
    """A step that is a multiple of another splits the finer leg: k = m·a + r, q = o + a.

    [i = s·o + d·k - p] = Σ_{a,r<m,q} [k = m·a + r] [q = o + a] [i = s·q + d·r - p],  s = m·d

    With d = 1 space-to-depth turns a strided convolution into one with stride 1; with s = 1 < d
    the roles of o and k are exchanged, and a dilated convolution becomes one without dilation.
    """
    for at, leg, v, others in _solved(tn):
        for (o, s), (k, d) in permutations(others, 2) if len(others) == 2 else ():
            m, rest = divmod(s, d)
            if rest == 0 and 1 < m < tn.sizes[k]:
                a, r, q = _names(tn, k, k, o)
                count = -(-tn.sizes[k] // m)
                split = tn.substitute(k, 0, {a: m, r: 1}, {a: count, r: m})
                sizes = dict(split.sizes) | {q: tn.sizes[o] + count - 1}
                joined = swap(split, at, exactly({o: 1, a: 1, q: -1}, 0), sizes)
                yield _tidy(joined.substitute(leg, v, {q: s, r: d}))


def window(tn: TensorNetwork) -> Iterator[TensorNetwork]:
    """A leg becomes a view of the others although they overlap in it.

    Σ_i Π[k, o, i] x[i] = x[s·o + d·k - p]: overlapping windows (im2col), adjoint: col2im
    """
    for at, leg, _, others in _solved(tn):
        if len(others) > 1:
            yield _tidy(solve_for(tn, at, leg))


def padding(tn: TensorNetwork) -> Iterator[TensorNetwork]:
    """An input leg is cut to what the windows span: padding, and left over inputs, are a view.

    Σ_i [i = s·o + d·k - p] x[i] = Σ_{j<L} [j = s·o + d·k] x[j - p],  L = (O-1)·s + (K-1)·d + 1
    """
    for _, leg, v, others in _solved(tn):
        size = reach(others, tn.sizes)[1] + 1
        windows = len(others) > 1 and min(a for _, a in others) > 0
        if windows and (v, size) != (0, tn.sizes[leg]):
            yield _tidy(tn.substitute(leg, v, {leg: 1}, {leg: size}))


def composition(tn: TensorNetwork) -> Iterator[TensorNetwork]:
    """Two patterns in a row are one, with a kernel that is made of both kernels.

    Σ_o [i = s·o + d·k - p] [o = s'·r + d'·q - p']
        = Σ_m [m = d·k + s·d'·q] [i = s·s'·r + m - p - s·p'] [0 <= s'·r + d'·q - p' < O]
    """
    for second, o, _, others in _solved(tn):
        if o in tn.open_legs or len(tn.holders[o]) != 2 or len(others) != 2:
            continue
        (first,) = (at for at in tn.holders[o] if at != second)
        outer = tn.nodes[first]
        if not isinstance(outer, Pattern) or outer.value is None or len(outer.terms) != 3:
            continue
        four = solve_for(tn, second, o)
        at = first - (second < first)
        for k, _ in outer.terms:
            for q, _ in others:
                if k != o and (found := _split(four, at, k, q)) is not None:
                    yield _tidy(found)


def displacement(tn: TensorNetwork) -> Iterator[TensorNetwork]:
    """Two copies of a pattern that share a leg depend on the difference of another: k' = k + t.

    [i = s·o + d·k - p] [j = s·o + d·k' - p] = Σ_t [k' = k + t] [i = s·o + d·k - p] [j - i = d·t]

    The products x[i] x[j] of a Gram network are then made once for every t, not for every k, k'.
    """
    for (one, p), (two, q) in permutations(tn.patterns, 2):
        shared = set(p.legs) & set(q.legs)
        if one > two or len(shared) != 1 or p.value is None or q.value is None:
            continue
        for k, twin in _twins(tn, p, q, *shared):
            (t,) = _names(tn, twin)
            both = tn.sizes[k] + tn.sizes[twin] - 1
            moved = tn.substitute(twin, 1 - tn.sizes[k], {k: 1, t: 1}, {t: both})
            yield _tidy(_subtracted(moved, one, two))


def parallel(tn: TensorNetwork) -> Iterator[TensorNetwork]:
    """Two legs that are one leg everywhere, in order: ab = B·a + b.

    Every holder has the plain axes a, b next to each other, or the form B·a + b.
    """
    for a, b in permutations(tn.sizes, 2):
        if tn.holders[a] == tn.holders[b] and (a in tn.open_legs) == (b in tn.open_legs):
            if (found := _fused(tn, a, b)) is not None:
                yield found


OFFERED: tuple[Offer, ...] = (polyphase, window, padding, composition, displacement, parallel)


def _solved(tn: TensorNetwork) -> Iterator[tuple[int, Leg, int, Terms]]:
    """Exact patterns solved for each leg of unit coefficient: ``leg = v + Σ a·other``."""
    for at, pattern in tn.patterns:
        if pattern.value is not None:
            for leg, a in pattern.terms:
                if abs(a) == 1:
                    others = tuple((x, -a * b) for x, b in pattern.terms if x != leg)
                    yield at, leg, a * pattern.value, others


def _names(tn: TensorNetwork, *legs: Leg) -> tuple[Leg, ...]:
    """New names like those of ``legs``."""
    names: list[Leg] = []
    for leg in legs:
        names.append(fresh(leg, {*tn.sizes, *names}))
    return tuple(names)


def _tidy(tn: TensorNetwork) -> TensorNetwork:
    """Without the masks that axes imply."""
    while (after := implied(tn)) is not None:
        tn = after
    return tn


def _split(tn: TensorNetwork, at: int, k: Leg, q: Leg) -> TensorNetwork | None:
    """``[a·k + b·q + rest = v] = Σ_m [m = (a·k + b·q)/g - low] [g·m + rest = v - g·low]``."""
    pattern = tn.nodes[at]
    assert isinstance(pattern, Pattern) and pattern.value is not None
    a = dict(pattern.terms)
    if not {k, q} <= a.keys() or a[k] * a[q] < 0 or len(a) != 4:
        return None
    g = gcd(a[k], a[q])
    small = ((k, a[k] // g), (q, a[q] // g))
    low, high = reach(small, tn.sizes)
    (m,) = _names(tn, "m")
    inner = exactly([*small, (m, -1)], low)
    rest = [term for term in pattern.terms if term[0] not in (k, q)]
    outer = exactly([*rest, (m, g)], pattern.value - g * low)
    nodes = [outer if at == other else node for other, node in enumerate(tn.nodes)]
    return tn.with_([*nodes, inner], sizes=dict(tn.sizes) | {m: high - low + 1})


def _twins(tn: TensorNetwork, p: Pattern, q: Pattern, shared: Leg) -> Iterator[tuple[Leg, Leg]]:
    """Legs k of p and l of q in the same role, where q is p with other legs but ``shared``."""
    sign = 1 if dict(p.terms)[shared] == dict(q.terms)[shared] else -1
    own = sorted((a, tn.sizes[leg], leg) for leg, a in p.terms if leg != shared)
    other = sorted((sign * a, tn.sizes[leg], leg) for leg, a in q.terms if leg != shared)
    equal = abs(dict(p.terms)[shared]) == abs(dict(q.terms)[shared])
    if equal and len(own) == 2 and [x[:2] for x in own] == [x[:2] for x in other]:
        yield from ((mine[2], its[2]) for mine, its in zip(own, other, strict=True))


def _subtracted(tn: TensorNetwork, one: int, two: int) -> TensorNetwork:
    """The difference of two exact patterns in the place of the second."""
    p, q = tn.nodes[one], tn.nodes[two]
    assert isinstance(p, Pattern) and isinstance(q, Pattern)
    assert p.value is not None and q.value is not None
    by_sign = {
        sign: exactly(
            [*q.terms, *((leg, -sign * a) for leg, a in p.terms)], q.value - sign * p.value
        )
        for sign in (1, -1)
    }
    return swap(tn, two, min(by_sign.values(), key=lambda pattern: len(pattern.terms)))


def _fused(tn: TensorNetwork, a: Leg, b: Leg) -> TensorNetwork | None:
    """``a`` and ``b`` as one leg, called like both, if every holder allows."""
    (ab,) = _names(tn, a + b)
    sizes = {leg: size for leg, size in tn.sizes.items() if leg not in (a, b)}
    sizes[ab] = tn.sizes[a] * tn.sizes[b]
    nodes: list[Tensor | Pattern] = []
    for node in tn.nodes:
        if a not in node.legs:
            nodes.append(node)
        elif isinstance(node, Tensor):
            view = _fused_view(tn, node.view, a, b, ab)
            if view is None:
                return None
            nodes.append(node.read_through(view))
        else:
            terms = _fused_terms(tn, node.terms, a, b, ab)
            if terms is None:
                return None
            nodes.append(Pattern(terms, node.values))
    result = _fused_view(tn, tn.result, a, b, ab)
    return None if result is None else tn.with_(nodes, result, sizes)


def _fused_view(tn: TensorNetwork, view: View, a: Leg, b: Leg, ab: Leg) -> View | None:
    axes: list[Axis] = []
    last: Leg | None = None  # what the last axis is, plainly
    for axis in view.axes:
        plain = axis.plain(tn.sizes)
        if plain == b and last == a:
            axes[-1] = Axis(tn.sizes[a] * tn.sizes[b], 0, ((ab, 1),))
        elif plain == a:
            axes.append(axis)
        elif (terms := _fused_terms(tn, axis.terms, a, b, ab)) is None:
            return None
        else:
            axes.append(Axis(axis.size, axis.offset, terms))
        last = plain
    fused = View(view.shape, tuple(axes))
    return None if {a, b} & set(fused.legs) else fused


def _fused_terms(tn: TensorNetwork, terms: Terms, a: Leg, b: Leg, ab: Leg) -> Terms | None:
    """The form with c·(B·a + b) as c·ab; None where a and b are there, but not so."""
    steps = dict(terms)
    if a not in steps and b not in steps:
        return terms
    if b not in steps or steps.get(a) != tn.sizes[b] * steps[b]:
        return None
    return (*(t for t in terms if t[0] not in (a, b)), (ab, steps[b]))
