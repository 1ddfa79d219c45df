"""Rewrite rules of form V: patterns become views where they can, and bands where legs are free."""

from math import gcd

from tnconv.diagrams.affine import Leg, Pattern, injective, linear
from tnconv.diagrams.network import TensorNetwork
from tnconv.simplify.progressions import spread
from tnconv.simplify.rules import NORMAL_RULES, Rule, solve_pair, swap


def solve_step(tn: TensorNetwork) -> TensorNetwork | None:
    """Two legs with coprime coefficients are one leg: a 1x1 kernel with stride, a single output.

    Σ_{i,j} [a·i + b·j = c] T[i] S[j] = Σ_t T[i0 + |b|·t] S[j0 ∓ a·t]
    """
    return solve_pair(tn, lambda a, b: gcd(a, b) == 1)


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
                if (values := spread(pattern.values, a, tn.sizes[leg])) is not None:
                    terms = tuple(t for t in pattern.terms if t[0] != leg)
                    left = {other: size for other, size in tn.sizes.items() if other != leg}
                    return swap(tn, at, Pattern(terms, values), left)
    return None


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
