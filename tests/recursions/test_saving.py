"""Memory-saving layers have the diagonals of torch's own."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tnconv
from tests.strategies import assert_close
from tnconv.optim import AdaHesScale

pytestmark = pytest.mark.usefixtures("float64")
LOSS = nn.CrossEntropyLoss()
METHODS = ("hesscale", "gn", "bl89", "hesscale+")
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAXIMA = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
MEANS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
CHOSEN = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink, nn.ELU),
    *(nn.CELU, nn.SELU, nn.Softplus, nn.LeakyReLU, nn.Tanh),
)


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Sequential, Tensor]:
    """Layers that save memory, of one to three dimensions, some of them frozen."""
    torch.manual_seed(draw(st.integers(0, 100)))
    dims = draw(st.integers(1, 3))

    def pick(*choices):
        return draw(st.sampled_from(choices))

    modes = ("zeros", "circular", "reflect", "replicate")[: 3 if dims == 3 else 4]
    first = CONVOLUTIONS[dims](
        *(2, 4, 3, pick(1, 2), 1),
        groups=pick(1, 2),
        bias=draw(st.booleans()),
        padding_mode=pick(*modes),
    )
    pools = (
        lambda: MAXIMA[dims](3, 2, 1),
        lambda: MEANS[dims](2, 1, 1, count_include_pad=draw(st.booleans())),
        lambda: ADAPTIVE[dims](pick(1, 2, 3)),
        lambda: CHOSEN[dims](2),
        lambda: TRANSPOSED[dims](4, 4, 2, stride=pick(1, 2), groups=pick(1, 4)),
    )
    norm = NORMS[dims](4, affine=draw(st.booleans())).train(draw(st.booleans()))
    for size in (norm.running_mean, norm.running_var):
        size.uniform_(0.5, 2)
    layers = [first, norm, pick(*ACTIVATIONS)(), pick(*pools)(), pick(*ACTIVATIONS)()]
    layers += [nn.Flatten(), nn.LazyLinear(5), pick(*ACTIVATIONS)(), nn.Linear(5, 3)]
    model, x = nn.Sequential(*layers), torch.randn(3, 2, *[(9, 7, 5)[dims - 1]] * dims)
    model(x)
    for p in list(model.parameters())[:-2]:
        p.requires_grad_(pick(True, True, False))
    return model, x


@given(case=networks(), method=st.sampled_from(METHODS))
def test_the_same_diagonals(case: tuple[nn.Sequential, Tensor], method: str) -> None:
    model, x = case
    y = torch.randint(3, (len(x),))
    saving = tnconv.nn.save_memory(copy.deepcopy(model))
    expected = tnconv.hesscale(model, LOSS, x, y, method, backward=True)
    found = tnconv.hesscale(saving, LOSS, x, y, method, backward=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, 1e-11)
        assert_close(saving.get_parameter(name).grad, model.get_parameter(name).grad, 1e-11)


def test_positions_of_a_linear_layer() -> None:
    """More than one per sample."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 2), nn.Flatten())
    model.append(nn.Linear(10, 3, bias=False))
    x, y = torch.randn(4, 5, 3), torch.randint(3, (4,))
    expected = tnconv.hesscale(model, LOSS, x, y)
    found = tnconv.hesscale(tnconv.nn.save_memory(model), LOSS, x, y)
    for name, value in expected.items():
        assert_close(found[name], value, 1e-12)


def test_steps() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    model, trained = nn.Sequential(*layers), []
    x, y = torch.randn(8, 2, 6, 6), torch.randint(3, (8,))
    for net in (model, tnconv.nn.save_memory(copy.deepcopy(model))):
        loss_fn = nn.CrossEntropyLoss()
        optimizer = AdaHesScale(net, loss_fn, 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            loss_fn(net(x), y).backward()
            optimizer.step()
        trained.append([p.detach() for p in net.parameters()])
    for one, other in zip(*trained, strict=True):
        assert_close(one, other, 1e-11)
