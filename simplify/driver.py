"""The driver: apply rules to a fixed point and record which fired."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from tnconv.diagrams.affine import Leg, Node, Pattern, View
from tnconv.diagrams.expression import Expression, Sum
from tnconv.diagrams.network import TensorNetwork
from tnconv.diagrams.notation import node
from tnconv.simplify.rules import NORMAL_RULES, Rule
from tnconv.simplify.view_rules import VIEW_RULES

if TYPE_CHECKING:
    from tnconv.diagrams.drawing import Picture

CACHED = 512  # simplified networks that are remembered


@dataclass(frozen=True)
class Firing:
    """One step: ``rule`` turned ``before`` into ``after``."""

    rule: str
    before: TensorNetwork
    after: TensorNetwork

    @property
    def where(self) -> tuple[Pattern, ...]:
        """The patterns of ``before`` that are gone or changed."""
        left = Counter(pattern for _, pattern in self.after.patterns)
        gone = []
        for _, pattern in self.before.patterns:
            left[pattern] -= 1
            if left[pattern] < 0:
                gone.append(pattern)
        return tuple(gone)

    @property
    def saved(self) -> str:
        """The legs and nodes that are gone, and the legs that became shorter."""
        old, new = self.before.sizes, self.after.sizes
        gone = sorted(old.keys() - new.keys())
        nodes = len(self.before.nodes) - len(self.after.nodes)
        parts = [f"legs {', '.join(gone)}"] if gone else []
        parts += [f"{nodes} node{'s' * (nodes > 1)}"] if nodes > 0 else []
        shorter = [f"{leg} {old[leg]} to {new[leg]}" for leg in new if new[leg] < old.get(leg, 0)]
        cuts = [f"cuts {', '.join(shorter)}"] if shorter else []
        return ", ".join([f"removes {' and '.join(parts)}"] * bool(parts) + cuts) or "tightens"

    def __str__(self) -> str:
        at = f" at {' '.join(map(node, self.where))}" if self.where else ""
        return f"{self.rule}{at}: {self.saved}"


@dataclass(frozen=True, repr=False)
class Simplified:
    """``normal`` keeps patterns that native kernels match, ``views`` turns them into views.

    ``trace`` lists the firings that led to ``normal``, then those from there to ``views``.
    """

    normal: Expression
    views: Expression
    trace: tuple[Firing, ...]

    def __repr__(self) -> str:
        rules = len(self.trace)
        return f"<Simplified by {rules} rule{'s' * (rules != 1)} to {self.views}>"

    @property
    def steps(self) -> list[tuple[str, TensorNetwork]]:
        """The networks as given and after each rule, with titles: what is drawn."""
        first = self.trace[0].before if self.trace else self.normal.terms[0]
        return [("as given", first), *((firing.rule, firing.after) for firing in self.trace)]

    @overload
    def draw(self, path: None = None, **options: Any) -> "Picture": ...
    @overload
    def draw(self, path: str | Path, **options: Any) -> Path: ...
    def draw(self, path: str | Path | None = None, **options: Any) -> "Path | Picture":
        """All steps as a grid, with what changes next highlighted: written, or returned.

        Options are those of `tnconv.diagrams.drawing.draw_steps`.

        Raises:
            ValueError: a sum of several networks, another suffix, or options that do not fit.
        """
        from tnconv.diagrams.drawing import picture_of_steps

        if len(self.normal.terms) != 1:
            raise ValueError(
                f"cannot draw the steps of {len(self.normal.terms)} networks; simplify one term"
            )
        drawn = picture_of_steps(self.steps, **options)
        return drawn if path is None else drawn.save(path)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What a notebook shows: the rules that fired and the simplified network."""
        text = "\n".join([*map(str, self.trace), str(self.views)])
        return self.views._repr_mimebundle_() | {"text/plain": text}


def simplify(network: Expression) -> Simplified:
    r"""Both simplified forms of a network, and how they came about.

    >>> from tnconv.diagrams import conv
    >>> result = simplify(conv((8, 3, 32, 32), (16, 3, 4, 4), stride=4))
    >>> len(list(result.normal.patterns)), len(list(result.views.patterns))
    (2, 0)
    >>> print(*result.trace, sep="\n")
    size_one: removes legs g
    injective_view at Π[4·o1 + k1 - i1 = 0]: removes legs i1 and 1 node
    injective_view at Π[4·o2 + k2 - i2 = 0]: removes legs i2 and 1 node
    """
    forms = [_forms(t.nodes, t.result, tuple(t.sizes.items()), t.scale) for t in network.terms]
    if isinstance(network, TensorNetwork):
        return forms[0]
    return Simplified(
        Sum(tuple(term for form in forms for term in form.normal.terms)),
        Sum(tuple(term for form in forms for term in form.views.terms)),
        tuple(firing for form in forms for firing in form.trace),
    )


@lru_cache(maxsize=CACHED)
def _forms(
    nodes: tuple[Node, ...], result: View, sizes: tuple[tuple[Leg, int], ...], scale: Fraction
) -> Simplified:
    """Both forms of the network with these parts; a network with the same leg names is cached."""
    network = TensorNetwork(nodes, result, dict(sizes), scale)
    normal, to_normal = fixed_point(network, NORMAL_RULES)
    views, to_views = fixed_point(normal, VIEW_RULES)
    return Simplified(normal, views, to_normal + to_views)


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
