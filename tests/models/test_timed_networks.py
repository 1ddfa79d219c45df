"""The network whose quantities are timed gets right ones, at sizes at which programs run loops.

Properties elsewhere draw small layers, whose samples are mostly contracted at once.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnconv
from benchmarks.models import three_c_three_d
from tnconv import quantities
from tnconv.losses.roots import curvature

CLASSES, SAMPLES = 3, 8
Timed = tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]


@pytest.fixture(scope="module")
def timed() -> Timed:
    """3C3D, a batch, and the derivatives ``(n, class, *parameter)`` of its outputs."""
    torch.manual_seed(0)
    model = three_c_three_d(CLASSES).eval()
    x, labels = torch.rand(SAMPLES, 3, 32, 32), torch.randint(CLASSES, (SAMPLES,))
    named = dict(model.named_parameters())
    rows = []
    for sample in x:
        outputs, how = model(sample[None])[0], {"retain_graph": True}
        rows.append([torch.autograd.grad(y, [*named.values()], **how) for y in outputs])
    each = {
        name: torch.stack([torch.stack([grads[at] for grads in row]) for row in rows])
        for at, name in enumerate(named)
    }
    return model, x, labels, each


def backwards(vectors: Tensor, each: dict[str, Tensor]) -> dict[str, Tensor]:
    """``(n, *parameter)``: what vectors ``(n, class)`` after the outputs become."""
    return {name: torch.einsum("nc,nc...->n...", vectors, j) for name, j in each.items()}


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_squares_of_gradients(timed: Timed) -> None:
    model, x, labels, each = timed
    slopes = (model(x).softmax(1) - F.one_hot(labels, CLASSES)).detach() / SAMPLES
    asked = quantities.SumOfSquares(), quantities.Variance(), quantities.SquaredNorms()
    for alone in (asked[:1], asked[1:]):
        for _ in range(2):  # a program of the baseline first, then one that was searched for
            result = tnconv.compute(model, F.cross_entropy, x, labels, alone)
        for name, g in backwards(slopes, each).items():
            expected = g.square().sum(0), g.var(0, unbiased=False), g.flatten(1).square().sum(1)
            for one, value in zip(asked, expected, strict=True):
                if one in alone:
                    assert_near(result[one][name], value)


def test_diagonals(timed: Timed) -> None:
    model, x, labels, each = timed
    known, generator = curvature(F.cross_entropy, model(x), labels), torch.Generator()
    exact, apart = quantities.GGNDiagonal(), {"generator": generator, "per_sample": True}
    for asked, vectors in (
        (exact, known.vectors()),
        (quantities.GGNDiagonal("mc", generator=generator), None),
        (quantities.GGNDiagonal("mc", **apart), None),
    ):
        for seed in range(2):
            generator.manual_seed(seed)
            sent = known.samples(1, generator) if vectors is None else vectors
            generator.manual_seed(seed)
            found = tnconv.compute(model, F.cross_entropy, x, labels, [asked])[asked]
        squares = [backwards(each_of, each) for each_of in sent]
        for name, value in found.items():
            expected = sum(row[name].square() for row in squares)
            assert_near(value, expected if asked.per_sample else expected.sum(0))
