"""Graphs of operations: their names, their structure, and where to look for samples in them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

import tnconv
from tests.loops import per_sample_gradients
from tests.strategies import assert_close
from tnconv.models.operation_graph import Graph
from tnconv.quantities import GGNDiagonal, PerSampleGradients

pytestmark = pytest.mark.usefixtures("float64")


class Doubled(torch.autograd.Function):
    """Its context has an attribute that hides the method of the same name."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.name = "mine"
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2 * grads[0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(Doubled.apply(self.first(x)) * self.gain)  # type: ignore[no-untyped-call]
        return found


def test_a_context_that_holds_a_name() -> None:
    """Names of operations are asked of types, everywhere."""
    model, x, y = Model(), torch.randn(5, 3), torch.randint(2, (5,))
    result = tnconv.compute(model, F.cross_entropy, x, y, [PerSampleGradients(), GGNDiagonal()])
    for name, expected in per_sample_gradients(model, F.cross_entropy, x, y, 1 / 5).items():
        assert_close(result[PerSampleGradients][name], expected, 1e-12)
    tnconv.hessian_diagonal(model, nn.CrossEntropyLoss(), x, y)
    with pytest.raises(NotImplementedError, match="through Doubled after layer 'first'"):
        tnconv.hesscale(model, nn.CrossEntropyLoss(), x, y)


def graph(output: Tensor, **leaves: Tensor) -> Graph:
    return Graph([get_gradient_edge(output).node], {id(t): name for name, t in leaves.items()})


def test_structure_tells_who_is_used_where() -> None:
    """Equal operations on other leaves, or wired in another way, are another structure."""
    a, b = (torch.randn(3, requires_grad=True) for _ in range(2))
    forms = [a * b + b, b * a + b, a * b + a, (a + b) * b, a * (b + b), (a * b) + b * 1]
    keys = [graph(form, a=a, b=b).key for form in forms]
    assert len({*keys}) == len(keys)
    again = [graph(form, a=a, b=b).key for form in (a * b + b, b * a + b)]
    assert again == keys[:2]


def test_where_what_is_shared_meets_the_rest() -> None:
    """As far as the first operation that something else flows into."""
    x, w = torch.randn(4, 3), torch.randn(3, 3, requires_grad=True)
    y = (x @ w.exp().t()).tanh()
    found, rigid = graph(y, w=w).around([get_gradient_edge(w).node])
    assert [type(node).__name__ for node in found] == ["ExpBackward0", "MmBackward0"]
    assert [type(node).__name__ for node in rigid] == ["TBackward0"]
