"""Bad batches do no lasting harm, rates have an effect, large layers cost little."""

from math import inf

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.optim.nets import factors, small_net, train
from tests.strategies import assert_close
from tnconv.optim import KFAC
from tnconv.optim.averages import PATIENCE
from tnconv.optim.blocked import cut, from_left, from_right
from tnconv.optim.inverses import inverse

FISHERS = ("type-2", "mc", "empirical", "forward-only")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.filterwarnings("ignore:KFAC left out the factors:UserWarning")
@given(
    fisher=st.sampled_from(FISHERS),
    kind=st.sampled_from(["cholesky", "eigen", "ekfac"]),
    scale=st.sampled_from([1e4, 1e10, 1e18, inf, float("nan")]),
    at=st.integers(1, 4),
)
def test_a_bad_batch_leaves_factors_as_they_were(fisher, kind, scale, at) -> None:
    """Whatever its size: no step raises, and factors are those of the other batches."""
    kind = "cholesky" if fisher == "forward-only" and kind == "ekfac" else kind
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, 0.0, fisher=fisher, loss_fn=loss_fn, inverse=kind)
    torch.manual_seed(1)
    for step in range(6):
        optimizer.zero_grad()
        x, y = torch.randn(8, 5), torch.randint(3, (8,))
        loss_fn(model(x * scale if step == at else x), y).backward()
        before = [f.clone() for f in factors(optimizer, model[0].weight)] if step else []
        optimizer.step()
        if step == at:
            assert all(map(torch.equal, before, factors(optimizer, model[0].weight)))
    assert all(f.isfinite().all() for f in factors(optimizer, model[0].weight, model[3].weight))
    assert optimizer.state[model[1].weight]["squares"].isfinite().all()


@pytest.mark.filterwarnings("ignore:KFAC left out the factors:UserWarning")
@pytest.mark.parametrize("first", [1e4, 1e-4])
def test_what_stays_is_no_outlier(first: float) -> None:
    """After a few in a row averages start again, also from a first batch that was the bad one."""
    layer = nn.Linear(4, 3, bias=False)
    optimizer, x = KFAC(layer, 0.0, momentum=0.0, fisher="forward-only"), torch.randn(8, 4)
    for step in range(PATIENCE + 1):
        optimizer.zero_grad()
        layer(x * (first if step == 0 else 1)).sum().backward()
        optimizer.step()
    assert_close(optimizer.state[layer.weight]["A"][0], x.T @ x / 8, 1e-5)


def test_outliers_are_told_once() -> None:
    layer = nn.Linear(4, 3)
    optimizer = KFAC(layer, 0.0)
    with pytest.warns(UserWarning, match="left out the factors of layers '' at step 1") as told:
        for scale in (1, 1e10, 1, 1e10):
            optimizer.zero_grad()
            layer(scale * torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    assert len(told) == 1


@pytest.mark.parametrize("fisher", FISHERS)
def test_logits_that_are_not_numbers_can_be_skipped(fisher: str) -> None:
    model, loss_fn, found = network(), nn.CrossEntropyLoss(), []
    for bad in (False, True):
        optimizer = KFAC(model, 0.0, fisher=fisher, loss_fn=loss_fn,
                         generator=torch.Generator().manual_seed(0))  # fmt: skip
        torch.manual_seed(2)
        x, y = torch.randn(8, 5), torch.randint(3, (8,))
        if bad:
            assert loss_fn(model(x * float("nan")), y).isnan()
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.remove_hooks()
        found.append(factors(optimizer, model[0].weight))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [1.0, 1e12, 1e24])
def test_damping_is_retried_relative_to_the_trace(size: float) -> None:
    """A singular factor whose rounding errors are above any absolute damping has an inverse."""
    half = torch.randn(6, 2, dtype=torch.float64)
    matrix = size * (half @ half.T)[None]
    found = inverse(matrix, 1e-30)
    assert found.isfinite().all()
    rows = half.T @ (found[0] @ matrix[0])
    torch.testing.assert_close(rows, half.T, rtol=1e-2, atol=1e-2)


def test_factors_can_be_reset() -> None:
    model, fresh = small_net(), small_net()
    fresh.load_state_dict(model.state_dict())
    optimizer, other = KFAC(model, 0.0, momentum=0.0), KFAC(fresh, 0.0, momentum=0.0)
    train(model, optimizer, 3)
    optimizer.reset_factors()
    assert not any("A" in state or "squares" in state for state in optimizer.state.values())
    for each, own in ((model, optimizer), (fresh, other)):
        each[1].reset_running_stats()
        train(each, own, 2, seed=5)
    for one, two in zip(
        factors(optimizer, model[0].weight), factors(other, fresh[0].weight), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("layer", ["linear", "norm", "lstm"])
def test_steps_are_in_proportion_to_the_learning_rate(layer: str) -> None:
    """Over its whole range, with the default trust region; of all parameters alike."""

    def length(lr: float) -> float:
        torch.manual_seed(0)
        lstm = nn.LSTM(5, 6, batch_first=True)
        parts = {"linear": nn.Linear(6, 3), "norm": nn.LayerNorm(6), "lstm": lstm}
        model = nn.ModuleDict(parts)
        optimizer = KFAC(model, lr)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        x, y = torch.randn(8, 4, 5), torch.randint(3, (8,))
        hidden = parts["norm"](lstm(x)[0][:, -1])
        F.cross_entropy(5 * parts["linear"](hidden), y).backward()
        optimizer.step()
        own = {n: p for n, p in model.named_parameters() if n.startswith(layer)}
        return float(torch.stack([(p - before[n]).norm() for n, p in own.items()]).norm())

    lengths = [length(lr) / lr for lr in (1e-4, 1e-2, 0.1, 1.0, 10.0)]
    for each in lengths:
        assert each == pytest.approx(lengths[2], rel=0.02)
    assert lengths[2] * 0.1 < 0.2  # no raw gradient, which would be longer by far


@given(size=st.tuples(*[st.integers(1, 9)] * 2), most=st.integers(2, 9), groups=st.integers(1, 2))
def test_blocks_on_the_diagonal(size: tuple[int, int], most: int, groups: int) -> None:
    """Products with cut factors are those with the factor without all else."""
    d, a = size
    torch.manual_seed(0)
    factor, rows = torch.randn(groups, a, a).double(), torch.randn(3, groups, d, a).double()
    split, each = cut(factor, most), -(-a // -(-a // most))
    mask = torch.arange(a)[:, None] // each == torch.arange(a) // each
    assert_close(from_right(rows, split)[..., :a], rows @ (factor * mask), 1e-12)
    assert_close(from_left(split, rows.mT)[..., :a, :], (factor * mask) @ rows.mT, 1e-12)
    assert split.shape[-1] <= most


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["cholesky", "eigen", "ekfac"])
def test_large_layers_have_block_diagonal_factors(kind: str) -> None:
    """A step is the dense one with the damped diagonal blocks; beyond that squares are all."""
    layer, x = nn.Linear(10, 7), torch.randn(8, 10)
    optimizer = KFAC(layer, 1.0, 0.0, inverse=kind, max_factor=4, kl_clip=inf)
    before = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1)
    y = layer(x)
    v = (y.detach().cos() / y.numel()) * 8**0.5
    y.sin().mean().backward()
    optimizer.step()
    step = before - torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1)
    grad = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
    read = torch.cat([x, torch.ones(8, 1)], 1)
    a, b = read.T @ read / 8, v.T @ v
    for factor, each in ((a, 4), (b, 4)):
        at = torch.arange(len(factor)) // each
        factor.mul_(at[:, None] == at)
    state = optimizer.state[layer.weight]
    assert state["A"].shape == (1, 3, 4, 4) and state["B"].shape == (1, 2, 4, 4)
    if kind == "eigen":
        damped = torch.kron(b, a) + 0.01 * torch.eye(77)
        assert_close(step, torch.linalg.solve(damped, grad.flatten()).reshape(7, 11), 1e-10)
    elif kind == "cholesky":
        pi = (a.trace() / 12 / (b.trace() / 8)) ** 0.5  # sizes with padding
        left = b + 0.1 / pi * torch.eye(7)
        right = a + 0.1 * pi * torch.eye(11)
        assert_close(step, torch.linalg.solve(left, grad) @ right.inverse(), 1e-10)
    assert "3 blocks" in optimizer.summary()
    wide = nn.Linear(17, 3)
    optimizer = KFAC(wide, max_factor=4)
    wide(torch.randn(8, 17)).sin().mean().backward()
    optimizer.step()
    assert "A" not in optimizer.state[wide.weight] and "squares" in optimizer.state[wide.weight]


class Segments(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(8))
        self.checkpointed, self.runs = checkpointed, 0

    def forward(self, x: Tensor) -> Tensor:
        for at in range(0, 8, 4):

            def segment(x: Tensor, at: int = at) -> Tensor:
                self.runs += 1
                for layer in self.layers[at : at + 4]:
                    x = layer(x).tanh()
                return x

            x = checkpoint(segment, x, use_reentrant=False) if self.checkpointed else segment(x)
        return x


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_checkpoints_keep_their_memory_and_their_factors(fisher: str) -> None:
    """Between the passes KFAC holds no activation that the checkpoints do not."""
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model, x, loss_fn = Segments(checkpointed), torch.randn(64, 256), nn.MSELoss()
        generator = torch.Generator().manual_seed(0)
        optimizer = KFAC(model, 0.0, fisher=fisher, loss_fn=loss_fn, generator=generator)
        output = model(x)
        kept = [h._tensor for c in optimizer._watch.watch.passes[0].calls for h in c.held]
        assert len(kept) == 8 and sum(t is None for t in kept) == 8 * checkpointed
        loss_fn(output, x).backward()
        kept = [h._tensor for c in optimizer._watch.watch.passes[0].calls for h in c.held]
        assert all(t is None for t in kept)  # a layer's backward pass frees its input, as in SGD
        backward = 1 + (fisher != "empirical")  # the loss's, and one of all columns
        assert model.runs == 2 * (1 + backward * checkpointed)
        optimizer.step()
        found.append(factors(optimizer, *(layer.weight for layer in model.layers)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_inputs_are_freed_unless_the_graph_is_kept() -> None:
    model = Segments(checkpointed=True)
    optimizer, x = KFAC(model), torch.rand(5, 256)
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"input of layer 'layers\.7' was freed"):
        loss.backward()
    optimizer.step()
    assert "A" in optimizer.state[model.layers[0].weight]
