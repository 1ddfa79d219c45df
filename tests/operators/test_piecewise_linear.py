"""Second derivatives through piecewise linear functions, without the zeros that torch adds."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.func import functional_call, grad, jvp
from torch.utils.checkpoint import checkpoint

from tnconv.operators.piecewise_linear import GRADIENTS
from tnconv.operators.second_derivative import SecondDerivative, uses_of_nodes

pytestmark = pytest.mark.usefixtures("float64")

FUNCTIONS = (
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.3, 0.5), nn.Threshold(0.1, 0.2),
    nn.LeakyReLU(0.2), nn.LeakyReLU(0.2, inplace=True),
)  # fmt: skip
POOLS: dict[int, Sequence[nn.Module]] = {
    1: (nn.MaxPool1d(2, ceil_mode=True),),
    2: (nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((2, 1), dilation=2), nn.AdaptiveMaxPool2d((2, 3))),
    3: (nn.MaxPool3d(2, 1, ceil_mode=True), nn.AdaptiveMaxPool3d(2)),
}
CONVOLUTIONS: Sequence[type[nn.Module]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@st.composite
def networks(draw: st.DrawFn) -> tuple[int, list[nn.Module]]:
    """A convolution, a smooth function, and piecewise linear ones in any order."""
    dims = draw(st.sampled_from([1, 2, 3]))
    convolution: Any = CONVOLUTIONS[dims - 1]
    chosen = [draw(st.sampled_from(FUNCTIONS)), draw(st.sampled_from(POOLS[dims]))]
    layers: list[nn.Module] = [convolution(2, 3, 2), nn.Tanh(), convolution(3, 3, 2)]
    return dims, [*layers, *draw(st.permutations(chosen)), nn.Flatten(), nn.LazyLinear(3)]


def product_by_func(net: nn.Module, x: Tensor, y: Tensor, vector: Sequence[Tensor]) -> Any:
    """``H v``, forward over reverse."""
    values = {name: p.detach() for name, p in net.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(net, given, (x,)), y)

    return jvp(grad(loss), (values,), (dict(zip(values, vector, strict=True)),))[1]


@settings(max_examples=20)
@given(drawn=networks(), checkpointed=st.booleans(), seed=st.integers(0, 99))
def test_products(drawn: tuple[int, list[nn.Module]], checkpointed: bool, seed: int) -> None:
    """Also under a checkpoint, which gives what it saved only once."""
    torch.manual_seed(seed)
    dims, layers = drawn
    net = nn.Sequential(*layers)
    x, y = torch.randn(3, 2, *[6] * dims), torch.randint(3, (3,))
    net(x)
    vector = tuple(torch.randn_like(p) for p in net.parameters())
    expected = product_by_func(net, x, y, vector)
    middle: Any = nn.Sequential(*layers[2:5])
    hidden = net[:2](x)
    hidden = checkpoint(middle, hidden, use_reentrant=False) if checkpointed else middle(hidden)
    loss = nn.functional.cross_entropy(net[5:](hidden), y)
    product = SecondDerivative(loss, tuple(net.parameters()))
    for found, wanted in zip(product(vector), expected.values(), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("function", [*FUNCTIONS[:-1], *POOLS[2], *POOLS[3]], ids=str)
def test_no_zeros(function: nn.Module) -> None:
    """What is recorded of each function's gradient leads to the arriving gradient alone."""
    dims = 3 if function in POOLS[3] else 2
    convolution: Any = CONVOLUTIONS[dims - 1]
    net = nn.Sequential(convolution(1, 2, 2), nn.Tanh(), convolution(2, 2, 1), function)
    loss = net(torch.randn(2, 1, *[6] * dims)).square().sum()
    assert any(node.name() in GRADIENTS for node in uses_of_nodes(loss))
    second = SecondDerivative(loss, tuple(net.parameters()))
    recorded = set[Node]()
    for value in second._values:
        recorded |= {*uses_of_nodes(value)} if value is not None else set()
    names = ("Threshold", "LeakyRelu", "Hardtanh", "MaxPool")
    twice = [n for n in recorded if n.name().endswith("BackwardBackward0")]
    own = [n for n in twice if any(part in n.name() for part in names)]
    assert own
    for node in own:
        assert [below for below, _ in node.next_functions[1:] if below is not None] == []


def test_hooks_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later backward passes over the loss's own graph are torch's."""
    calls, own = list[Node](), GRADIENTS["ReluBackward0"]

    def counted(node: Node, v: Tensor) -> Tensor:
        calls.append(node)
        return own(node, v)

    monkeypatch.setitem(GRADIENTS, "ReluBackward0", counted)
    w = torch.randn(4, requires_grad=True)
    loss = (w * w).relu().pow(3).sum()
    SecondDerivative(loss, (w,))
    assert len(calls) == 1
    torch.autograd.grad(loss, w, create_graph=True)
    assert len(calls) == 1
