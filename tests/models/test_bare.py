"""Parameters that a model multiplies with or adds by itself: layers without a module."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnconv
from tests.loops import per_sample_gradients
from tests.models.test_capture import QUANTITIES, assert_first_order, hooks
from tests.models.test_second_order import diagonals
from tests.operators.test_hessian_diagonal import check as check_hessian
from tests.strategies import assert_close
from tnconv.quantities import KFAC, GGNDiagonal, SquaredNorms

pytestmark = pytest.mark.usefixtures("float64")
EXACT, EACH = GGNDiagonal(), GGNDiagonal(per_sample=True)


def random(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class Scale(nn.Module):
    """A module of a user's own, of bare parameters alone."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gain, self.shift = random(*shape), random(*shape)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(torch.mul(x, self.gain), self.shift)


class Block(nn.Module):
    """Layer scale, gates, a positional embedding, a number; used once, twice, on two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(2, 4, 3, padding=1), random(4, 1, 1)
        self.place, self.number = random(1, 4, 5, 5), random()
        self.own, self.head = Scale(4), nn.Linear(4, 3)
        self.frozen, self.unused = random(4), random(3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.place + self.conv(x)
        y = y + self.scale * self.conv(x).tanh()
        gate = y.mean((2, 3), keepdim=True).sigmoid()
        small = F.avg_pool2d(gate * y, 2) * self.scale
        z = self.own(self.own(small.mean((2, 3))).sin()) * self.frozen
        return self.head(z) * self.number + (gate * self.place).sum((1, 2, 3))[:, None]


class Mixed(nn.Module):
    """Used in ways that no diagram knows beside one that it does."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.use, self.body = random(4), use, nn.Linear(4, 4)
        self.gain = random(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.body(x) * self.weight, self.weight) * self.gain


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "square": lambda x, w: x + w * w,
    "quotient": lambda x, w: x / (1 + w.square()),
    "in place": lambda x, w: x.sin().mul_(w),
    "factor": lambda x, w: torch.add(x, w, alpha=2),
    "number": lambda x, w: x + 2 * w,
    "constant": lambda x, w: x + torch.ones(4) * w,
    "view": lambda x, w: x + w[None],
}


def check(model: nn.Module, x: Tensor, y: Tensor) -> None:
    loss = nn.CrossEntropyLoss(reduction="sum")
    each = per_sample_gradients(model, loss, x, y)
    assert_first_order(tnconv.compute(model, loss, x, y, QUANTITIES), each)
    with tnconv.observe(model, QUANTITIES) as observation:
        for inputs, targets in zip(x.split(2), y.split(2), strict=True):
            loss(model(inputs), targets).backward()
    assert_first_order(observation.result(), each)
    assert hooks(model) == 0


def check_diagonals(model: nn.Module, x: Tensor, y: Tensor) -> None:
    loss = nn.CrossEntropyLoss()
    result = tnconv.compute(model, loss, x, y, [EXACT, EACH, SquaredNorms()])
    expected = diagonals(model, loss, x, y)
    for name, value in result[EACH].items():
        assert_close(value, expected[name], 1e-10)
        assert_close(result[EXACT][name], expected[name].sum(0), 1e-10)
    assert hooks(model) == 0


@pytest.mark.parametrize("samples", [1, 5])
def test_every_quantity_without_a_warning(samples: int) -> None:
    model, x, y = Block(), torch.randn(samples, 2, 5, 5), torch.randint(3, (samples,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check(model, x, y)
        loss = nn.CrossEntropyLoss()
        result = tnconv.compute(model, loss, x, y, [EXACT, EACH, SquaredNorms()])
    expected = diagonals(model, loss, x, y)
    assert result[EXACT].keys() == expected.keys() - {"unused"}
    for name, value in result[EACH].items():
        assert_close(value, expected[name], 1e-10)
        assert_close(result[EXACT][name], expected[name].sum(0), 1e-10)


def test_factors() -> None:
    """A scale has a block for every entry, a shift one block for all."""
    model, x, y = Scale(3), torch.randn(6, 3), torch.randn(6, 3)
    kfac = KFAC("expand", "type-2")
    result = tnconv.compute(model, nn.MSELoss(reduction="sum"), x, y, [kfac])[kfac]
    assert_close(result["gain"].input.flatten(), x.square().mean(0), 1e-10)
    assert_close(result["gain"].grad_output.flatten(), torch.full((3,), 12.0), 1e-10)
    assert_close(result["shift"].blocks[0], 12 * torch.eye(3), 1e-10)


@pytest.mark.parametrize("case", OTHERS)
def test_other_uses(case: str) -> None:
    """Where samples meet what the parameter became, without a warning."""
    model, x, y = Mixed(OTHERS[case]), torch.randn(6, 4), torch.randint(4, (6,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check(model, x, y)
        check_diagonals(model, x, y)


def test_parameters_that_modules_use_as_well() -> None:
    model, x, y = Shared(), torch.randn(6, 4), torch.randint(4, (6,))
    check(model, x, y)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gain = nn.LayerNorm(4), Scale(4)
        self.gain.gain = self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.gain(self.norm(x))


def test_errors_leave_nothing_behind() -> None:
    class Broken(Scale):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError("no output" if x.dim() else "")

    model = nn.Sequential(Scale(4), Broken(4))
    for _ in range(2):
        with pytest.raises(ArithmeticError), tnconv.observe(model, [SquaredNorms()]):
            model(torch.randn(3, 4))
        assert hooks(model) == 0
        assert not torch._C._len_torch_function_stack()


class Gated(nn.Module):
    """Bare parameters before and after curvature."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.own, self.head = nn.Linear(4, 3), Scale(3), nn.Linear(3, 3)
        self.shift = random(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.own(self.first(x)).sigmoid() + self.shift)


@pytest.mark.parametrize("names", [None, ["own.gain", "head.bias"]])
def test_hessian_diagonal(names: list[str] | None) -> None:
    model, x, y = Gated(), torch.randn(5, 4), torch.randint(3, (5,))
    check_hessian(model, nn.CrossEntropyLoss(), x, y, names)
    assert hooks(model) == 0
