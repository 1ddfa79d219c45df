"""What operators hold of a model follows its mode, its values and its buffers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tnconv
from tests.strategies import assert_close
from tnconv.nn import tensor_dropout

pytestmark = pytest.mark.usefixtures("float64")


class Moody(nn.Module):
    """Computes something else in training mode, and reads a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("shift", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        h = (self.layer(x) + self.shift).tanh()
        return self.last(3 * h if self.layer.training else h)


def add_in_place(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.add_(0.5)


EVENTS: dict[str, Callable[[Moody], object]] = {
    "training mode": lambda m: m.train(),
    "evaluation mode": lambda m: m.eval(),
    "mode of one module": lambda m: m.layer.train(not m.layer.training),
    "a parameter in place": lambda m: add_in_place(m.layer.weight),
    "a buffer in place": lambda m: add_in_place(m.shift),
    "a parameter by its data": lambda m: setattr(m.last.weight, "data", 2 * m.last.weight.data),
    "new values": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
}
OPERATORS = [tnconv.GGNOperator, tnconv.HessianOperator, tnconv.FisherOperator]


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("training", [False, True])
def test_products_follow_the_model(kind, event: str, training: bool) -> None:
    how = {"fisher": "empirical"} if kind is tnconv.FisherOperator else {}
    model, batch = Moody().train(training), (torch.randn(6, 4), torch.randint(3, (6,)))

    def made():
        return kind(model, nn.CrossEntropyLoss(), [batch], retain_graph=True, **how)

    operator = made()
    v = torch.linspace(-1, 1, operator.shape[0])
    before = operator @ v
    EVENTS[event](model)
    after = made() @ v
    assert_close(operator @ v, after, 1e-12)
    if event not in ("training mode", "evaluation mode"):
        assert (after - before).abs().max() > 1e-6


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)),
            "dropout makes the matrix stochastic",
        ),
        (lambda: tensor_dropout(nn.Sequential(nn.Linear(4, 3))), "samples its weight gradient"),
    ],
)
def test_random_layers_are_refused_whenever_they_are(kind, make, words: str) -> None:
    model, batch = make().eval(), (torch.randn(6, 4), torch.randint(3, (6,)))
    operator = kind(model, nn.CrossEntropyLoss(), [batch])
    v = torch.ones(operator.shape[0])
    operator @ v
    model.train()
    with pytest.raises(NotImplementedError, match=words):
        operator @ v
    with pytest.raises(NotImplementedError, match=words):
        kind(model, nn.CrossEntropyLoss(), [batch])
    model.eval()
    operator @ v
