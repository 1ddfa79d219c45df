"""The driver: apply rules to a fixed point and record which fired."""

from collections.abc import Sequence
from dataclasses import dataclass

from tnconv.diagrams.expression import Expression, Sum
from tnconv.diagrams.network import TensorNetwork
from tnconv.simplify.rules import NORMAL_RULES, Rule
from tnconv.simplify.views import VIEW_RULES


@dataclass(frozen=True)
class Firing:
    """One step: ``rule`` turned ``before`` into ``after``."""

    rule: str
    before: TensorNetwork
    after: TensorNetwork

    def __str__(self) -> str:
        gone = sorted(self.before.sizes.keys() - self.after.sizes.keys())
        nodes = len(self.before.nodes) - len(self.after.nodes)
        parts = [f"legs {', '.join(gone)}"] if gone else []
        parts += [f"{nodes} node{'s' * (nodes > 1)}"] if nodes > 0 else []
        return f"{self.rule}: " + (f"removes {' and '.join(parts)}" if parts else "tightens")


@dataclass(frozen=True)
class Simplified:
    """``normal`` keeps patterns that native kernels match, ``views`` turns them into views.

    ``trace`` lists the firings that led to ``normal``, then those from there to ``views``.
    """

    normal: Expression
    views: Expression
    trace: tuple[Firing, ...]


def simplify(network: Expression) -> Simplified:
    r"""Both simplified forms of a network, and how they came about.

    >>> from tnconv.diagrams import conv
    >>> result = simplify(conv((8, 3, 32, 32), (16, 3, 4, 4), stride=4))
    >>> len(list(result.normal.patterns)), len(list(result.views.patterns))
    (2, 0)
    >>> print(*result.trace, sep="\n")
    size_one: removes legs g
    injective_view: removes legs i1 and 1 node
    injective_view: removes legs i2 and 1 node
    """
    normal, views, trace = [], [], []
    for term in network.terms:
        normal.append(fixed_point(term, NORMAL_RULES))
        views.append(fixed_point(normal[-1][0], VIEW_RULES))
        trace += [*normal[-1][1], *views[-1][1]]
    if isinstance(network, TensorNetwork):
        return Simplified(normal[0][0], views[0][0], tuple(trace))
    return Simplified(_sum(normal), _sum(views), tuple(trace))


def fixed_point(
    network: TensorNetwork, rules: Sequence[Rule]
) -> tuple[TensorNetwork, tuple[Firing, ...]]:
    """Apply the first rule that matches until none does.

    Ends because every firing lowers `measure`. The order matters for the form, never for the value:
    cheap local rules come first, then views, and free after injective.
    """
    trace: list[Firing] = []
    matching = True
    while matching:
        matching = False
        for rule in rules:
            if (after := rule(network)) is not None:
                trace.append(Firing(rule.__name__, network, after))
                network, matching = after, True
                break
    return network, tuple(trace)


def measure(network: TensorNetwork) -> tuple[int, ...]:
    """What every rule lowers, lexicographically.

    Legs, pattern terms, leg sizes, pattern coefficients, pattern values, nodes.
    """
    patterns = [pattern for _, pattern in network.patterns]
    return (
        len(network.sizes),
        sum(len(pattern.terms) for pattern in patterns),
        sum(network.sizes.values()),
        sum(abs(a) for pattern in patterns for _, a in pattern.terms),
        sum(len(pattern.values) for pattern in patterns),
        len(network.nodes),
    )


def _sum(reached: Sequence[tuple[TensorNetwork, tuple[Firing, ...]]]) -> Sum:
    return Sum(tuple(network for network, _ in reached))
