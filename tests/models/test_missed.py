"""Gradients that should have been seen and were not; and those that nobody should expect."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnconv
from tests.loops import per_sample_gradients
from tests.models.test_capture import QUANTITIES, assert_first_order, hooks
from tests.strategies import assert_close
from tnconv.quantities import KFAC, GGNDiagonal, Gradient, SquaredNorms

pytestmark = pytest.mark.usefixtures("float64")


class Deaf(nn.Module):
    """A network that takes the hooks off the first layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y._backward_hooks:
            y._backward_hooks.clear()
        return self.last(y.tanh())


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4), torch.randint(3, (6,))


MISSED = "no gradient was seen after layer 'first'"


def test_in_one_call() -> None:
    model = Deaf()
    with pytest.raises(RuntimeError, match=MISSED):
        tnconv.compute(model, nn.CrossEntropyLoss(), *batch(), [SquaredNorms()])
    assert hooks(model) == 0


def test_vectors_that_go_together_need_no_hooks() -> None:
    model, (x, y) = Deaf(), batch()
    found = tnconv.compute(model, nn.CrossEntropyLoss(), x, y, [GGNDiagonal()])[GGNDiagonal]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(parameters)
    probabilities = model(x).detach().softmax(1)
    hessian = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]
    for name, value in found.items():
        j = jacobian[name].detach().flatten(2)
        expected = torch.einsum("nct,ncd,ndt->t", j, hessian / len(x), j)
        assert_close(value.flatten(), expected, 1e-10)
    assert hooks(model) == 0


def test_the_gradient_alone_needs_no_hooks() -> None:
    model, (x, y) = Deaf(), batch()
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    found = tnconv.compute(model, nn.CrossEntropyLoss(), x, y, [Gradient()])[Gradient]
    for value, right in zip(found.values(), expected, strict=True):
        assert_close(value, right)


@pytest.mark.parametrize("asked", [True, False])
def test_in_a_loop(asked: bool) -> None:
    model, (x, y) = Deaf(), batch()
    with (
        pytest.raises(RuntimeError, match=MISSED),
        tnconv.observe(model, [SquaredNorms()]) as observation,
    ):
        F.cross_entropy(model(x), y).backward()
        if asked:
            observation.result()
    assert hooks(model) == 0


class Head(nn.Linear):
    """Its output is part of a larger tensor: changed in place, the graph leaves it aside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :2]


def test_a_view_changed_after_the_model_returned_it() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(4, 5), Head(5, 3)), batch()

    def rectified(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.relu(), targets.clamp(max=1), reduction="sum")

    each = per_sample_gradients(model, rectified, x, y)
    with tnconv.observe(model, QUANTITIES) as observation:
        rectified(model(x).relu_(), y).backward()
    assert_first_order(observation.result(), each)
    assert hooks(model) == 0


class Branches(nn.Module):
    """Two heads, the second of which the loss may leave out, and a layer that both call."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.shared = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x).tanh()
        return self.head(self.shared(y)), self.other(self.shared(y.sin()))


def of_first(output: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(output[0], targets, reduction="sum")


def of_both(output: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return of_first(output, targets) + of_first(output[1:], targets)


def of_detached(output: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return of_first(output, targets) + of_first((output[1].detach(),), targets)


def check(model: nn.Module, loss_fn: object, x: Tensor, y: Tensor, **kwargs: bool) -> None:
    each = per_sample_gradients(model, loss_fn, x, y)
    assert_first_order(tnconv.compute(model, loss_fn, x, y, QUANTITIES), each)
    with tnconv.observe(model, QUANTITIES) as observation:
        loss_fn(model(x), y).backward(**kwargs)
    assert_first_order(observation.result(), each)
    assert hooks(model) == 0


@pytest.mark.parametrize("retain_graph", [False, True])
@pytest.mark.parametrize("loss_fn", [of_first, of_both, of_detached])
def test_branches_that_the_loss_leaves_out(loss_fn: object, retain_graph: bool) -> None:
    check(Branches(), loss_fn, *batch(), retain_graph=retain_graph)


@pytest.mark.parametrize("loss_fn", [of_first, of_both, of_detached])
def test_frozen_and_tied_branches(loss_fn: object) -> None:
    model = Branches()
    model.other.weight, model.body.bias.requires_grad = model.head.weight, False
    check(model, loss_fn, *batch())


def test_passes_without_a_backward_pass() -> None:
    model, (x, y) = Branches(), batch()
    with tnconv.observe(model, QUANTITIES) as observation:
        model(x)
        of_first(model(x), y).backward()
        of_first(model(x), y)
    result = observation.result()
    assert result.samples == 6
    assert_first_order(result, per_sample_gradients(model, of_first, x, y))


def test_penalties_of_parameters_are_no_gradients_of_layers() -> None:
    model, (x, y) = Branches(), batch()
    with tnconv.observe(model, QUANTITIES) as observation:
        (of_first(model(x), y) + sum(p.square().sum() for p in model.parameters())).backward()
    assert_first_order(observation.result(), per_sample_gradients(model, of_first, x, y))


def test_backward_passes_to_chosen_parameters() -> None:
    model, (x, y) = Branches(), batch()
    with tnconv.observe(model, QUANTITIES) as observation:
        of_both(model(x), y).backward(inputs=list(model.head.parameters()))
    each = per_sample_gradients(model, of_both, x, y)
    chosen = {name: value for name, value in each.items() if name.startswith("head")}
    assert_first_order(observation.result(), chosen)


class Blocked(torch.autograd.Function):
    """A sum whose first term gets no gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


class Blocking(Branches):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).tanh()
        return Blocked.apply(self.other(self.shared(y)), self.head(self.shared(y.sin())))


@pytest.mark.parametrize("quantity", [Gradient(), SquaredNorms(), GGNDiagonal()])
def test_functions_that_pass_no_gradient_on(quantity: tnconv.quantities.Quantity[Tensor]) -> None:
    model, (x, y) = Blocking(), batch()
    result = tnconv.compute(model, nn.CrossEntropyLoss(), x, y, [quantity])
    assert result[quantity].keys() == dict(model.named_parameters()).keys() - {
        "other.weight",
        "other.bias",
    }
    check(model, lambda output, t: F.cross_entropy(output, t, reduction="sum"), x, y)


class Aside(Branches):
    """The second head runs, and nothing reads it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


def test_what_runs_aside_is_left_out_of_every_quantity() -> None:
    model, (x, y) = Aside(), batch()
    forward = KFAC("reduce", "forward-only")
    wanted = [Gradient(), GGNDiagonal(), forward]
    result = tnconv.compute(model, nn.CrossEntropyLoss(), x, y, wanted)
    names = {name for name, _ in model.named_parameters() if not name.startswith("other")}
    assert all(result[quantity].keys() == names for quantity in wanted)
    assert_close(result[forward]["body.weight"].input[0], x.T @ x / len(x), 1e-10)
