"""Random networks on which a given rule must fire."""

from collections.abc import Callable
from math import gcd
from typing import Any

from hypothesis import strategies as st

from tests.strategies import networks
from tnconv.diagrams import Node, Pattern, Tensor, TensorNetwork, View, exactly, mask
from tnconv.diagrams.affine import reach

Trigger = Callable[[Any, TensorNetwork], TensorNetwork]
STEPS = st.sampled_from((1, 2, 3, -1, -2, -3))
SIGNS = st.sampled_from((1, -1))


@st.composite
def firing(draw: Any, rule: str) -> TensorNetwork:
    """A random network with something in a random place that makes the rule fire."""
    network = draw(networks(max_points=400).filter(lambda net: 0 not in net.sizes.values()))
    return TRIGGERS[rule](draw, network)


def _with(draw: Any, network: TensorNetwork, *added: Node, **sizes: int) -> TensorNetwork:
    """The network with nodes in random places and new legs."""
    nodes = draw(st.permutations([*network.nodes, *added]))
    return network.with_(nodes, sizes=dict(network.sizes) | sizes)


def _holding(draw: Any, *legs: str, **sizes: int) -> list[Tensor]:
    """A tensor for each of some of the legs, so that others are free."""
    held = [leg for leg in legs if draw(st.booleans())]
    return [Tensor(f"of_{leg}", View.of(sizes, leg)) for leg in held]


def _open(draw: Any, network: TensorNetwork, *legs: str) -> TensorNetwork:
    """Some of the legs are open, too."""
    shown = [leg for leg in legs if draw(st.booleans())]
    return network.with_(result=network.result.prepend(network.sizes, shown))


def _size_one(draw: Any, network: TensorNetwork) -> TensorNetwork:
    terms = [("z", draw(STEPS)), (draw(st.sampled_from(sorted(network.sizes))), draw(STEPS))]
    start = draw(st.integers(-4, 4))
    return _with(draw, network, mask(terms, start, draw(st.integers(1, 6))), z=1)


def _scalar(draw: Any, network: TensorNetwork) -> TensorNetwork:
    if draw(st.booleans()):
        return _with(draw, network, z=draw(st.integers(2, 4)))
    return _with(draw, network, exactly({}, draw(st.sampled_from((0, 0, 1)))))


def _trivial(draw: Any, network: TensorNetwork) -> TensorNetwork:
    legs = draw(st.lists(st.sampled_from(sorted(network.sizes)), min_size=1, max_size=3))
    terms = exactly([(leg, draw(STEPS)) for leg in legs], 0).terms or ((legs[0], 1),)
    low, high = reach(terms, network.sizes)
    below, above = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    if draw(st.booleans()):  # always
        return _with(draw, network, Pattern(terms, range(low - below, high + above + 1)))
    start = draw(st.integers(low, high))  # too many values above
    return _with(draw, network, Pattern(terms, range(start, high + above + 2)))


def _content(draw: Any, network: TensorNetwork) -> TensorNetwork:
    legs = draw(st.lists(st.sampled_from(sorted(network.sizes)), min_size=1, max_size=3))
    terms = exactly([(leg, draw(STEPS)) for leg in legs], 0).terms or ((legs[0], 1),)
    g, step = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    start = draw(st.integers(-6, 6))
    values = range(start, start + draw(st.integers(1, 12)), step)
    return _with(draw, network, Pattern(tuple((leg, g * a) for leg, a in terms), values))


def _implied(draw: Any, network: TensorNetwork) -> TensorNetwork:
    legs = draw(st.lists(st.sampled_from(sorted(network.sizes)), min_size=1, max_size=3))
    terms = exactly([(leg, draw(STEPS)) for leg in legs], 0).terms or ((legs[0], 1),)

    def values() -> range:
        start = draw(st.integers(-6, 6))
        return range(start, start + draw(st.integers(1, 12)), draw(st.integers(1, 3)))

    return _with(draw, network, Pattern(terms, values()), Pattern(terms, values()))


def _pair(draw: Any, network: TensorNetwork, a: int, b: int) -> TensorNetwork:
    """Two new legs, with one value of ``a·y + b·z`` that may or may not be met."""
    sizes = {"y": draw(st.integers(2, 6)), "z": draw(st.integers(2, 6))}
    low, high = reach((("y", a), ("z", b)), sizes)
    pattern = exactly({"y": a, "z": b}, draw(st.integers(low - 1, high + 1)))
    more = _holding(draw, "y", "z", **sizes)
    if draw(st.booleans()):  # it is held by another pattern
        other = draw(st.sampled_from(sorted(network.sizes)))
        more.append(mask({"y": draw(STEPS), other: draw(STEPS)}, 1, 4))  # type: ignore[arg-type]
    return _open(draw, _with(draw, network, pattern, *more, **sizes), "y", "z")


def _solve(draw: Any, network: TensorNetwork) -> TensorNetwork:
    return _pair(draw, network, draw(SIGNS), draw(SIGNS))


def _solve_step(draw: Any, network: TensorNetwork) -> TensorNetwork:
    steps = st.sampled_from(((1, 2), (2, 3), (3, 2), (1, 3), (3, 1), (4, 3), (1, 1), (2, 1)))
    a, b = draw(steps)
    return _pair(draw, network, a * draw(SIGNS), b * draw(SIGNS))


def _index(draw: Any, s: int, d: int, **sizes: int) -> list[Node]:
    """``[i = s·o + d·k - p]`` with tensors on some of the legs."""
    pattern = exactly({"o": s, "k": d, "i": -1}, draw(st.integers(0, 3)))
    return [pattern, *_holding(draw, "i", "k", "o", **sizes)]


def _difference(draw: Any, network: TensorNetwork) -> TensorNetwork:
    sizes = {leg: draw(st.integers(2, 5)) for leg in "iok"}
    s, d, times = draw(STEPS), draw(STEPS), draw(STEPS)
    other = draw(st.sampled_from(sorted(network.sizes)))
    terms = exactly({"o": times * s, "k": times * d, other: draw(STEPS)}, 0).terms
    start = draw(st.integers(-3, 6))
    values = range(start, start + draw(st.sampled_from((1, 1, 2, 5))))
    nodes = _index(draw, s, d, **sizes)
    return _open(draw, _with(draw, network, *nodes, Pattern(terms, values), **sizes), *"iok")


def _crop(draw: Any, network: TensorNetwork) -> TensorNetwork:
    if draw(st.booleans()):
        size, step = draw(st.integers(3, 7)), draw(st.integers(1, 3))
        start = draw(st.integers(1, size - 1))
        nodes = [Pattern((("z", 1),), range(start, start + 6, step)), *_holding(draw, "z", z=size)]
        return _open(draw, _with(draw, network, *nodes, z=size), "z")
    sizes = {leg: draw(st.integers(2, 5)) for leg in "ok"} | {"i": 9}
    c = draw(st.sampled_from((2, 3)))
    nodes = _index(draw, c * draw(st.integers(1, 2)), c * draw(st.integers(1, 2)), **sizes)
    return _open(draw, _with(draw, network, *nodes, **sizes), *"iok")


def _injective_view(draw: Any, network: TensorNetwork) -> TensorNetwork:
    sizes = {leg: draw(st.integers(2, 4)) for leg in "ok"} | {"i": draw(st.integers(2, 9))}
    s = sizes["k"] + draw(st.integers(0, 2))
    d = draw(st.sampled_from([d for d in (1, 2, 3) if gcd(s, d) == 1]))
    g = draw(st.sampled_from((1, 1, 2)))
    nodes = _index(draw, g * s * draw(SIGNS), g * d * draw(SIGNS), **sizes)
    return _open(draw, _with(draw, network, *nodes, **sizes), *"iok")


def _free(draw: Any, network: TensorNetwork) -> TensorNetwork:
    legs = draw(st.lists(st.sampled_from(sorted(network.sizes)), min_size=1, max_size=2))
    terms = [("z", draw(STEPS)), *((leg, draw(STEPS)) for leg in legs)]
    value = draw(st.integers(-3, 6))
    return _with(draw, network, exactly(terms, value), z=draw(st.integers(2, 5)))


TRIGGERS: dict[str, Trigger] = {
    "size_one": _size_one,
    "scalar": _scalar,
    "trivial": _trivial,
    "content": _content,
    "implied": _implied,
    "solve": _solve,
    "difference": _difference,
    "crop": _crop,
    "solve_step": _solve_step,
    "injective_view": _injective_view,
    "free": _free,
}
