"""The representation: its value by definition, its identity, and the moves it offers."""

import copy
import pickle
from fractions import Fraction
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import (
    COEFFICIENTS,
    ZOO,
    Case,
    assert_close,
    brute_force,
    geometries,
    networks,
    operands_for,
    shipped,
)
from tnconv.diagrams import (
    Axis,
    Pattern,
    Sum,
    Tensor,
    TensorNetwork,
    View,
    conv,
    delta,
    exactly,
    kfac_expand,
)

CONV = conv((2, 4, 5), (6, 2, 3), padding=1, groups=2)
X = Tensor("x", View((3,), (Axis(3, 0, (("a", 1),)),)))
SCALAR = View((), ())


def of(*nodes, result=SCALAR, scale=1, **sizes):
    return TensorNetwork(nodes, result, sizes, Fraction(scale))


def renamed_operands(network):
    nodes = (Tensor(n.name + "2", n.view) if isinstance(n, Tensor) else n for n in network.nodes)
    return network.with_(nodes)


@given(network=networks(selections=True), seed=st.integers(0, 9))
def test_reference_is_the_definition(network, seed):
    operands = operands_for(network, seed)
    assert_close(network.reference(**operands), brute_force(network, operands))


@given(network=networks())
def test_reference_of_complex_operands(network):
    """Linear in the real and the imaginary part of an operand that occurs once."""
    names = [node.name for node in network.tensors]
    operands = operands_for(network)
    for name in (name for name in operands if names.count(name) == 1):
        real = network.reference(**operands)
        other = operands_for(network, 1)[name]
        imaginary = network.reference(**operands | {name: other})
        value = network.reference(**operands | {name: torch.complex(operands[name], other)})
        assert_close(torch.view_as_real(value), torch.stack((real, imaginary), -1))


@pytest.mark.parametrize(
    ("network", "value"),
    [
        (of(), 1.0),
        (of(scale=0), 0.0),
        (of(a=3, scale=Fraction(1, 2)), 1.5),
        (of(a=0), 0.0),
        (of(X, a=3), 6.0),
        (of(X, X, a=3), 14.0),
        (of(X, a=3, b=2), 12.0),
        (of(X, Pattern((), range(1, 3)), a=3), 0.0),
        (of(X, exactly({"a": 1}, 2), a=3), 3.0),
        (of(X, result=View((2,), (Axis(2, 0, (("b", 1),)),)), a=3, b=2), [6.0, 6.0]),
        (of(X, result=View((2,), (Axis(2, -1, (("a", 1),)),)), a=3), [2.0, 3.0]),
        (of(X, result=View((4,), (Axis(2, 0), Axis(2, 1))), a=3), [0.0, 6.0, 0.0, 0.0]),
        (of(X, result=View((2,), (Axis(2, 5),)), a=3).zero(), [0.0, 0.0]),
    ],
    ids=str,
)
def test_small_values(network, value):
    """Unheld legs count or broadcast, reading is zero outside, results add into zeros."""
    operands = {"x": torch.tensor([1.0, 2.0, 3.0])} if network.operands else {}
    expected = torch.tensor(value, dtype=torch.float64)
    assert_close(network.reference(**operands), expected)
    assert_close(brute_force(network, operands), expected)


@given(network=networks(selections=True, max_legs=5) | shipped(), data=st.data())
def test_equal_up_to_leg_names(network, data):
    legs = sorted(network.sizes)
    names = data.draw(st.permutations([*legs, *(f"z{leg}" for leg in legs)]))
    other = network.rename(dict(zip(legs, names, strict=False)))
    assert other.rename(dict(zip(names, legs, strict=False))) == network
    order = data.draw(st.permutations(sorted(other.sizes.items())))
    other = other.with_(sizes=dict(order))
    assert other == network and hash(other) == hash(network)
    assert other.canonical == network and other.canonical.sizes == network.canonical.sizes
    operands = operands_for(network)
    assert_close(other.reference(**operands), network.reference(**operands))


@pytest.mark.parametrize("values", [range(1, 2), range(0, 1), range(-1, 2), range(0)], ids=str)
@pytest.mark.parametrize(
    "more",
    [
        (),
        (exactly({"b": 1, "c": 2}, 3),),
        (delta("a", "b"), exactly({"a": 1, "b": 1}, 2)),
        (delta("c", "d"),),
        (exactly({"a": 1, "b": -1, "c": 1, "d": -1}, 0),),
        (delta("b", "d"), exactly({"a": 1, "b": -1, "c": 3, "d": 1}, 0)),
    ],
)
def test_equal_where_only_patterns_tell_legs_apart(values, more):
    """The sign of ``a - b`` is a matter of names: nothing else tells the two legs apart."""
    network = of(Pattern((("a", 1), ("b", -1)), values), *more, a=2, b=2, c=2, d=2)
    for names in permutations("abcd"):
        other = network.rename(dict(zip("abcd", names, strict=True)))
        other = other.with_(sizes=dict.fromkeys("abcd", 2))
        assert other == network and hash(other) == hash(network)


@given(network=networks(min_tensors=1), data=st.data())
def test_unequal_when_anything_differs(network, data):
    at = data.draw(st.integers(0, len(network.nodes) - 1))
    node = network.nodes[at]
    changed = [
        network.scaled(3 if network.scale else 1).with_(scale=network.scale + 1),
        network.without(at),
        network.with_((*network.nodes, node)),
        network.with_(sizes=network.sizes | {"new": 2}),
        network.with_(sizes={leg: n + (leg == "a") for leg, n in network.sizes.items()}),
        network.reshape(1, *network.shape),
    ]
    if isinstance(node, Tensor):
        other = Tensor(node.name + "2", node.view)
        axes = [Axis(a.size, a.offset + 1, a.terms) for a in node.view.axes]
        shifted = Tensor(node.name, View(node.view.shape, tuple(axes)))
        changed += [network.with_((*network.nodes[:at], other, *network.nodes[at + 1 :]))]
        alone = of(node, **network.sizes)
        assert not axes or alone != alone.with_((shifted,))
    elif node.terms:
        (leg, a), *rest = node.terms
        stretched = Pattern(((leg, a + 1), *rest), node.values)
        wider = Pattern(node.terms, range(-90, 91, 7))
        alone = of(node, **network.sizes)
        assert alone.with_((stretched,)) != alone != alone.with_((wider,))
    assert all(network != other for other in changed)
    assert network != 1 and network != "x"


@pytest.mark.parametrize("network", [CONV, kfac_expand((2, 2, 4), 2), of(), CONV.zero()])
def test_copies_are_equal(network):
    hash(network), network.holders, network.graph
    for other in (pickle.loads(pickle.dumps(network)), copy.deepcopy(network), copy.copy(network)):
        assert other == network and hash(other) == hash(network)
        assert other.sizes == network.sizes and other.nodes == network.nodes
    total = network + network
    assert pickle.loads(pickle.dumps(total)) == copy.deepcopy(total) == total


def test_is_frozen():
    with pytest.raises(AttributeError):
        CONV.scale = Fraction(2)
    with pytest.raises(TypeError):
        CONV.sizes["n"] = 3
    sizes = {"a": 3}
    network = TensorNetwork((X,), SCALAR, sizes)
    sizes["a"] = 4
    assert network.sizes == {"a": 3}


@given(network=networks())
def test_incidence(network):
    """Holders, open legs and the graph tell one story, and identify nodes by position."""
    for leg in network.sizes:
        held = tuple(at for at, node in enumerate(network.nodes) if leg in node.legs)
        assert network.holders[leg] == held
        around = {*held, *(["result"] if leg in network.open_legs else [])}
        assert set(network.graph[("leg", leg)]) == around
    assert len(network.graph) == len(network.nodes) + 1 + len(network.sizes)


@given(network=networks(selections=True, max_legs=5), data=st.data())
def test_substitute_a_solved_leg(network, data):
    """``leg = offset + Σ a·other`` as an exact pattern, or put in: the same value."""
    leg, *rest = data.draw(st.permutations(sorted(network.sizes)))
    others = rest[: data.draw(st.integers(0, 2))]
    terms = {other: data.draw(COEFFICIENTS) for other in others}
    offset = data.draw(st.integers(-2, 3))
    solved = exactly({leg: 1, **{other: -a for other, a in terms.items()}}, offset)
    operands = operands_for(network)
    after = network.substitute(leg, offset, terms)
    assert leg not in after.sizes
    assert len(after.nodes) - len(network.nodes) in (0, 1)
    expected = brute_force(network.with_((*network.nodes, solved)), operands)
    assert_close(after.reference(**operands), expected)


@given(network=networks(selections=True, max_legs=4), step=st.integers(1, 3), data=st.data())
def test_substitute_new_legs(network, step, data):
    """Each value of a leg is met once as ``step·q + r``: the value stays."""
    leg = data.draw(st.sampled_from(sorted(network.sizes)))
    new = {"q": -(-network.sizes[leg] // step), "r": step}
    after = network.substitute(leg, 0, {"q": step, "r": 1}, new)
    operands = operands_for(network)
    assert_close(after.reference(**operands), brute_force(network, operands))


@pytest.mark.parametrize(
    ("offset", "coefficient", "masked"),
    [
        (0, 1, False),
        (2, 1, False),
        (3, 1, True),
        (-1, 1, True),
        (2, -1, False),
        (0, 2, False),
        (1, 2, True),
    ],
)
def test_substitute_masks_where_the_range_can_be_left(offset, coefficient, masked):
    network = of(Tensor("x", View.of({"i": 5}, "i")), i=5, o=3, result=View.of({"o": 3}, "o"))
    after = network.substitute("i", offset, {"o": coefficient})
    assert bool(list(after.patterns)) == masked


@given(first=networks(max_legs=3), second=networks(max_legs=3), data=st.data())
def test_connect(first, second, data):
    """``Σ_share first[share, ...] second[share, ...]`` with every shared leg opened in front."""
    second = renamed_operands(second)
    common = [leg for leg in first.sizes if first.sizes[leg] == second.sizes.get(leg)]
    share = data.draw(st.lists(st.sampled_from(common), unique=True)) if common else []
    joined = first.connect(second, share)
    assert len(joined.sizes) == len(first.sizes) + len(second.sizes) - len(share)
    a, b = operands_for(first, 0), operands_for(second, 1)
    opened = [
        brute_force(net.with_(result=net.result.prepend(net.sizes, share)), given)
        for net, given in ((first, a), (second, b))
    ]
    assert_close(joined.reference(**a, **b), torch.tensordot(*opened, dims=_leading(len(share))))


def _leading(count):
    return (list(range(count)), list(range(count)))


@given(network=networks(max_legs=4, plain_result=True), data=st.data())
def test_gram_and_marginal(network, data):
    legs = [axis.plain(network.sizes) for axis in network.result.axes]
    role = {leg: data.draw(st.sampled_from(("over", "keep", "free"))) for leg in legs}
    over, keep, free = ([leg for leg in legs if role[leg] == r] for r in ("over", "keep", "free"))
    operands = operands_for(network)
    value = brute_force(network, operands)
    copy_ = "".join(leg.upper() if role[leg] == "free" else leg for leg in legs)
    result = "".join((*keep, *free, *(leg.upper() for leg in free)))
    expected = torch.einsum(f"{''.join(legs)},{copy_}->{result}", value, value)
    assert_close(network.gram(over, keep).reference(**operands), expected)
    summed = network.marginal(*over)
    expected = value.sum([legs.index(leg) for leg in over]) if over else value
    assert_close(summed.reference(**operands), expected)


def test_gram_of_a_gram():
    """Copies of copies join nowhere by accident."""
    case = Case((2, 2, 5), (1, 2, 2))
    gram = ZOO["kfac_expand"](case)
    pair = gram.connect(gram)
    assert len(pair.sizes) == 2 * len(gram.sizes)
    operands = operands_for(gram)
    value = gram.reference(**operands)
    assert_close(pair.reference(**operands), torch.tensordot(value, value, dims=0))
    again = gram.with_(result=View.of(gram.sizes, "g", "c", "k1", "c'", "k1'")).gram(("c'", "k1'"))
    assert len(again.sizes) == 2 * len(gram.sizes) - 2
    value = value.reshape(2, 2, 2, 2)
    expected = torch.einsum("abcd,efcd->abef", value, value)[None, :, :, None]
    assert_close(again.reference(**operands), expected)


def test_sums():
    other = CONV.scaled(Fraction(1, 2))
    total = CONV + other + (other + CONV)
    assert len(total.terms) == 4 and total.shape == CONV.shape
    operands = operands_for(CONV)
    assert_close(total.reference(**operands), 3 * CONV.reference(**operands))
    assert_close(total.scaled(2).reference(**operands), 6 * CONV.reference(**operands))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: of(X), "leg 'a' has no size; sized legs are"),
        (lambda: of(delta("a", "b"), a=2), "leg 'b' has no size"),
        (lambda: of(result=View.of({"n": 2}, "n")), "leg 'n' has no size"),
        (lambda: of(a=-1), "leg 'a' has size -1; expected at least 0"),
        (
            lambda: of(X, Tensor("x", View((2,), (Axis(2),))), a=3),
            r"'x' appears with shapes \(3,\) and \(2,\)",
        ),
        (lambda: CONV.reshape(7), r"shape \(7,\) cannot have axes"),
        (lambda: CONV.connect(CONV, ("z",)), "cannot share leg 'z' of sizes None and None"),
        (
            lambda: CONV.connect(conv((3, 4, 5), (6, 4, 3)), ("n",)),
            "cannot share leg 'n' of sizes 2 and 3",
        ),
        (lambda: CONV.gram(("c",)), "no plain result axis is leg 'c'"),
        (lambda: CONV.marginal("n", "c"), r"no plain result axis is one of \['c'\]"),
        (lambda: CONV.vjp("bias"), r"no operand 'bias'; the operands are \['weight', 'x'\]"),
        (lambda: CONV.jvp("bias"), "no operand 'bias'"),
        (lambda: CONV.jacobian("bias"), "no operand 'bias'"),
        (lambda: CONV.vjp("x", keep=("z",)), "no leg 'z' to keep"),
        (lambda: CONV.jvp("x", keep=("z",)), "no leg 'z' to keep"),
        (lambda: of(X, a=3).vjp("x", per_sample=True), "no leg 'n' to keep"),
        (lambda: CONV.vjp("x", cotangent="weight"), "'weight' exists already; name another"),
        (lambda: CONV.jvp("x", tangent="weight"), "'weight' exists already; name another"),
        (lambda: CONV.vjp("x", extra={"n": 3}), r"extra legs \['n'\] exist already"),
        (lambda: CONV.jvp("x", extra={"n": 3}), r"extra legs \['n'\] exist already"),
        (lambda: Sum(()), "a sum needs at least one term"),
        (lambda: CONV + of(), "results of shapes"),
        (
            lambda: of(X, a=3) + of(Tensor("x", View((2,), (Axis(2),)))),
            r"'x' appears with shapes \(3,\) and \(2,\)",
        ),
        (lambda: (CONV + CONV).vjp("bias"), "no operand 'bias'"),
    ],
)
def test_errors(build, match):
    with pytest.raises(ValueError, match=match) as error:
        build()
    assert str(error.value).count("\n") <= 1


@given(case=geometries(empty=False, unbatched=True), data=st.data())
def test_narrow_is_a_part_of_the_whole(case, data):
    network = ZOO["conv"](case)
    operands = operands_for(network)
    leg = data.draw(st.sampled_from(sorted(network.result.legs)))
    size = network.sizes[leg]
    start = data.draw(st.integers(0, size - 1))
    step = data.draw(st.integers(1, 3))
    length = data.draw(st.integers(1, (size - 1 - start) // step + 1))
    axes = [axis.plain(network.sizes) for axis in network.result.axes]
    whole = network.reference(**operands).reshape([axis.size for axis in network.result.axes])
    index = torch.arange(start, start + step * length, step)
    part = network.narrow(leg, start, length, step)
    expected = whole.index_select(axes.index(leg), index).reshape(part.shape)
    assert_close(part.reference(**operands), expected)
    assert len(part.shape) == len(network.shape)


@pytest.mark.parametrize("arguments", [("c", 0, 1), ("o1", 0, 99), ("o1", -1, 1), ("o1", 0, 0)])
def test_narrow_refuses(arguments):
    with pytest.raises(ValueError, match="leg"):
        CONV.narrow(*arguments)
