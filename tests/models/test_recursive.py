"""KFRA against its recursion by whole Jacobians, and against BackPACK."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from tests.models.test_kronecker import assert_factors
from tests.strategies import assert_close
from tnconv.losses.roots import curvature
from tnconv.quantities import KroneckerFactors, kfra
from tnconv.quantities.recursive import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("float64")


def nested(activation: nn.Module) -> nn.Sequential:
    inner = nn.Sequential(activation, nn.Linear(6, 5, bias=False), nn.Dropout().eval())
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 6), inner, nn.Sigmoid(), nn.Linear(5, 3))


def recursion(model: nn.Sequential, loss_fn: nn.Module, x: Tensor, labels: Tensor, at: int):
    """``Σ_n H[n]`` at the output, averaged step by step with the Jacobians of single modules."""
    steps, read = [model[1], *model[2], model[3], model[4]], [model[0](x)]
    for step in steps:
        read.append(step(read[-1].clone()).detach())
    s = curvature(loss_fn, read[-1], labels).vectors()
    b = torch.einsum("mnd,mne->de", s, s)
    for step, before in list(zip(steps, read, strict=False))[:at:-1]:
        j = vmap(jacrev(lambda x, step=step: step(x[None].clone())[0]))(before)
        b = torch.einsum("nyd,yz,nze->de", j, b, j) / len(x)
    return read[at], b


NAMES = {0: "1", 2: "2.1", 5: "4"}


@pytest.mark.parametrize("kind", ACTIVATIONS, ids=lambda kind: kind.__name__)
def test_recursion(kind: type[nn.Module]) -> None:
    model = nested(nn.Threshold(0.1, 0.2) if kind is nn.Threshold else kind())
    loss_fn, x, labels = nn.CrossEntropyLoss(), torch.randn(4, 2, 4), torch.randint(3, (4,))
    found = kfra(model, loss_fn, x, labels)
    assert found.keys() == dict(model.named_parameters()).keys()
    for at, name in NAMES.items():
        read, b = recursion(model, loss_fn, x, labels, at)
        a = read.T @ read / len(x)
        assert_factors(found[f"{name}.weight"], KroneckerFactors(a.detach()[None], b[None]))
        if f"{name}.bias" in found:
            ones = KroneckerFactors(torch.ones(1, 1, 1), b[None])
            assert_factors(found[f"{name}.bias"], ones)


def test_activations_in_place() -> None:
    torch.manual_seed(0)
    one = nested(nn.ReLU())
    torch.manual_seed(0)
    other = nested(nn.ReLU(inplace=True))
    x, y = torch.randn(4, 8), torch.randn(4, 3)
    expected, found = (kfra(model, nn.MSELoss(), x, y) for model in (one, other))
    for name, factors in expected.items():
        assert_factors(found[name], factors)


@pytest.mark.parametrize("loss", ["mse", "cross entropy"])
def test_equal_to_backpack(loss: str) -> None:
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(7, 4)
    mse = loss == "mse"
    loss_fn = nn.MSELoss() if mse else nn.CrossEntropyLoss(reduction="sum")
    targets = torch.randn(7, 3) if mse else torch.randint(3, (7,))
    found = kfra(model, loss_fn, x, targets)
    backpack.extend(model)
    with backpack.backpack(extensions.KFRA()):
        backpack.extend(loss_fn)(model(x), targets).backward()
    for name, parameter in model.named_parameters():
        b, *a = parameter.kfra
        assert_close(found[name].grad_output[0], b, 1e-10)
        assert_close(found[name].input[0], a[0] if a else torch.ones(1, 1), 1e-10)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Conv1d(2, 2, 3), nn.Flatten()), r"layer '0' \(Conv1d\) is in the model"),
        (nn.Sequential(nn.Linear(8, 3), nn.Softmax(1)), r"layer '1' \(Softmax\)"),
        (nn.Sequential(nn.Linear(8, 3), nn.Dropout()), r"layer '1' \(Dropout\)"),
        (nn.Linear(8, 11), r"shape \(11, 8\); expected at most 10 features"),
    ],
)
def test_refusals(model: nn.Module, words: str) -> None:
    with pytest.raises(NotImplementedError, match=words):
        kfra(model, nn.MSELoss(), torch.randn(4, 8), torch.randn(4, 3), most_features=10)


def test_positions_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="more than one position"):
        kfra(nn.Linear(4, 3), nn.MSELoss(), torch.randn(4, 2, 4), torch.randn(4, 2, 3))
