"""A layer's input that changes in place before the backward pass: right, or refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tnconv
from tests.loops import per_sample_gradients
from tests.strategies import assert_close
from tnconv import quantities as q

pytestmark = pytest.mark.usefixtures("float64")


class Named(torch.autograd.Function):
    """One whose context holds a name, as that of any user's can."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.name = "triple"
        return 3 * x

    @staticmethod
    def backward(ctx, v: Tensor) -> Tensor:
        return 3 * v


class Tripled(nn.Module):
    def __init__(self, own: bool) -> None:
        super().__init__()
        self.first, self.last, self.own = nn.Linear(4, 5), nn.Linear(5, 3), own

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(Named.apply(h) if self.own else 3 * h)


def test_functions_of_users_can_hold_names() -> None:
    models = Tripled(True), Tripled(False)
    models[1].load_state_dict(models[0].state_dict())
    args = nn.CrossEntropyLoss(), torch.randn(6, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    found = [tnconv.compute(model, *args, [q.GGNDiagonal()])[q.GGNDiagonal] for model in models]
    found += [tnconv.hessian_diagonal(model, *args) for model in models]
    for one, other in (found[:2], found[2:]):
        for name, expected in other.items():
            assert_close(one[name], expected, 1e-10)


WHEN = ("before", "between", "after", "never")


class Changing(nn.Module):
    """The input of two layers, or of one of two inputs, is changed at some time."""

    def __init__(self, kind: str, when: str, part: str) -> None:
        super().__init__()
        self.first, self.when, self.part = nn.Linear(4, 5), when, part
        pair = (nn.Linear(5, 3), nn.Linear(5, 3))
        self.layers = nn.ModuleList([nn.Bilinear(5, 5, 3)] * 2 if kind == "pair" else pair)
        self.kind = kind

    def change(self, h: Tensor, when: str) -> None:
        if when == self.when:
            (h if self.part == "all" else h[:, :2]).mul_(2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).sigmoid() * 1  # autograd itself needs none of its entries
        other = (h.detach() + 1,) if self.kind == "pair" else ()
        changed = other[0] if other else h
        self.change(changed, "before")
        y = self.layers[0](h, *other)
        self.change(changed, "between")
        if self.kind != "pair":
            y = y + self.layers[1](h)
        self.change(changed, "after")
        return y


@given(
    kind=st.sampled_from(("one", "pair")),
    when=st.sampled_from(WHEN),
    part=st.sampled_from(("all", "some")),
)
def test_changes_are_noticed(kind: str, when: str, part: str) -> None:
    torch.manual_seed(0)
    model, loss_fn = Changing(kind, when, part), nn.MSELoss(reduction="sum")
    x, y = torch.randn(4, 4), torch.randn(4, 3)
    if when in ("between", "after"):
        with pytest.raises(RuntimeError, match="changed in place after the layer had read it"):
            tnconv.compute(model, loss_fn, x, y, [q.SquaredNorms()])
        with pytest.raises(RuntimeError, match=r"in ?place"):
            with tnconv.observe(model, [q.SquaredNorms()]) as observation:
                loss_fn(model(x), y).backward()
                observation.result()
        return
    found = tnconv.compute(model, loss_fn, x, y, [q.PerSampleGradients()])
    for name, expected in per_sample_gradients(model, loss_fn, x, y).items():
        assert_close(found[q.PerSampleGradients][name], expected, 1e-10)
