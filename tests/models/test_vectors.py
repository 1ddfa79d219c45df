"""Quantities of a user's own, of vectors of a user's own: several columns after every output."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import tnconv
from tests.models.test_capture import Residual, data, hooks
from tests.strategies import assert_close
from tnconv.diagrams import ggn_diagonal
from tnconv.quantities import Gradient, Quantity, Statistic, Vectors

pytestmark = pytest.mark.usefixtures("float64")


@dataclass(frozen=True)
class Units(Vectors):
    """``√2 δ[m, c]``: the root of the Hessian of a sum of squares."""

    def columns(self, loss_fn, output: Tensor, targets) -> Tensor:
        one = torch.eye(output.shape[1]) * 2**0.5
        return one[:, None].expand(-1, *output.shape)


@dataclass(frozen=True)
class GaussNewtonDiagonal(Quantity[Tensor]):
    def statistics(self) -> Mapping[str, Statistic]:
        return {"diagonal": Statistic(ggn_diagonal, vectors=Units())}

    def result(self, found: Mapping[str, Tensor], samples: int) -> Tensor:
        return found["diagonal"]


def sum_of_squares(output, targets):
    return (output - targets).square().sum()


def test_columns_are_propagated_through_shared_layers():
    model, (x, _) = Residual().eval(), data()
    targets = torch.randn(5, 3)
    quantities = [Gradient(), GaussNewtonDiagonal()]
    result = tnconv.compute(model, sum_of_squares, x, targets, quantities)
    params = dict(model.named_parameters())
    jacobians = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, x))(params)
    assert result[GaussNewtonDiagonal].keys() == params.keys() - {"unused.weight", "unused.bias"}
    for name, diagonal in result[GaussNewtonDiagonal].items():
        assert_close(diagonal, 2 * jacobians[name].square().sum((0, 1)), 1e-10)
    model.zero_grad()
    sum_of_squares(model(x), targets).backward()
    for name, gradient in result[Gradient].items():
        assert_close(gradient, params[name].grad, 1e-10)
    assert hooks(model) == 0


def test_columns_alone_without_the_losss_gradient():
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    result = tnconv.compute(model, sum_of_squares, x, torch.zeros(6, 3), [GaussNewtonDiagonal()])
    expected = 2 * x.square().sum(0).expand(3, -1)
    assert_close(result[GaussNewtonDiagonal]["weight"], expected, 1e-10)


def test_layers_without_diagrams():
    """One slope for all: its gradients are taken where samples meet it."""
    model, x = nn.Sequential(nn.Linear(4, 3), nn.PReLU()), torch.randn(6, 4)
    result = tnconv.compute(model, sum_of_squares, x, torch.zeros(6, 3), [GaussNewtonDiagonal()])
    below = model[0](x).detach().clamp(max=0)
    assert_close(result[GaussNewtonDiagonal]["1.weight"], 2 * below.square().sum()[None], 1e-10)
    assert hooks(model) == 0
