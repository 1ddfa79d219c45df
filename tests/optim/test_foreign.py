"""Factors are of the passes whose gradients a step uses, whatever else runs in a loop."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tnconv
from tests.strategies import assert_close
from tnconv import quantities as q
from tnconv.optim import KFAC
from tnconv.quantities import SampledColumns

FISHERS = ("type-2", "mc", "empirical", "forward-only")


def own_columns(source, loss_fn, output: Tensor, targets: Tensor) -> Tensor:
    """Monte Carlo columns that depend on their own sample alone."""
    return torch.sin(7 * output + targets[:, None])[None] / len(output) ** 0.5


class Loop:
    """A model with its loss, what a step sees, and passes that are none of its business."""

    def __init__(self, fisher: str, inverse: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv1d(2, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)
        )
        self.loss_fn = nn.CrossEntropyLoss()
        self.optimizer = KFAC(
            self.model, 0.05, fisher=fisher, loss_fn=self.loss_fn, inverse=inverse,
            update_inverses_every=lambda step: step % 2 == 0,
        )  # fmt: skip
        self.numbers = torch.Generator().manual_seed(1)

    def batch(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        x = scale * torch.randn(4, 2, 4, generator=self.numbers)
        return x, torch.randint(3, (4,), generator=self.numbers)

    def loss(self) -> Tensor:
        x, y = self.batch()
        return self.loss_fn(self.model(x), y) / 2

    def foreign(self) -> tuple[Tensor, Tensor]:
        """A batch from other random numbers, far from those of the loop."""
        return 30 * torch.randn(5, 2, 4), torch.randint(3, (5,))

    def computed(self) -> None:
        tnconv.compute(self.model, self.loss_fn, *self.foreign(), [q.Variance(), q.GGNDiagonal()])

    def multiplied(self) -> None:
        operator = tnconv.GGNOperator(self.model, self.loss_fn, [self.foreign()])
        operator @ torch.ones(operator.shape[0])

    def diagonal(self) -> None:
        tnconv.hessian_diagonal(self.model, self.loss_fn, *self.foreign(), ["3.weight"])

    def differentiated(self) -> None:
        x, y = self.foreign()
        loss = self.loss_fn(self.model(x), y)
        torch.autograd.grad(loss, list(self.model.parameters()))

    def evaluated(self) -> None:
        x, y = self.foreign()
        self.model.eval()
        self.loss_fn(self.model(x), y)
        self.model.train()

    def forgotten(self) -> None:
        """A loss that is never sent backwards."""
        x, y = self.foreign()
        self.loss_fn(self.model(x), y)

    def failed(self) -> None:
        with pytest.raises(RuntimeError):
            self.model(torch.randn(3, 2, 9))

    def paused(self) -> None:
        x, y = self.foreign()
        grads = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        with self.optimizer.paused():
            self.loss_fn(self.model(x), y).backward()
        for parameter, grad in zip(self.model.parameters(), grads, strict=True):
            parameter.grad = grad

    def observed(self) -> None:
        x, y = self.foreign()
        with tnconv.observe(self.model, [q.SquaredNorms(), q.GGNDiagonal("mc")]) as observation:
            with self.optimizer.paused():
                output = self.model(x)
                observation.propagate(self.loss_fn, output, y)
                loss = self.loss_fn(output, y)
            torch.autograd.grad(loss, list(self.model.parameters()))

    def transformed(self) -> None:
        x, y = self.foreign()
        values = {name: p.detach() for name, p in self.model.named_parameters()}

        def loss(values: dict[str, Tensor]) -> Tensor:
            return self.loss_fn(torch.func.functional_call(self.model, values, (x,)), y)

        torch.func.grad(loss)(values)


FOREIGN: tuple[Callable[[Loop], None], ...] = (
    Loop.computed,
    Loop.multiplied,
    Loop.diagonal,
    Loop.differentiated,
    Loop.evaluated,
    Loop.forgotten,
    Loop.failed,
    Loop.paused,
    Loop.observed,
    Loop.transformed,
)


def another_loss(loop: Loop) -> None:
    """Its gradients are dropped, by the optimizer or by the model."""
    x, y = loop.foreign()
    loop.loss_fn(loop.model(x), y).backward()


def steps(
    loop: Loop, foreign: list[list[Callable[[Loop], None]]], drop: bool, before: bool
) -> None:
    """Two steps of two micro-batches; ``foreign`` passes in each of the gaps between parts."""
    gaps = iter(foreign)
    for _ in range(2):
        if before:
            another_loss(loop)
        loop.optimizer.zero_grad() if drop else loop.model.zero_grad()
        for _ in range(2):
            for run in next(gaps, []):
                run(loop)
            loss = loop.loss()
            for run in next(gaps, []):
                run(loop)
            loss.backward()
        for run in next(gaps, []):
            run(loop)
        loop.optimizer.step()


situations = st.lists(st.lists(st.sampled_from(FOREIGN), max_size=2), min_size=10, max_size=10)


@pytest.mark.usefixtures("float64")
@given(
    fisher=st.sampled_from(FISHERS),
    ekfac=st.booleans(),
    foreign=situations,
    drop=st.booleans(),
    before=st.booleans(),
)
def test_foreign_passes_leave_no_trace(fisher, ekfac, foreign, drop, before) -> None:
    """Factors, moments and parameters are those of the loop without them.

    In the deep profile 2,000 loops passed and none failed, when steps began to take all parameters
    at once.
    """
    inverse = "ekfac" if ekfac and fisher != "forward-only" else "cholesky"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampledColumns, "columns", own_columns)
        clean, loop = Loop(fisher, inverse), Loop(fisher, inverse)
        steps(clean, [], True, False)
        steps(loop, foreign, drop, before)
    for one, other in zip(clean.model.parameters(), loop.model.parameters(), strict=True):
        assert_close(one.detach(), other.detach(), 1e-10)
        ours, theirs = clean.optimizer.state[one], loop.optimizer.state[other]
        assert ours.keys() == theirs.keys()
        for name in {"A", "B", "moments"} & ours.keys():
            assert_close(theirs[name], ours[name], 1e-10)


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_gradient_penalty_is_no_loss(fisher: str) -> None:
    """It is differentiated twice, and its own backward pass goes through the same layers."""
    found, x = [], torch.rand(16, 8)
    for weight in (None, 0.0):
        torch.manual_seed(0)
        critic, loss_fn = nn.Sequential(nn.Linear(8, 1)), nn.L1Loss()
        if fisher in ("type-2", "mc"):
            loss_fn = nn.MSELoss()
        optimizer = KFAC(critic, fisher=fisher, loss_fn=loss_fn,
                         generator=torch.Generator().manual_seed(0))  # fmt: skip
        inputs = x.clone().requires_grad_()
        score = critic(inputs)
        loss = loss_fn(score, torch.full_like(score, 9.0))
        if weight is not None:
            (grad,) = torch.autograd.grad(score.sum(), inputs, create_graph=True)
            loss = loss + weight * ((grad.norm(dim=1) - 1) ** 2).mean()
        loss.backward()
        optimizer.step()
        state = optimizer.state[critic[0].weight]
        found.append((state["A"], state["B"]))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-6)


@pytest.mark.usefixtures("float64")
def test_an_observed_step_with_a_hooked_loss() -> None:
    """Columns that the optimizer sends backwards are not the observation's, nor the other way."""
    torch.manual_seed(0)
    loop = Loop("mc", "cholesky")
    plain = Loop("empirical", "cholesky")
    wanted = [q.SquaredNorms(), q.GGNDiagonal(), q.GGNDiagonal("mc")]
    with tnconv.observe(loop.model, wanted) as observation:
        x, y = loop.batch()
        output = loop.model(x)
        observation.propagate(loop.loss_fn, output, y)
        loop.loss_fn(output, y).backward()
        result = observation.result()
        loop.optimizer.step()
    expected = tnconv.compute(plain.model, plain.loss_fn, x, y, wanted[:2])
    for quantity in wanted[:2]:
        for name, value in expected[quantity].items():
            assert_close(result[quantity][name], value, 1e-10)


@pytest.mark.usefixtures("float64")
def test_a_second_backward_pass_finds_what_the_graph_kept() -> None:
    """Inputs live as long as the graph; without it there is a message, under checkpointing too."""
    layer, x = nn.Linear(3, 2), torch.rand(5, 3)
    optimizer = KFAC(layer, 0.0)
    hidden = (2 * x).requires_grad_().tanh()
    output = layer(hidden)
    del hidden
    for _ in range(2):
        output.square().mean().backward(retain_graph=True)
    optimizer.step()
    read = (2 * x).tanh()
    assert_close(optimizer.state[layer.weight]["A"][0, :3, :3], read.T @ read / 5)
