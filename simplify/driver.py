"""The driver: apply rules to a fixed point and record which fired."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from tnconv.diagrams.network import Sum, TensorNetwork
from tnconv.simplify.rules import NORMAL_RULES, VIEW_RULES, Rule


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

    normal: TensorNetwork | Sum
    views: TensorNetwork | Sum
    trace: tuple[Firing, ...]


def simplify(network: TensorNetwork | Sum) -> Simplified:
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
    if isinstance(network, Sum):
        parts = [simplify(term) for term in network.terms]
        return Simplified(
            _add([part.normal for part in parts]),
            _add([part.views for part in parts]),
            tuple(firing for part in parts for firing in part.trace),
        )
    normal, first = fixed_point(network, NORMAL_RULES)
    views, second = fixed_point(normal, VIEW_RULES)
    return Simplified(normal, views, first + second)


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


def _add(terms: Sequence[TensorNetwork | Sum]) -> Sum:
    return reduce(lambda a, b: a + b, terms[1:], Sum((terms[0],)))  # type: ignore[arg-type]
