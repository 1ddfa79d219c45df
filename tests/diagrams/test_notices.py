"""Warnings name the line that led to them, not one of the library's."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tnconv
from tnconv.codegen.prices import store
from tnconv.quantities import SquaredNorms


class Turned(nn.Module):
    """A parameter in a product that is taken for one sample after another."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.turn = nn.Linear(3, 2), nn.Parameter(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.einsum("nc,ncd->nd", x, (self.turn * x[:, :, None]).cumsum(1))
        found: Tensor = self.head(nn.functional.layer_norm(rows, (3,), self.turn[0]))
        return found


def compute() -> None:
    x, y = torch.rand(5, 3), torch.randint(2, (5,))
    tnconv.compute(Turned(), nn.CrossEntropyLoss(), x, y, [SquaredNorms()])


def observe() -> None:
    model = Turned()
    with tnconv.observe(model, [SquaredNorms()]) as observation:
        model(torch.rand(5, 3)).sum().backward()
        observation.result()


def convert() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    tnconv.nn.convert(nn.Sequential(layer))


def damaged() -> None:
    store._warn(f"of a test, {torch.rand(())} of it")


@pytest.mark.parametrize("led", [compute, observe, convert, damaged])
def test_warnings_point_here(led: object) -> None:
    assert callable(led)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        led()
    own = [w for w in seen if "tnconv" in str(w.message) or issubclass(w.category, UserWarning)]
    assert own
    assert {Path(each.filename).name for each in own} == {Path(__file__).name}
