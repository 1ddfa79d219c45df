"""Extremes of dtype and size in quantities, operators and optimizers of whole networks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tnconv
from tests.strategies import assert_close
from tnconv import quantities as q

LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss, lambda n: torch.zeros(n, dtype=torch.long)),
    "probabilities": (nn.CrossEntropyLoss, lambda n: torch.full((n, 3), 1 / 3)),
    "squares": (nn.MSELoss, lambda n: torch.zeros(n, 3)),
    "logits": (nn.BCEWithLogitsLoss, lambda n: torch.ones(n, 3)),
    "absolute": (nn.L1Loss, lambda n: torch.ones(n, 3)),
}
CURVATURE = [
    *(q.GGNDiagonal(), q.GGNDiagonal("mc"), q.GGNDiagonal(per_sample=True)),
    *(q.KFAC(), q.KFAC("reduce", "type-2"), q.KFAC("expand", "empirical"), q.KFLR()),
    *(q.SumOfSquares(), q.SquaredNorms(), q.DotProducts(), q.PerSampleGradients()),
]


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(16, 3)
    )  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empty_batches_give_zeros(loss: str, reduction: str) -> None:
    make, targets = LOSSES[loss]
    model, x, y = net(), torch.rand(0, 2, 3, 3), targets(0)
    result = tnconv.compute(model, make(reduction=reduction), x, y, CURVATURE)
    for quantity in CURVATURE:
        for name, parameter in model.named_parameters():
            found = result[quantity][name]
            for value in found if isinstance(found, tuple) else (found,):
                assert (value == 0).all()
            if isinstance(quantity, q.GGNDiagonal):
                lead = (0,) if quantity.per_sample else ()
                assert found.shape == (*lead, *parameter.shape)
    diagonal = tnconv.hessian_diagonal(model, make(reduction=reduction), x, y)
    assert all((value == 0).all() for value in diagonal.values())
    operator = tnconv.GGNOperator(model, make(reduction=reduction), [(x, y)])
    assert (operator @ torch.ones(operator.shape[0]) == 0).all()


@given(samples=st.integers(0, 3), empty=st.integers(0, 3), seed=st.integers(0, 99))
def test_empty_micro_batches_change_nothing(samples: int, empty: int, seed: int) -> None:
    """A loop over micro-batches, some of them empty, is one over the others."""
    torch.manual_seed(seed)
    model, loss_fn = net().double(), nn.CrossEntropyLoss(reduction="sum")
    sizes = [samples] * 2 + [0] * empty
    batches = [(torch.rand(n, 2, 3, 3).double(), torch.randint(3, (n,))) for n in sizes]
    found = []
    for chosen in (batches, batches[::-1], batches[:2]):
        quantities = [q.SumOfSquares(), q.GGNDiagonal(), q.SquaredNorms()]
        with tnconv.observe(model, quantities) as observation:
            for x, y in chosen:
                output = model(x)
                observation.propagate(loss_fn, output, y)
                loss_fn(output, y).backward()
            result = observation.result()
        found.append((result[quantities[0]], result[quantities[1]], result[quantities[2]]))
    for other in (found[0], found[1]):
        for at, each in enumerate(found[2]):
            for name, expected in each.items():
                value = other[at][name]
                flipped = value if at < 2 or other is found[0] else value.roll(samples)
                assert_close(flipped, expected, 1e-10)


class Spectral(nn.Module):
    """Real parameters before, in and after complex numbers."""

    def __init__(self, ends_complex: bool) -> None:
        super().__init__()
        self.first, self.gain = nn.Linear(4, 6), nn.Parameter(torch.randn(4))
        self.last, self.ends_complex = nn.Linear(4, 3), ends_complex

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft(self.first(x)) * self.gain
        return z if self.ends_complex else self.last(z.abs())


def distance(output: Tensor, targets: Tensor) -> Tensor:
    return (output - targets).abs().square().sum()


@pytest.mark.filterwarnings("ignore:.*runs again")
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("ends_complex", [False, True])
def test_real_parameters_around_complex_numbers(ends_complex: bool) -> None:
    model, x = Spectral(ends_complex), torch.randn(5, 4)
    y = torch.randn_like(model(x))
    kinds = [q.PerSampleGradients(), q.SquaredNorms()]
    result = tnconv.compute(model, distance, x, y, kinds)
    for name, found in result[kinds[0]].items():
        parameter = model.get_parameter(name)
        assert not found.is_complex() and not result[kinds[1]][name].is_complex()
        for n in range(5):
            loss = distance(model(x[n : n + 1]), y[n : n + 1])
            (gradient,) = torch.autograd.grad(loss, parameter)
            assert_close(found[n], gradient, 1e-10)
            assert_close(result[kinds[1]][name][n], gradient.square().sum(), 1e-10)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, dtype=torch.complex64), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).abs())


def test_complex_parameters_are_refused_before_any_work() -> None:
    model, x, y = Complex(), torch.randn(5, 3, dtype=torch.complex64), torch.zeros(5).long()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    loss_fn = nn.CrossEntropyLoss()
    uses = [
        lambda: tnconv.compute(model, loss_fn, x, y, [q.SquaredNorms()]),
        lambda: tnconv.observe(model, [q.Variance()]).__enter__(),
        lambda: tnconv.optim.KFAC(model),
        lambda: tnconv.hessian_diagonal(model, loss_fn, x, y),
        lambda: tnconv.GGNOperator(model, loss_fn, [(x, y)]),
        lambda: tnconv.FisherOperator(model, loss_fn, [(x, y)], fisher="empirical"),
    ]
    for use in uses:
        with pytest.raises(
            NotImplementedError, match=r"'first\.weight' has dtype torch\.complex64"
        ):
            use()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantities_of_models_in_half_precision(dtype: torch.dtype) -> None:
    """In float32: squares of small gradients would be zero, and sums of large ones infinite."""
    torch.manual_seed(0)
    model, loss_fn = (
        nn.Sequential(nn.Linear(300, 4), nn.Linear(4, 3)).to(dtype),
        nn.MSELoss(reduction="sum"),
    )
    kinds = [
        q.SumOfSquares(),
        q.SquaredNorms(),
        q.KFAC("expand", "empirical", reduction="sum"),
    ]
    for scale in (1e-3, 30.0):
        x, y = (scale * torch.rand(6, 300)).to(dtype), torch.zeros(6, 3, dtype=dtype)
        found = tnconv.compute(model, loss_fn, x, y, kinds)
        wide = nn.Sequential(nn.Linear(300, 4), nn.Linear(4, 3))
        wide.load_state_dict(model.float().state_dict())
        model.to(dtype)
        expected = tnconv.compute(wide, loss_fn, x.float(), y.float(), kinds)
        for kind in kinds:
            for name, value in found[kind].items():
                pairs = [(value, expected[kind][name])]
                if isinstance(value, tuple):
                    pairs = list(zip(value, expected[kind][name], strict=True))
                for one, other in pairs:
                    assert one.dtype == torch.float32
                    most = other.abs().max()
                    assert most > 0 and (one - other).abs().max() < 0.06 * most
