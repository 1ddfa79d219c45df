"""Warnings name the line that led to them, not one of the library's."""

import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import tnconv
import tnconv.monitor
import tnconv.ntk
from tnconv.codegen.prices import store
from tnconv.diagrams import drawing
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


def smallest_eigenvalue() -> None:
    kernel = tnconv.ntk.empirical_ntk(nn.Linear(3, 2), torch.rand(4, 3))
    tnconv.ntk.smallest_eigenvalue(kernel)


def undrawn() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(drawing, "_render", return_value=None),
    ):
        tnconv.diagrams.linear((8, 3), (4, 3)).draw(Path(folder) / "linear.svg")


def one_sample() -> None:
    model, loss_fn = nn.Linear(3, 2), nn.CrossEntropyLoss()
    monitor = tnconv.monitor.Monitor(model, loss_fn, quantities="business")
    with monitor.step():
        loss_fn(model(torch.rand(1, 3)), torch.tensor([1])).backward()


def torn_run() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "scalars.jsonl").write_text('{"step": 0, "Loss": 1.0}\n{"st')
        tnconv.monitor.read_run(folder)


LED = [compute, observe, convert, damaged, smallest_eigenvalue, undrawn, one_sample, torn_run]


@pytest.mark.parametrize("led", LED)
def test_warnings_point_here_once(led: Callable[[], None]) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(2):
            torch.manual_seed(0)
            led()
    own = [w for w in seen if "tnconv" in str(w.message) or issubclass(w.category, UserWarning)]
    assert own
    assert {Path(each.filename).name for each in own} == {Path(__file__).name}
    assert len({str(each.message) for each in own}) == len(own)


def test_every_warning_comes_this_way() -> None:
    root = Path(tnconv.__file__).resolve().parents[1]
    calls = [
        path.relative_to(root)
        for folder in ("tnconv", "codegen", "simplify", "diagrams")
        for path in (root / folder).rglob("*.py")
        if path.resolve() == path and re.search(r"warnings\.warn|stacklevel", path.read_text())
    ]
    assert calls == [Path("diagrams/notices.py")]
