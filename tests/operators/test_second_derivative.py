"""Products with the Hessian against `torch.func`, where the first convolutions are left out."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from tnconv.operators.second_derivative import SecondDerivative, entries, uses_of_nodes

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """One or two first convolutions of the data, and what comes after."""

    def __init__(self, first: nn.Module, act: nn.Module, shared: bool, twice: bool) -> None:
        super().__init__()
        self.first, self.act, self.head = first, act, nn.LazyLinear(3)
        self.other = first if shared else nn.Conv2d(2, 2, 1)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.first(x)).flatten(1)
        if self.twice:
            y = torch.cat([y, torch.tanh(self.other(x)).flatten(1)], 1)
        return self.head(y)


@st.composite
def networks(draw: st.DrawFn) -> Net:
    given: dict[str, Any] = {"kernel_size": draw(st.sampled_from([1, 2, 3]))}
    given |= {"groups": draw(st.sampled_from([1, 2])), "bias": draw(st.booleans())}
    given |= {"stride": draw(st.sampled_from([1, 2])), "padding": draw(st.sampled_from([0, 1]))}
    if draw(st.booleans()):
        given["dilation"] = draw(st.sampled_from([1, 2]))
        given["padding_mode"] = draw(st.sampled_from(["zeros", "circular"]))
        first: nn.Module = nn.Conv2d(2, 4, **given)
    else:
        first = nn.ConvTranspose2d(2, 4, **given)
    act: nn.Module = draw(st.sampled_from([nn.Tanh(), nn.ReLU(inplace=True), nn.Softplus()]))
    return Net(first, act, draw(st.booleans()), draw(st.booleans()))


@settings(max_examples=15)
@given(net=networks(), penalty=st.booleans(), seed=st.integers(0, 99))
def test_products(net: Net, penalty: bool, seed: int) -> None:
    """Also where a loss reads the first weight by itself, or part of the parameters count."""
    torch.manual_seed(seed)
    x, y = torch.randn(3, 2, 5, 5), torch.randint(3, (3,))
    net(x)
    names, parameters = zip(*net.named_parameters(), strict=True)

    def loss_of(given: dict[str, Tensor]) -> Tensor:
        found = nn.functional.cross_entropy(functional_call(net, given, (x,)), y)
        return found + given["first.weight"].pow(4).sum() if penalty else found

    loss = loss_of(dict(zip(names, parameters, strict=True)))
    alone = not (penalty or (net.twice and net.other is net.first))
    found_alone = len([*entries(uses_of_nodes(loss), parameters)])
    assert found_alone == alone + (net.twice and net.other is not net.first)
    values = {n: p.detach() for n, p in zip(names, parameters, strict=True)}
    vector = tuple(torch.randn_like(p) for p in parameters)
    for first in (0, 1):
        some = {name: v for name, v in zip(names[first:], vector[first:], strict=True)}

        def part(given: dict[str, Tensor]) -> Tensor:
            return loss_of(values | given)

        at = {name: values[name] for name in some}
        expected: Any = jvp(grad(part), (at,), (some,))[1]
        product = SecondDerivative(loss, parameters[first:])
        found = product(vector[first:])
        how: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
        grads = torch.autograd.grad(loss, parameters[first:], **how)
        each = zip(found, expected.values(), product.gradient, grads, strict=True)
        for a, b, g, h in each:
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
            assert torch.allclose(g, h, rtol=1e-10, atol=1e-12)


def test_what_has_no_curvature() -> None:
    w = torch.randn(3, requires_grad=True)
    frozen = SecondDerivative(torch.tensor(1.0), (w,))
    assert frozen((torch.ones(3),))[0].eq(0).all() and frozen.gradient[0].eq(0).all()
    linear = SecondDerivative(w.sum(), (w,))
    assert linear((torch.ones(3),))[0].eq(0).all() and linear.gradient[0].eq(1).all()
