"""The scale of A and B: reduction x Fisher x samples x micro-batches, against the definition.

For a loss ``L = c Σ_n l_n`` of all samples, ``A = 1/N Σ_n x xᵀ``; B is the matrix of the loss in
the layer's output: ``c Σ_n ∂²l_n`` (type-2), ``c Σ_n 1/M Σ_m s sᵀ`` of M draws (mc), or
``c Σ_n ∂l_n ∂l_nᵀ`` (empirical); for "forward-only" it is the identity. c is 1 for a sum, and 1/D
for a mean, D the number of entries for squared errors, of samples for cross-entropy.
"""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from tests.strategies import assert_close
from tnconv.optim import KFAC
from tnconv.quantities import SampledColumns

pytestmark = pytest.mark.usefixtures("float64")
N, C = 8, 3
TABLE = list(
    product(
        ("mean", "sum"),
        (nn.CrossEntropyLoss, nn.MSELoss),
        ("type-2", "mc", "empirical", "forward-only"),
        (1, 3),
        ([N], [3, 1, 4]),
    )
)


def draw(at: int, output: Tensor) -> Tensor:
    """The m-th draw, which depends on its own sample alone."""
    return torch.sin((5 + at) * output)


def expected(loss: type[nn.Module], fisher: str, samples: int, out: Tensor, y: Tensor) -> Tensor:
    """The sum over samples, without c."""
    if fisher == "forward-only":
        return torch.eye(C)
    if fisher == "mc":
        draws = torch.stack([draw(at, out) for at in range(samples)])
        return torch.einsum("mnc,mnd->cd", draws, draws) / samples
    if loss is nn.MSELoss:
        gradients, hessian = 2 * (out - y), 2 * N * torch.eye(C)
    else:
        p = out.softmax(1)
        gradients = p - nn.functional.one_hot(y, C)
        hessian = p.sum(0).diag() - p.T @ p
    return gradients.T @ gradients if fisher == "empirical" else hessian


@pytest.mark.parametrize(("reduction", "loss", "fisher", "samples", "parts"), TABLE)
def test_factors_have_the_scale_of_the_table(
    reduction, loss, fisher, samples, parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(4, C, bias=False), torch.randn(N, 4)
    y = torch.randn(N, C) if loss is nn.MSELoss else torch.randint(C, (N,))
    loss_fn, entries = loss(reduction=reduction), C if loss is nn.MSELoss else 1

    def columns(source, loss_fn, output: Tensor, targets: Tensor) -> Tensor:
        scale = entries * len(output) if reduction == "mean" else 1
        draws = torch.stack([draw(at, output) for at in range(source.samples)])
        return draws / (source.samples * scale) ** 0.5

    monkeypatch.setattr(SampledColumns, "columns", columns)
    optimizer = KFAC(
        layer, 0.0, fisher=fisher, samples=samples, loss_fn=loss_fn, reduction=reduction
    )
    for each, targets in zip(x.split(parts), y.split(parts), strict=True):
        share = len(each) / N if reduction == "mean" else 1.0
        (share * loss_fn(layer(each), targets)).backward()
    optimizer.step()
    state, out = optimizer.state[layer.weight], layer(x).detach()
    c = 1 / (N * entries) if reduction == "mean" and fisher != "forward-only" else 1
    assert_close(state["A"][0], x.T @ x / N, 1e-10)
    assert_close(state["B"][0], c * expected(loss, fisher, samples, out, y), 1e-10)
