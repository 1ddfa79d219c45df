"""Models that are wrapped, checkpointed or under autocast; results written where they are asked."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tnconv
from tnconv import quantities as q

pytestmark = pytest.mark.usefixtures("float64")

VARIANCE, DIAGONAL = q.Variance(), q.GGNDiagonal()
WANTED = [VARIANCE, DIAGONAL, q.KFAC("reduce", "type-2")]


class Net(nn.Module):
    """A convolutional part, recomputed in the backward pass or not, and a linear one."""

    def __init__(self, recomputed: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3))
        self.head = nn.Linear(4 * 16, 3)
        self.recomputed = recomputed

    def forward(self, x: Tensor) -> Tensor:
        body: Callable[..., Tensor] = self.body
        y = checkpoint(body, x, use_reentrant=False) if self.recomputed else body(x)
        z: Tensor = self.head(y.flatten(1))
        return z


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 2, 8, 8), torch.randint(3, (5,))


def check(model: nn.Module, plain: nn.Module, x: Tensor, y: Tensor) -> None:
    """In one call and in a loop, what the model gives is what the plain one gives."""
    expected = tnconv.compute(plain, F.cross_entropy, x, y, WANTED)
    found = tnconv.compute(model, F.cross_entropy, x, y, WANTED)
    for quantity in WANTED:
        assert found[quantity].keys() == expected[quantity].keys()
        for name, value in expected[quantity].items():
            torch.testing.assert_close(found[quantity][name], value)
    with tnconv.observe(model, WANTED) as observation:
        output = model(x)
        observation.propagate(F.cross_entropy, output, y)
        F.cross_entropy(output, y).backward()
    looped = observation.result()
    for quantity in WANTED:
        for name, value in expected[quantity].items():
            torch.testing.assert_close(looped[quantity][name], value)


def test_recomputed_parts() -> None:
    plain, model = Net(), Net(recomputed=True)
    model.load_state_dict(plain.state_dict())
    check(model, plain, *data())


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_distributed_models() -> None:
    plain = Net()
    check(nn.parallel.DistributedDataParallel(plain), plain, *data())


def test_autocast() -> None:
    """The model runs in bfloat16; statistics have the parameters' dtype."""
    model, (x, y) = Net().float(), data()
    wanted = [q.Gradient(), VARIANCE]
    expected = tnconv.compute(model, F.cross_entropy, x.float(), y, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        found = tnconv.compute(model, F.cross_entropy, x.float(), y, wanted)
    for quantity in wanted:
        for name, value in expected[quantity].items():
            assert found[quantity][name].dtype == torch.float32
            error = (found[quantity][name] - value).abs().max() / value.abs().max()
            assert 0 < error < 0.05


def test_results_are_written_onto_parameters_only_if_asked() -> None:
    model, (x, y) = Net(), data()
    before = [set(vars(p)) for p in model.parameters()]
    result = tnconv.compute(model, F.cross_entropy, x, y, WANTED)
    assert [set(vars(p)) for p in model.parameters()] == before
    result.write(model, {q.Variance: "variance", DIAGONAL: "ggn"})
    for name, parameter in model.named_parameters():
        assert parameter.variance is result[VARIANCE][name]  # type: ignore[attr-defined]
        assert parameter.ggn is result[DIAGONAL][name]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="'grad' is an attribute of all parameters"):
        result.write(model, {VARIANCE: "grad"})
    with pytest.raises(KeyError):
        result.write(model, {q.SquaredNorms: "norms"})
