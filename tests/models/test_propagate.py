"""Quantities of other vectors than the loss's gradient in a loop of the user's own."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnconv
from tests.loops import per_sample_gradients
from tests.models.test_capture import Residual, data, hooks
from tests.models.test_second_order import diagonals
from tests.strategies import assert_close
from tnconv import quantities as q

pytestmark = pytest.mark.usefixtures("float64")

EXACT, EACH = q.GGNDiagonal(), q.GGNDiagonal(per_sample=True)
EXPAND, KFLR = q.KFAC("expand", "type-2"), q.KFLR()
FORWARD = q.KFAC("reduce", "forward-only")
WANTED: list[q.Quantity[Any]] = [EXACT, EACH, EXPAND, KFLR, FORWARD]
LOSS = nn.CrossEntropyLoss()


def assert_same(found: tnconv.Result, expected: tnconv.Result, wanted: Sequence[Any]) -> None:
    for quantity in wanted:
        assert found[quantity].keys() == expected[quantity].keys() != set()
        for name, value in expected[quantity].items():
            ours = found[quantity][name]
            pairs = [(ours, value)] if isinstance(value, Tensor) else zip(ours, value, strict=True)
            for one, other in pairs:
                assert_close(one, other, 1e-10)


def gradients(model: nn.Module) -> list[Tensor | None]:
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("backward", ["after", "before", "none"])
def test_one_pass(backward: str) -> None:
    model, (x, y) = Residual().eval(), data()
    with tnconv.observe(model, WANTED) as observation:
        output = model(x)
        if backward == "before":
            LOSS(output, y).backward(retain_graph=True)
        observation.propagate(LOSS, output, y)
        assert backward == "before" or all(p.grad is None for p in model.parameters())
        if backward == "after":
            LOSS(output, y).backward()
    result = observation.result()
    assert_same(result, tnconv.compute(model, LOSS, x, y, WANTED), WANTED)
    for name, expected in diagonals(model, LOSS, x, y).items():
        if not name.startswith("unused"):
            assert_close(result[EACH][name], expected, 1e-10)
    found = gradients(model)
    if backward != "none":
        LOSS(model(x), y).backward()
        for one, other in zip(found, gradients(model), strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    assert hooks(model) == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_gradient_accumulation(chunks: int, reduction: str) -> None:
    """Micro-batches of unequal sizes are one batch, with gradients beside."""
    model, (x, y) = Residual().eval(), data()
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    wanted = [*WANTED, q.SquaredNorms(), q.DotProducts()]
    with tnconv.observe(model, wanted) as observation:
        for inputs, targets in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
            output, factor = model(inputs), len(inputs) / 5 if reduction == "mean" else 1.0
            observation.propagate(loss_fn, output, targets, factor)
            (factor * loss_fn(output, targets)).backward()
    found = gradients(model)
    result = observation.result()
    assert result.samples == 5
    assert_same(result, tnconv.compute(model, loss_fn, x, y, wanted), wanted)
    loss_fn(model(x), y).backward()
    for one, other in zip(found, gradients(model), strict=True):
        assert one is None or assert_close(one, other, 1e-10) is None


def test_several_passes_in_one_output() -> None:
    model, (x, y) = Residual().eval(), data()
    with tnconv.observe(model, WANTED) as observation:
        output = torch.cat([model(x[:2]), model(x[2:])])
        observation.propagate(LOSS, output, y)
    assert_same(observation.result(), tnconv.compute(model, LOSS, x, y, WANTED), WANTED)


def test_sampled_vectors_are_those_of_the_generator() -> None:
    model, (x, y) = Residual().eval(), data()
    found = []
    for loop in (False, True):
        generator = torch.Generator().manual_seed(3)
        wanted = [q.KFAC("reduce", "mc", 2, generator), q.GGNDiagonal("mc", 1, generator)]
        if not loop:
            found.append(tnconv.compute(model, LOSS, x, y, wanted))
            continue
        with tnconv.observe(model, wanted) as observation:
            observation.propagate(LOSS, model(x), y)
        found.append(observation.result())
    for kind in (q.KFAC, q.GGNDiagonal):
        pairs = zip(found[0][kind].items(), found[1][kind].values(), strict=True)
        for (_, one), other in pairs:
            assert_close(one[1] if kind is q.KFAC else one, other[1] if kind is q.KFAC else other)


def test_steps_of_a_training_loop() -> None:
    model, wanted = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), [EXACT, KFLR]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tnconv.observe(model, wanted) as observation:
        for _ in range(3):
            x, y = torch.randn(6, 4), torch.randint(3, (6,))
            optimizer.zero_grad()
            output = model(x)
            observation.propagate(LOSS, output, y)
            LOSS(output, y).backward()
            result = observation.result()
            assert_close(result[EXACT]["2.weight"], diagonals(model, LOSS, x, y)["2.weight"].sum(0))
            optimizer.step()


@pytest.mark.parametrize("wanted", [[KFLR], [q.SquaredNorms(), KFLR]])
@pytest.mark.parametrize("missing", [0, 1])
def test_what_was_forgotten_is_told(missing: int, wanted: list[q.Quantity[Any]]) -> None:
    model, (x, y) = Residual().eval(), data()
    with (
        pytest.raises(RuntimeError, match=r"KFLR needs .*observation.propagate\(loss_fn, output"),
        tnconv.observe(model, wanted) as observation,
    ):
        for at in range(2):
            output = model(x)
            if at != missing:
                observation.propagate(LOSS, output, y)
            LOSS(output, y).backward()
    with (
        pytest.raises(RuntimeError, match=r"SquaredNorms needs .*loss.backward\(\)"),
        tnconv.observe(model, [q.SquaredNorms(), KFLR]) as observation,
    ):
        observation.propagate(LOSS, model(x), y)
    assert hooks(model) == 0


def test_passes_without_both_count_for_nothing() -> None:
    model, (x, y) = Residual().eval(), data()
    with tnconv.observe(model, [KFLR]) as observation:
        model(x)
        observation.propagate(LOSS, model(x), y)
        with torch.no_grad():
            model(x)
    assert observation.result().samples == 5


def test_outputs_that_are_refused() -> None:
    several, (x, y) = Several(), (torch.randn(5, 4), torch.randn(5, 3))
    with pytest.raises(TypeError, match="the output is a tuple; expected a tensor"):
        tnconv.compute(several, not_called, x, y, [Drawn()])
    assert hooks(several) == 0
    plain, (x, y) = Residual().eval(), data()
    with tnconv.observe(plain, [Drawn()]) as observation:
        with pytest.raises(TypeError, match="the output is a tuple; expected a tensor"):
            observation.propagate(LOSS, (plain(x),), y)
        with pytest.raises(ValueError, match=r"output of shape \(5, 3\) comes from no layer"):
            observation.propagate(LOSS, plain(x).detach(), y)
        with pytest.raises(ValueError, match="factor is -1; expected a positive number"):
            observation.propagate(LOSS, plain(x), y, -1)
        with pytest.raises(NotImplementedError, match="no second derivative is known"):
            observation.propagate(F.huber_loss, plain(x), y)
    assert hooks(plain) == 0


@pytest.mark.parametrize("second", [0, 1])
def test_once_for_every_call(second: int) -> None:
    """Also where the first time was from another output."""
    model, (x, y) = Several(), (torch.randn(5, 4), torch.randint(3, (5,)))
    with tnconv.observe(model, [EXACT]) as observation:
        outputs = model(x)
        observation.propagate(LOSS, outputs[0], y)
        with pytest.raises(RuntimeError, match="layer 'layer' received a second gradient"):
            observation.propagate(LOSS, outputs[second], y)


class Several(nn.Module):
    """A model that gives two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return y, y.sin()


def not_called(output: Any, targets: Any) -> Tensor:
    raise AssertionError("work before the refusal")


class Untouched(q.SampledColumns):
    """Vectors that must not be asked for."""

    def columns(self, loss_fn: Any, output: Tensor, targets: Any) -> Tensor:
        if loss_fn is F.huber_loss:
            return super().columns(loss_fn, output, targets)
        raise AssertionError("work before the refusal")


class Drawn(q.GGNDiagonal):
    def statistics(self) -> dict[str, q.Statistic]:
        given = super().statistics()["diagonal"]
        return {"diagonal": q.Statistic(given.diagram, given.arguments, vectors=Untouched())}


def test_first_order_quantities_need_nothing_of_it() -> None:
    model, (x, y) = Residual().eval(), data()
    with tnconv.observe(model, [q.SquaredNorms()]) as observation:
        output = model(x)
        observation.propagate(LOSS, output, y)
        LOSS(output, y).backward()
    result = observation.result()
    for name, each in per_sample_gradients(model, LOSS, x, y, 1 / 5).items():
        assert_close(result[q.SquaredNorms][name], each.flatten(1).square().sum(1), 1e-10)
