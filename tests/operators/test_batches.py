"""Operators find the samples wherever a model puts them, and take them from another dimension."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnconv
from tests.operators.test_hessian_diagonal import LAYOUTS, Laid
from tests.strategies import assert_close
from tnconv.quantities import PerSampleGradients

pytestmark = pytest.mark.usefixtures("float64")


def case(layout: str, steps: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A model, what it is with its inputs transposed, and a batch of four."""
    layers, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(4, steps, 2)
    model = Laid(layers, LAYOUTS[layout])
    turned = Laid(layers, lambda m, x: LAYOUTS[layout](m, x.transpose(0, 1)))
    return model, turned, x, torch.randint(2, (len(model(x)),))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("steps", [3, 4])
def test_the_empirical_fisher_is_that_of_samples(layout: str, steps: int) -> None:
    model, turned, x, y = case(layout, steps)
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    each = tnconv.compute(model, loss_fn, x, y, [PerSampleGradients()])[PerSampleGradients]
    j = torch.cat([each[name].flatten(1) for name, _ in model.named_parameters()], 1)
    v = torch.randn(j.shape[1])
    how: Any = {"fisher": "empirical"}
    operator = tnconv.FisherOperator(model, loss_fn, [(x, y)], **how)
    assert_close(operator @ v, j.T @ (j @ v), 1e-10)
    again = tnconv.FisherOperator(turned, loss_fn, [(x.transpose(0, 1), y)], **how, batch_dim=1)
    assert_close(again @ v, j.T @ (j @ v), 1e-10)


@pytest.mark.parametrize("layout", ["time first", "logits in rows"])
def test_sampled_fishers_are_unbiased(layout: str) -> None:
    model, turned, x, y = case(layout, 4)
    loss_fn, v = nn.CrossEntropyLoss(), torch.randn(17)
    exact = tnconv.GGNOperator(model, loss_fn, [(x, y)]) @ v
    found = tnconv.FisherOperator(
        turned, loss_fn, [(x.transpose(0, 1), y)], fisher="mc", samples=4000, batch_dim=1
    )
    assert_close(found @ v, exact, 0.1)


LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss(), lambda n: torch.randint(2, (n,))),
    "squared errors": (nn.MSELoss(), lambda n: torch.randn(n, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_matrices_of_low_rank(layout: str, loss: str) -> None:
    model, turned, x, _ = case(layout, 3)
    loss_fn, targets = LOSSES[loss]
    x, y = x[:3], targets(len(model(x[:3])))
    turned_x, how = x.transpose(0, 1), {"batch_dim": 1}
    dense = tnconv.GGNOperator(model, loss_fn, [(x, y)]) @ torch.eye(17)
    found = tnconv.low_rank_ggn(turned, loss_fn, turned_x, y, **how)
    assert_close(found @ torch.eye(17)[0], dense[0], 1e-9)
    gradient = torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))
    for one, other in zip(found.gradient().values(), gradient, strict=True):
        assert_close(one, other, 1e-9)
    subset: Any = {"curvature_samples": [0, 2], **how}
    if "logits" in layout:
        with pytest.raises(ValueError, match="expected a row for each of 3 samples"):
            tnconv.low_rank_ggn(turned, loss_fn, turned_x, y, **subset)
        return
    part = tnconv.low_rank_ggn(turned, loss_fn, turned_x, y, **subset)
    some = tnconv.GGNOperator(model, loss_fn, [(x[[0, 2]], y[[0, 2]])]) @ torch.eye(17)
    assert_close(part @ torch.eye(17)[0], some[0], 1e-9)


def test_losses_that_are_not_known_count_samples_along_their_dimension() -> None:
    model, x, y = nn.Linear(2, 2), torch.randn(3, 6, 2), torch.randint(2, (6,))

    class Own(nn.Module):
        reduction = "mean"

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(output.mean(0), target)

    halves = [(x[:, :2], y[:2]), (x[:, 2:], y[2:])]
    v = torch.randn(6)
    for kind in (tnconv.GGNOperator, tnconv.HessianOperator):
        whole = kind(model, Own(), [(x, y)]) @ v
        assert_close(kind(model, Own(), halves, batch_dim=1) @ v, whole, 1e-10)
