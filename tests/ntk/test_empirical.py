"""Tangent kernels against the contraction of torch.func's Jacobians, in float64."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from tests.ntk.drawn import Case, cases
from tests.ntk.oracle import REDUCED, jacobian, kernel, kernels, reduced
from tests.operators.test_low_rank import NETWORKS
from tnconv.ntk import empirical_ntk, parametrization_scales
from tnconv.ntk.sides import Side
from tnconv.operators.low_rank.rows import JacobianRows

pytestmark = pytest.mark.usefixtures("float64")


def close(found: Tensor, expected: Tensor) -> None:
    """To 1e-11 of the largest entry."""
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(found.to(expected), expected, rtol=0, atol=1e-11 * (scale or 1.0))


def network(name: str = "strided") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return NETWORKS[name]()


@settings(max_examples=25)
@given(cases())
def test_every_option(case: Case) -> None:
    found = empirical_ntk(case.model, case.x1, **case.options)
    if not case.options["per_layer"]:
        return close(found, torch.stack([*case.expected.values()]).sum(0))
    assert found.keys() == case.expected.keys()
    for name, expected in case.expected.items():
        close(found[name], expected)


EVERY = [(name, "full") for name in NETWORKS]
REDUCES = [(name, reduce) for name in ("tied", "words") for reduce in REDUCED if reduce != "full"]


@pytest.mark.parametrize(("name", "reduce"), EVERY + REDUCES)
def test_networks(name: str, reduce: Any) -> None:
    model, x = network(name)
    x2 = x.flip(0)
    expected = kernel(jacobian(model, x), jacobian(model, x2))
    close(empirical_ntk(model, x, x2, reduce=reduce), reduced(expected, reduce))
    close(empirical_ntk(model, x, reduce=reduce), reduced(kernel(jacobian(model, x)), reduce))


def test_outputs_with_positions() -> None:
    model, x = nn.Conv1d(2, 3, 2), torch.randn(3, 2, 4)
    close(empirical_ntk(model, x), kernel(jacobian(model, x)))
    seeds = torch.randn(2, 3, 3)
    close(empirical_ntk(model, x, outputs=seeds), kernel(jacobian(model, x, seeds)))


class TimeFirst(nn.Module):
    """Samples are in dimension 1 of inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def test_samples_in_another_dimension() -> None:
    model, x = TimeFirst(), torch.randn(4, 3, 2)  # (t, n, c)
    expected = kernel(jacobian(model, x.transpose(0, 1)))
    for chunks in (None, 2):
        close(empirical_ntk(model, x, batch_dim=1, chunks=chunks), expected)


@pytest.mark.parametrize("chunks", [None, 2])
def test_layers_apart(chunks: int | None) -> None:
    model, x = network("normalised")
    j = jacobian(model, x)
    found = empirical_ntk(model, x, per_layer=True, chunks=chunks)
    assert found.keys() == j.keys()
    for name, expected in kernels(j, j).items():
        close(found[name], expected)
    some = ["0.bias", "5.weight"]
    close(empirical_ntk(model, x, parameters=some), sum(kernels(j, j)[n] for n in some))


@pytest.mark.parametrize("word", ["ntk", "mean-field"])
@pytest.mark.parametrize("name", ["dilated groups", "transposed", "normalised"])
def test_parametrizations_are_reparametrized_networks(name: str, word: Any) -> None:
    """Weights ``a w`` with w as the parameter: the kernel in w, by torch.func."""
    model, x = network(name)
    scales = parametrization_scales(model, word)
    fans = {"0.weight": {"dilated groups": 4, "transposed": 6, "normalised": 8}[name]}
    last = [*model.state_dict()][-2]
    fans[last] = model.state_dict()[last].shape[1]
    for key, fan in fans.items():
        assert scales[key] == 1 / (fan**2 if word == "mean-field" and key == last else fan)
    outer = nn.Module()
    outer.inner = deepcopy(model)

    def rescaled(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        own = {n: v * scales[n] ** 0.5 for n, v in values.items()}
        every = dict(model.state_dict()) | own
        return torch.func.functional_call(model, every, (sample[None],))[0]

    w = {n: p.detach() / scales[n] ** 0.5 for n, p in model.named_parameters()}
    rows = [torch.func.jacrev(rescaled)(w, each) for each in x]
    j = {n: torch.stack([row[n].flatten(1) for row in rows]) for n in w}
    close(empirical_ntk(model, x, scales=word), kernel(j))


def test_two_modules_as_sides() -> None:
    model, x = network()
    other, _ = NETWORKS["strided"]()
    close(empirical_ntk(model, x, other=other), kernel(jacobian(model, x), jacobian(other, x)))


def test_sums_in_double_precision() -> None:
    model, x = network("strided")
    single, given = deepcopy(model).float(), x.float()
    exact = kernel(jacobian(deepcopy(single).double(), given.double()))
    found = empirical_ntk(single, given, dtype=torch.float64)
    assert found.dtype == torch.float64 and empirical_ntk(single, given).dtype == torch.float32
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-6


def test_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are held at a time take no more than half of the limit."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    x, held = torch.randn(12, 3), []
    rows = Side.rows

    def noted(side: Side, *part: Any) -> JacobianRows:
        found = rows(side, *part)
        held.append((found.samples, found.held_bytes))
        return found

    monkeypatch.setattr(Side, "rows", noted)
    close(empirical_ntk(model, x, memory_limit=5_000), kernel(jacobian(model, x)))
    assert all(2 * each <= 2_500 for _, each in held) and max(n for n, _ in held) < 12
    with pytest.raises(ValueError, match=r"memory_limit is 100; the rows of two samples"):
        empirical_ntk(model, x, memory_limit=100)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "reduce": ({"reduce": "diagonal"}, "reduce is 'diagonal'; expected one of full"),
    "names": ({"parameters": ["9.weight"]}, "no parameters that learn are called 9.weight"),
    "none": ({"parameters": []}, "expected one or more names"),
    "class": ({"outputs": 4}, "outputs is 4; expected 'all'"),
    "word": ({"outputs": "logits"}, "outputs is 'logits'; expected 'all'"),
    "seeds": ({"outputs": torch.ones(2, 3)}, r"outputs has shape \(2, 3\); expected seeds"),
    "few": ({"outputs": torch.ones(2, 1, 4)}, "outputs has seeds for 2 samples"),
    "chunks": ({"chunks": 0}, "chunks is 0; expected"),
    "order": ({"order": "fastest"}, "order is 'fastest'; expected one of"),
    "scales": ({"scales": {"a": 1.0}}, "scales has a; expected"),
    "parametrization": ({"scales": "mup"}, "parametrization is 'mup'; expected one of"),
    "state": ({"other": {"0.bias": torch.ones(2)}}, r"other has '0.bias' of shape \(2,\)"),
    "module": ({"other": nn.Linear(2, 2)}, "other has parameters"),
    "sizes": (
        {"x2": torch.rand(2, 2, 5, 6), "reduce": "sample_diagonal"},
        "batches have 5 and 2 samples",
    ),
    "empty": ({"x2": torch.rand(0, 2, 5, 6)}, "a batch has no samples"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    wrong, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        empirical_ntk(*network(), **wrong)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("mixing", [lambda: nn.BatchNorm2d(3), Centred])
@pytest.mark.parametrize("chunks", [None, 2])
def test_mixed_samples_are_refused(mixing: Any, chunks: int | None) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), mixing(), nn.Flatten(), nn.Linear(27, 4))
    with pytest.raises(NotImplementedError, match=r"batch|samples"):
        empirical_ntk(model, torch.rand(4, 2, 4, 4), chunks=chunks)
