"""The implicit tangent kernel against the explicit one."""

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from torch import Tensor, nn

from tests.ntk.oracle import jacobian, kernel
from tests.operators.test_low_rank import NETWORKS
from tests.strategies import assert_close
from tnconv.ntk import NTKOperator, parametrization_scales
from tnconv.ntk.kernel_blocks import matrix_of
from tnconv.operators.krylov import lanczos

pytestmark = pytest.mark.usefixtures("float64")


def case(name: str = "strided") -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    return model, x, matrix_of(kernel(jacobian(model, x)))


@pytest.mark.parametrize("name", NETWORKS)
def test_products(name: str) -> None:
    model, x, expected = case(name)
    vectors = torch.randn(len(expected), 3)
    theta = NTKOperator(model, [x])
    assert_close(theta @ vectors, expected @ vectors, 1e-10)
    assert_close(theta @ vectors[:, 0], expected @ vectors[:, 0], 1e-10)


@pytest.mark.parametrize("outputs", ["sum", 1, [0, 3], torch.arange(8.0).double().reshape(2, 4)])
def test_functions_parameters_and_scales(outputs: Any) -> None:
    model, x, _ = case("normalised")
    names = ["0.weight", "5.weight", "5.bias"]
    scales = parametrization_scales(model, "ntk")
    theta = NTKOperator(model, [x[:3], x[3:]], outputs=outputs, parameters=names, scales=scales)
    ones, eye = torch.ones(1, 4), torch.eye(4)
    seeds = outputs if isinstance(outputs, Tensor) else ones if outputs == "sum" else None
    seeds = eye[[outputs] if isinstance(outputs, int) else outputs] if seeds is None else seeds
    j = {n: scales[n] ** 0.5 * each for n, each in jacobian(model, x, seeds).items() if n in names}
    expected = matrix_of(kernel(j))
    vector = torch.randn(theta.size)
    assert_close(theta @ vector, expected @ vector, 1e-10)
    assert_close(theta.to_dense(), expected, 1e-10)


def test_spectrum_solve_and_logdet() -> None:
    model, x, expected = case()
    theta = NTKOperator(model, [x])
    values = torch.linalg.eigvalsh(expected)
    assert_close(torch.tensor(theta.eigenvalue_ends(1e-12)), values[[0, -1]], 1e-8)
    right = torch.randn(len(expected), 2)
    damped = expected + 0.1 * torch.eye(len(expected))
    assert_close(theta.solve(right, 0.1), torch.linalg.solve(damped, right), 1e-8)
    found, error = theta.logdet(0.1, probes=200, generator=torch.Generator().manual_seed(0))
    assert abs(found - float(torch.logdet(damped))) < 4 * error < 4


def test_estimates_are_unbiased() -> None:
    model, x, expected = case("words")
    theta, generator = NTKOperator(model, [x]), torch.Generator().manual_seed(0)
    found, error = theta.trace(400, generator)
    assert abs(found - float(expected.trace())) < 4 * error
    each = expected.square().sum(1) - expected.diagonal().square()  # the estimate's variance
    wrong = theta.diagonal(400, generator) - expected.diagonal()
    assert bool((wrong.abs() <= 4.5 * (each / 400).sqrt()).all())


def test_lanczos_finds_every_eigenvalue_once() -> None:
    """Full orthogonalisation: a cluster does not come back as copies of its ends."""
    values = torch.cat([torch.linspace(1, 1.001, 20), torch.tensor([1e4])])
    found = lanczos(lambda v: values * v, torch.ones(21), 21)
    assert_close(found.values, values, 1e-9)


def test_scipy() -> None:
    model, x, expected = case()
    theta = NTKOperator(model, [x])
    operator = LinearOperator(theta.shape, matvec=theta.matvec, dtype=theta.dtype)
    largest = eigsh(operator, k=2, return_eigenvectors=False)
    assert_close(torch.tensor(largest).sort().values, torch.linalg.eigvalsh(expected)[-2:], 1e-9)
    right = torch.randn(theta.size).numpy()
    solved, flag = cg(operator + LinearOperator(theta.shape, matvec=lambda v: v), right, rtol=1e-12)
    damped = expected + torch.eye(len(expected))
    assert flag == 0
    assert_close(torch.tensor(solved), torch.linalg.solve(damped, torch.tensor(right)), 1e-8)


def test_graphs_follow_the_parameters_and_no_copy_carries_them() -> None:
    model, x, _ = case()
    theta, vector = NTKOperator(model, [x]), torch.randn(20)
    _ = theta @ vector
    copies = deepcopy(theta), pickle.loads(pickle.dumps(theta))
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert_close(theta @ vector, matrix_of(kernel(jacobian(model, x))) @ vector, 1e-10)
    for copy in copies:
        own = matrix_of(kernel(jacobian(copy.model, x)))
        assert_close(copy @ vector, own @ vector, 1e-10)


def test_single_precision_warns_of_the_smallest_eigenvalue() -> None:
    model, x, _ = case()
    theta = NTKOperator(model.float(), [x.float()])
    with pytest.warns(UserWarning, match=r"smallest eigenvalue was computed in torch.float32"):
        theta.eigenvalue_ends()


def test_errors() -> None:
    model, x, _ = case()
    theta = NTKOperator(model, [x])
    with pytest.raises(ValueError, match=r"batches is a Tensor; expected a sequence"):
        NTKOperator(model, x)
    with pytest.raises(ValueError, match=r"operand has shape \(3,\); expected \(20,\)"):
        theta @ torch.ones(3)
    with pytest.raises(ValueError, match=r"right has shape \(3,\)"):
        theta.solve(torch.ones(3))
    with pytest.raises(ValueError, match="probes is 1"):
        theta.trace(1)
    with pytest.raises(RuntimeError, match="conjugate gradients left a residual"):
        theta.solve(torch.randn(20), steps=2)
    with pytest.raises(NotImplementedError, match="dropout"):
        NTKOperator(nn.Sequential(nn.Flatten(), nn.Linear(60, 2), nn.Dropout()), [x])
    mixing = nn.Sequential(nn.Flatten(), nn.Linear(60, 2), nn.BatchNorm1d(2))
    with pytest.raises(NotImplementedError, match="normalises by the batch"):
        NTKOperator(mixing, [x])
