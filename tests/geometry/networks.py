"""Small ReLU networks in which channels of layer 0 are read by layer 2, of every kind."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tnconv.geometry import Landscape, Metric, Reparametrization, Vector, model_landscape
from tnconv.geometry.points import basis

LOSS = nn.CrossEntropyLoss()
PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(1, 2, 2), lambda: nn.Conv2d(2, 2, 2), (1, 4, 4)),
    "groups": (
        lambda: nn.Conv2d(2, 4, 2, groups=2),
        lambda: nn.Conv2d(4, 2, 2, groups=2),
        (2, 4, 4),
    ),
    "strided": (
        lambda: nn.Conv2d(1, 2, 2, stride=2, bias=False),
        lambda: nn.Conv2d(2, 2, 2, dilation=2),
        (1, 6, 6),
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(2, 2, 2, groups=2),
        lambda: nn.ConvTranspose2d(2, 2, 2, stride=2),
        (2, 2, 2),
    ),
    "transposed groups": (
        lambda: nn.Conv2d(1, 4, 2),
        lambda: nn.ConvTranspose2d(4, 2, 1, groups=2),
        (1, 3, 3),
    ),
    "depthwise": (
        lambda: nn.Conv2d(2, 2, 2, groups=2),
        lambda: nn.Conv2d(2, 2, 2, groups=2),
        (2, 4, 4),
    ),
    "signal": (lambda: nn.Conv1d(1, 3, 2), lambda: nn.Conv1d(3, 2, 3), (1, 6)),
    "linear": (lambda: nn.Linear(3, 4), lambda: nn.Linear(4, 3), (3,)),
}


def network(kind: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Layers 0 and 2, a ReLU after each, and a linear layer."""
    torch.manual_seed(0)
    first, second, shape = PAIRS[kind]
    x = torch.randn(6, *shape)
    model = nn.Sequential(first(), nn.ReLU(), second(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    model(x)
    model[2].bias.data.abs_().add_(0.5)  # so that ReLUs let something through
    return model, x, torch.randint(3, (6,))


def small(kind: str = "plain") -> tuple[nn.Sequential, Landscape]:
    model, x, y = network(kind)
    return model, model_landscape(model, LOSS, [(x, y)])


def smooth() -> Landscape:
    """Without kinks, at a point that is not critical."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2))
    found = model_landscape(model, LOSS, [(torch.randn(5, 1, 4), torch.randint(2, (5,)))])
    assert found.gradient.flat().norm() > 0.1
    return found


def jacobian(map: Reparametrization, theta) -> Tensor:
    """``∂ψ/∂θ``, densely, by reverse mode."""
    flat = torch.cat([part.reshape(-1) for part in theta.values()])

    def run(given: Tensor) -> Tensor:
        parts = given.split([part.numel() for part in theta.values()])
        named = {k: p.reshape(theta[k].shape) for k, p in zip(theta, parts, strict=True)}
        return torch.cat([part.reshape(-1) for part in map.forward(named).values()])

    return torch.func.jacrev(run)(flat)


def roots(metric: Metric) -> Tensor:
    """R, column by column."""
    return torch.stack([metric.root(row).flat() for row in torch.eye(metric.size)], 1)


def unit_vectors(theta) -> Iterator[Vector]:
    return map(Vector, basis(theta))
