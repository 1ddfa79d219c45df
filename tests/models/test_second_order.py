"""Gauss-Newton and Fisher diagonals against whole Jacobians and torch's Hessian of the loss."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

import tnconv
from tests.models.test_capture import Residual, data, hooks
from tests.models.test_layers import LAYERS
from tests.strategies import assert_close
from tnconv.diagrams import gradient_dots
from tnconv.losses.roots import curvature
from tnconv.quantities import (
    DotProducts,
    ExactColumns,
    GGNDiagonal,
    Gradient,
    Quantity,
    SampledColumns,
    SquaredNorms,
    Statistic,
    Vectors,
)

EXACT, EACH = GGNDiagonal(), GGNDiagonal(per_sample=True)


pytestmark = pytest.mark.usefixtures("float64")


def jacobians(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """``J[n, y, *θ]`` of each parameter that learns, y all entries of a sample's output."""
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = jacrev(lambda p: functional_call(model, p, (x,)).flatten(1))(learned)
    return {name: found[name].detach() for name in found}


def diagonals(model: nn.Module, loss_fn, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """``d[n, *θ] = Σ_{y,y'} J[n, y, θ] H[n, y, y'] J[n, y', θ]``."""
    output = model(x).detach()
    n, entries = len(output), output[0].numel()
    full = hessian(lambda y: loss_fn(y, targets))(output).reshape(n, entries, n, entries)
    blocks = torch.stack([full[at, :, at] for at in range(n)])
    found = {}
    for name, j in jacobians(model, x).items():
        flat = j.reshape(*j.shape[:2], -1)
        each = torch.einsum("nyp,nyz,nzp->np", flat, blocks, flat)
        found[name] = each.reshape(n, *j.shape[2:])
    return found


def check(model: nn.Module, loss_fn, x: Tensor, targets: Tensor) -> None:
    result = tnconv.compute(model, loss_fn, x, targets, [EXACT, EACH])
    expected = diagonals(model, loss_fn, x, targets)
    used = {name for name, d in expected.items() if not name.startswith("unused")}
    assert result[EXACT].keys() == result[EACH].keys() == used
    for name in used:
        assert_close(result[EACH][name], expected[name], 1e-10)
        assert_close(result[EXACT][name], expected[name].sum(0), 1e-10)
    assert hooks(model) == 0


@pytest.mark.parametrize("case", LAYERS)
def test_layer(case: str) -> None:
    make, shape = LAYERS[case]
    layer, x = make(), torch.randn(shape)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    check(layer, nn.MSELoss(), x, torch.randn_like(layer(x)))


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding(padding_idx: int | None) -> None:
    layer = nn.Embedding(7, 3, padding_idx=padding_idx)
    words = torch.randint(7, (4, 5))
    expected = 2 * nn.functional.one_hot(words, 7).double().square()  # (n, o, c)
    if padding_idx is not None:
        expected[..., padding_idx] = 0
    loss_fn = nn.MSELoss(reduction="sum")
    result = tnconv.compute(layer, loss_fn, words, torch.randn(4, 5, 3), [EXACT, EACH])
    each = expected.sum(1).unsqueeze(2).expand(-1, -1, 3)
    assert_close(result[EACH]["weight"], each, 1e-10)
    assert_close(result[EXACT]["weight"], each.sum(0), 1e-10)


def test_two_threads_on_two_models() -> None:
    models, batches = [Residual().eval() for _ in range(2)], [data(), data()]
    found: list[list[tnconv.Result]] = [[], []]

    def work(at: int) -> None:
        for _ in range(3):
            x, labels = batches[at]
            with tnconv.observe(models[at], [EXACT, EACH]) as observation:
                output = models[at](x)
                observation.propagate(nn.CrossEntropyLoss(), output, labels)
            found[at].append(observation.result())

    threads = [threading.Thread(target=work, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, batch, results in zip(models, batches, found, strict=True):
        expected = diagonals(model, nn.CrossEntropyLoss(), *batch)
        assert len(results) == 3
        for result in results:
            for name, value in result[EACH].items():
                assert_close(value, expected[name], 1e-10)


class Pixels(nn.Module):
    """Class scores at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))).flatten(2)


LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights": nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0, 0.25]).double()),
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.2, ignore_index=1),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_cross_entropy_with_positions(loss: str) -> None:
    check(Pixels(), LOSSES[loss], torch.randn(3, 2, 4, 4), torch.randint(4, (3, 4)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_binary_cross_entropy(reduction: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3))
    loss_fn = nn.BCEWithLogitsLoss(reduction=reduction)
    check(model, loss_fn, torch.randn(6, 4), torch.rand(6, 3).round())


@pytest.mark.parametrize("samples", [1, 5])
def test_residual_network_with_shared_weights_and_an_unused_layer(samples: int) -> None:
    model, (x, labels) = Residual().eval(), data(samples)
    check(model, nn.CrossEntropyLoss(), x, labels)


def test_frozen_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    model[0].requires_grad_(False)
    check(model, nn.CrossEntropyLoss(), torch.randn(4, 2, 4, 4), torch.randint(3, (4,)))


@pytest.mark.parametrize("samples", [1, 3])
def test_sampled_columns_are_those_of_the_generator(samples: int) -> None:
    model, (x, labels) = Residual().eval(), data()
    loss_fn = nn.CrossEntropyLoss()
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    summed = GGNDiagonal("mc", samples, ours)
    each = GGNDiagonal("mc", samples, ours, per_sample=True)
    result = tnconv.compute(model, loss_fn, x, labels, [summed, each])
    columns = curvature(loss_fn, model(x), labels).samples(samples, theirs)
    for name, j in jacobians(model, x).items():
        if name.startswith("unused"):
            continue
        pulled = torch.einsum("mny,nyp->mnp", columns, j.flatten(2))
        expected = pulled.square().sum(0).reshape(len(x), *j.shape[2:])
        assert_close(result[each][name], expected, 1e-10)
        assert_close(result[summed][name], expected.sum(0), 1e-10)


def test_one_call_for_quantities_of_several_vectors() -> None:
    model, (x, labels) = Residual().eval(), data()
    loss_fn = nn.CrossEntropyLoss()
    together = tnconv.compute(model, loss_fn, x, labels, [Gradient(), SquaredNorms(), EXACT])
    for quantity in (Gradient(), SquaredNorms(), EXACT):
        alone = tnconv.compute(model, loss_fn, x, labels, [quantity])
        for name, value in together[quantity].items():
            assert_close(value, alone[quantity][name], 1e-12)


@dataclass(frozen=True)
class Gram(Quantity[Tensor]):
    """Dot products of what one draw of columns becomes."""

    source: Vectors

    def statistics(self) -> dict[str, Statistic]:
        return {"dots": Statistic(gradient_dots, joint=True, vectors=self.source)}

    def result(self, found: Mapping[str, Tensor], samples: int) -> Tensor:
        return found["dots"]


def test_joint_statistics_of_several_vectors_stay_apart() -> None:
    model, x, labels = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))

    def grams() -> list[Gram]:
        draws = [SampledColumns(2, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
        return [Gram(source) for source in (*draws, ExactColumns())]

    def run(wanted: list[Quantity[Tensor]]) -> tnconv.Result:
        return tnconv.compute(model, nn.CrossEntropyLoss(), x, labels, wanted)

    together = grams()
    result = run([DotProducts(), *together])
    for quantity, alone in zip([DotProducts(), *together], [DotProducts(), *grams()], strict=True):
        expected = run([alone])[alone]["weight"]
        assert_close(result[quantity]["weight"], expected, 1e-12)


def test_compiled_model() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, labels = torch.randn(6, 4), torch.randint(3, (6,))
    expected = tnconv.compute(model, nn.CrossEntropyLoss(), x, labels, [EXACT])
    compiled = torch.compile(model, backend="aot_eager")
    result = tnconv.compute(compiled, nn.CrossEntropyLoss(), x, labels, [EXACT])
    for name, value in expected[EXACT].items():
        assert_close(result[EXACT][name], value, 1e-10)


def test_equal_to_backpack() -> None:
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)
    )
    x, labels, loss_fn = torch.randn(5, 2, 6, 6), torch.randint(4, (5,)), nn.CrossEntropyLoss()
    result = tnconv.compute(model, loss_fn, x, labels, [EXACT, EACH])
    backpack.extend(model)
    loss = backpack.extend(loss_fn)(model(x), labels)
    with backpack.backpack(extensions.DiagGGNExact(), extensions.BatchDiagGGNExact()):
        loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(result[EXACT][name], parameter.diag_ggn_exact, 1e-10)
        assert_close(result[EACH][name], parameter.diag_ggn_exact_batch, 1e-10)


def test_errors() -> None:
    with pytest.raises(ValueError, match="fisher is 'type-3'; expected 'type-2' or 'mc'"):
        GGNDiagonal("type-3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples is 0; expected at least 1"):
        GGNDiagonal("mc", samples=0)
    model = nn.Linear(3, 2)
    with pytest.raises(NotImplementedError):
        tnconv.compute(model, lambda y, t: y.sum(), torch.randn(4, 3), torch.zeros(4), [EXACT])
    assert hooks(model) == 0
