"""`quantities.HesScale` beside others: in one call, in loops, by sample."""

import pytest
import torch
from torch import Tensor, nn

import tnconv
from tests.strategies import assert_close
from tnconv.quantities import GGNDiagonal, Gradient, HesScale, SquaredNorms

pytestmark = pytest.mark.usefixtures("float64")
METHODS = ("hesscale", "gn", "bl89", "hesscale+")
LOSS = nn.CrossEntropyLoss()


class Residual(nn.Module):
    """Branches, a layer that is called twice, norms, and every kind of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")
        self.norm, self.scale = nn.GroupNorm(2, 4), nn.BatchNorm2d(4).eval()
        self.again = nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="circular")
        self.up, self.head = nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Linear(4, 3)
        self.mix = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale(torch.tanh(self.first(x)))
        y = y + torch.sigmoid(self.again(self.norm(self.again(y))))
        y = self.up(nn.functional.avg_pool2d(y, 2)).flatten(1)
        return self.head(torch.tanh(self.mix(y)))


class TimeFirst(nn.Module):
    """Reads its batch in dimension 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.transpose(0, 1))


def case() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Residual(), torch.randn(5, 1, 4, 4), torch.randint(3, (5,))


def test_beside_the_gradient_alone() -> None:
    """A quantity without statistics is none of the gradient's."""
    model, x, y = case()
    both = tnconv.compute(model, LOSS, x, y, [Gradient(), HesScale()])
    expected = torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))
    for (name, found), g in zip(both[Gradient].items(), expected, strict=True):
        assert_close(found, g)
        assert both[HesScale][name].shape == g.shape


@pytest.mark.parametrize("method", METHODS)
def test_in_one_call(method: str) -> None:
    """The sum is the one-line call's; a sample's part is that of the loss of it alone."""
    model, x, y = case()
    whole, each, others = HesScale(method), HesScale(method, per_sample=True), GGNDiagonal()
    result = tnconv.compute(model, LOSS, x, y, [whole, SquaredNorms(), each, others])
    expected = tnconv.hesscale(model, LOSS, x, y, method)
    alone = [tnconv.hesscale(model, LOSS, x[n : n + 1], y[n : n + 1], method) for n in range(5)]
    assert result[whole].keys() == result[each].keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(result[whole][name], value)
        assert_close(result[each][name], torch.stack([one[name] / 5 for one in alone]), 1e-12)
    reference = tnconv.compute(model, LOSS, x, y, [SquaredNorms(), others])
    for quantity in (SquaredNorms(), others):
        for name, value in reference[quantity].items():
            assert torch.equal(result[quantity][name], value)


@pytest.mark.parametrize("method", METHODS)
def test_the_operator_by_sample(method: str) -> None:
    """Parts of samples add up, of chosen parameters, wherever the inputs have the batch."""
    model, x, y = case()
    turned = TimeFirst(model)
    whole = tnconv.hesscale(turned, LOSS, x.transpose(0, 1), y, method)
    names = ["model.first.weight", "model.head.bias"]
    how = {"parameters": names, "per_sample": True, "batch_dim": 1}
    found = tnconv.hesscale(turned, LOSS, x.transpose(0, 1), y, method, **how)
    assert list(found) == names
    for name, each in found.items():
        assert each.shape == (5, *whole[name].shape)
        assert_close(each.sum(0), whole[name], 1e-12)
        alone = tnconv.hesscale(turned, LOSS, x[3:4].transpose(0, 1), y[3:4], method)
        assert_close(each[3], alone[name] / 5, 1e-12)
    with pytest.raises(ValueError, match="backward is True with per_sample"):
        tnconv.hesscale(turned, LOSS, x.transpose(0, 1), y, method, backward=True, per_sample=True)


def test_in_a_loop() -> None:
    model, x, y = case()
    whole, each = HesScale(), HesScale(per_sample=True)
    with tnconv.observe(model, [whole, each, SquaredNorms()]) as observation:
        for at in (slice(0, 2), slice(2, 5)):
            output = model(x[at])
            observation.propagate(LOSS, output, y[at], factor=len(output) / 5)
            (LOSS(output, y[at]) * len(output) / 5).backward()
    result, expected = observation.result(), tnconv.compute(model, LOSS, x, y, [whole, each])
    for quantity in (whole, each):
        for name, value in expected[quantity].items():
            assert_close(result[quantity][name], value, 1e-12)
    assert result.samples == 5


def test_hooks_see_no_walk() -> None:
    """Second derivatives of unusual functions are asked of autograd, past hooks of layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Mish(), nn.Linear(4, 4), nn.Softsign(), nn.Linear(4, 2)
    )
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    found = tnconv.compute(model, LOSS, x, y, [HesScale(), SquaredNorms()])
    expected = tnconv.compute(model, LOSS, x, y, [SquaredNorms()])
    for name, value in expected[SquaredNorms].items():
        assert torch.equal(found[SquaredNorms][name], value)


def test_what_cannot_be_told_apart_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) @ self.layer.weight

    model, x, y = Tied(), torch.randn(5, 3), torch.randint(3, (5,))
    assert tnconv.compute(model, LOSS, x, y, [HesScale()])[HesScale].keys()
    with pytest.raises(NotImplementedError, match=r"'layer\.weight'"):
        tnconv.compute(model, LOSS, x, y, [HesScale(per_sample=True)])
    with pytest.raises(ValueError, match="method is 'ggn'"):
        HesScale("ggn")
    with pytest.raises(RuntimeError, match=r"HesScale needs observation.propagate"):
        with tnconv.observe(model, [HesScale(), SquaredNorms()]):
            LOSS(model(x), y).backward()
