"""What KFAC did not see is said, once and at the user's line; what changes later is seen."""

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.optim.nets import batch, small_net
from tnconv.optim import KFAC

pytestmark = pytest.mark.usefixtures("float64")


class Doubled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        def segment(x: Tensor) -> Tensor:
            return self.first(x).tanh()

        return self.last(checkpoint(segment, x, use_reentrant=True))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x).tanh()
        return self.one(h), self.two(h)


def steps(model: nn.Module, optimizer: KFAC, x: Tensor, count: int = 2) -> None:
    loss_fn = optimizer.settings["loss_fn"] or nn.CrossEntropyLoss()
    for _ in range(count):
        optimizer.zero_grad()
        loss_fn(model(x), torch.arange(len(x)) % 3).backward()
        optimizer.step()


def compiled_before() -> tuple[nn.Module, KFAC, Tensor]:
    inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model, x = torch.compile(inner, backend="eager"), torch.randn(6, 4)
    F.cross_entropy(model(x), torch.arange(6) % 3).backward()
    return model, KFAC(model), x


def reentrant() -> tuple[nn.Module, KFAC, Tensor]:
    """Columns of the loss's curvature cannot pass the checkpoint."""
    loss_fn, model = nn.CrossEntropyLoss(), Checkpointed()
    return model, KFAC(model, fisher="mc", loss_fn=loss_fn), torch.randn(6, 4, requires_grad=True)


def own_forward() -> tuple[nn.Module, KFAC, Tensor]:
    model = nn.Sequential(nn.Linear(4, 5), Doubled(5, 3))
    return model, KFAC(model), torch.randn(6, 4)


def evaluation() -> tuple[nn.Module, KFAC, Tensor]:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].eval()
    return model, KFAC(model), torch.randn(6, 4)


SITUATIONS = {
    compiled_before: ["_orig_mod.0.weight", "_orig_mod.2.bias", r"torch\._dynamo\.reset\(\)"],
    reentrant: ["first.weight", "first.bias"],
    own_forward: ["1.weight", r"no factors are known for Doubled", "register_layer"],
    evaluation: ["0.weight", "training mode"],
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("strict", [False, True])
def test_parameters_without_factors_are_named(situation, strict: bool) -> None:
    torch.manual_seed(0)
    model, optimizer, x = situation()
    optimizer.settings["strict"] = strict
    if strict:
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match=SITUATIONS[situation][0]):
            steps(model, optimizer, x)
        assert all(map(torch.equal, before, model.parameters()))
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(model, optimizer, x, 3)
    told = [each for each in caught if "Kronecker factors" in str(each.message)]
    assert len(told) == 1 and told[0].filename == __file__
    for words in SITUATIONS[situation]:
        assert re.search(words, str(told[0].message))


def test_a_head_with_another_loss_is_named() -> None:
    """The hooked loss sees one head; the other learns from a loss that KFAC is not told."""
    torch.manual_seed(0)
    model, loss_fn, x = Heads(), nn.CrossEntropyLoss(), torch.randn(6, 4)
    optimizer = KFAC(model, fisher="mc", loss_fn=loss_fn)
    one, two = model(x)
    labels = torch.arange(6) % 3
    (loss_fn(one, labels) + F.cross_entropy(two, labels)).backward()
    with pytest.warns(UserWarning, match=r"for 2 parameters with gradients: 'two\.weight'"):
        optimizer.step()
    assert "A" in optimizer.state[model.trunk.weight]


def test_gradients_from_elsewhere_are_told() -> None:
    layer = nn.Linear(4, 3)
    optimizer = KFAC(layer)
    loss = F.cross_entropy(layer(torch.randn(6, 4)), torch.arange(6) % 3)
    grads = torch.autograd.grad(loss, list(layer.parameters()))
    for parameter, grad in zip(layer.parameters(), grads, strict=True):
        parameter.grad = grad
    with pytest.warns(UserWarning, match=r"loss\.backward\(\) adds to their gradients"):
        optimizer.step()


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Flatten())


def recurrent() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    return Last()


@pytest.mark.filterwarnings("ignore:.*dropout.*:UserWarning")
@pytest.mark.parametrize("make", [small_net, transformer, recurrent])
def test_the_ordinary_case_is_silent(make) -> None:
    torch.manual_seed(0)
    model = make()
    x = batch()[0] if make is small_net else torch.randn(6, 5, 4)
    optimizer = KFAC(model)
    with silence():
        steps(model, optimizer, x)


def test_a_reentrant_checkpoint_is_seen_on_its_way_back() -> None:
    """For the empirical Fisher: with the factors, and the samples, of the model without it."""
    found = []
    for kind in (True, False):
        torch.manual_seed(0)
        model, x = Checkpointed(), torch.randn(6, 4, requires_grad=True)
        optimizer = KFAC(model)
        run = model if kind else lambda x, m=model: m.last(m.first(x).tanh())
        with silence():
            for _ in range(2):  # two micro-batches
                (F.cross_entropy(run(x), torch.arange(6) % 3) / 2).backward()
            optimizer.step()
        found.append(
            [optimizer.state[p][k] for p in (model.first.weight, model.last.weight) for k in "AB"]
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)


@pytest.mark.parametrize("joint", [True, False])
def test_unfrozen_and_added_layers(joint: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    optimizer, x = KFAC(model, joint=joint, fallback=torch.optim.SGD), torch.randn(6, 4)
    with silence():
        steps(model, optimizer, x)
        model[0].weight.requires_grad_(True)
        steps(model, optimizer, x)
        a = optimizer.state[model[0].weight]["A"]
        assert a.shape == (1, 4, 4)
        model[0].bias.requires_grad_(True)
        steps(model, optimizer, x, 12)
        model[2] = nn.Linear(5, 3)
        optimizer.add_param_group({"params": model[2].parameters()})
        steps(model, optimizer, x)
    for layer in (model[0], model[2]):
        size = layer.in_features + joint
        assert optimizer.state[layer.weight]["A"].shape == (1, size, size)
        assert optimizer.state[layer.weight]["A_inverse"].shape == (1, size, size)
    assert optimizer.fallback is None or model[0].bias not in {
        p for group in optimizer.fallback.param_groups for p in group["params"]
    }


def test_the_summary_says_how_and_why() -> None:
    model = nn.ModuleDict(
        {"used": nn.Linear(4, 3), "unused": nn.Linear(3, 3), "norm": nn.LayerNorm(3),
         "own": Doubled(3, 3), "frozen": nn.Linear(3, 3), "wide": nn.Linear(3, 50, bias=False)}
    )  # fmt: skip
    model["frozen"].requires_grad_(False)
    optimizer = KFAC(model, max_factor=12)
    lines = dict(line.split(": ", 1) for line in optimizer.summary().splitlines())
    assert lines["used.weight"].endswith("layer 'used' was not seen")
    x = model["norm"](model["used"](torch.randn(5, 4)))
    (model["wide"](x).square().mean() + model["own"](x).mean()).backward()
    with pytest.warns(UserWarning, match="for 1 parameter with gradients"):
        optimizer.step()
    lines = dict(line.split(": ", 1) for line in optimizer.summary().splitlines())
    other = "running squares of its gradient"
    assert lines["used.weight"] == "Kronecker factors, by layer 'used'"
    assert lines["unused.bias"] == f"{other}, layer 'unused' was not seen"
    assert lines["norm.weight"] == f"{other}, normalisation has none"
    assert lines["own.weight"] == f"{other}, no factors are known for Doubled"
    assert lines["frozen.bias"] == "not trained, frozen"
    assert lines["wide.weight"] == f"{other}, a factor of layer 'wide' has more than 48 rows"
    assert "2 by Kronecker factors" in repr(optimizer)


def test_sharded_parameters_are_refused() -> None:
    class Fake:  # what torch.distributed.tensor has, without processes
        DTensor = nn.Parameter

    layer = nn.Linear(4, 3)
    optimizer = KFAC(layer, kl_clip=inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.distributed.tensor", Fake)
        with pytest.raises(NotImplementedError, match="parameter 'weight' is sharded"):
            KFAC(nn.Linear(4, 3))
        layer.weight = nn.Parameter(layer.weight.detach().clone())  # replaced in place
        optimizer.param_groups[0]["params"][0] = layer.weight
        with pytest.raises(NotImplementedError, match="parameter 'weight' is sharded"):
            optimizer.zero_grad()
