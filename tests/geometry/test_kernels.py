"""Tangent kernels in a metric, and metrics of networks that follow rewritten channels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import tnconv
from tests.geometry.networks import FEW, KINDS, LOSS, Pair, jacobian, pairs, powers, rewritten
from tests.strategies import assert_close
from tnconv.geometry import (
    Diagonal,
    Euclidean,
    Kronecker,
    Metric,
    ggn_diagonal_metric,
    ggn_metric,
    kfac_metric,
    metric_ntk,
    parametrization_map,
    points_of,
)

pytestmark = pytest.mark.usefixtures("float64")


def jacobian_rows(model: nn.Module, x: Tensor) -> Tensor:
    found = torch.func.jacrev(lambda p: functional_call(model, p, (x,)))(points_of(model))
    return torch.cat([part.flatten(2) for part in found.values()], 2)


def dense_kernel(model: nn.Module, x: Tensor, metric: Metric) -> Tensor:
    """``J M⁻¹ Jᵀ`` of dense matrices."""
    rows = jacobian_rows(model, x)
    return torch.einsum("nci,ij,mdj->ncmd", rows, torch.linalg.inv(metric.dense()), rows)


MADE = {
    "identity": lambda model, x, y: Euclidean(points_of(model)),
    "KFAC": lambda model, x, y: kfac_metric(
        model, LOSS, [(x, y)], 0.1 * Euclidean(points_of(model))
    ),
    "Gauss-Newton": lambda model, x, y: ggn_metric(
        model, LOSS, [(x, y)], 0.1 * Euclidean(points_of(model))
    ),
}


@FEW
@given(pair=pairs(), name=st.sampled_from(list(MADE)), factor=st.sampled_from([2.0, 10.0, 1000.0]))
def test_metric_kernels_stay_where_plain_ones_change(pair: Pair, name: str, factor: float) -> None:
    model, x, y = pair.build(3)
    twin, map = rewritten(model, x, factor)
    metric = MADE[name](model, x, y)
    found = metric_ntk(model, x, metric)
    assert_close(found, dense_kernel(model, x, metric), 1e-8)
    there = metric.pushforward(map, points_of(model))
    assert_close(metric_ntk(twin, x, there), found, 1e-9)
    plain = tnconv.ntk.empirical_ntk(model, x)
    assert_close(metric_ntk(model, x, Euclidean(points_of(model))), plain, 1e-10)
    moved = tnconv.ntk.empirical_ntk(twin, x)
    assert (moved - plain).abs().max() > 1e-3 * plain.abs().max()


def test_kernels_of_parts() -> None:
    """Two batches, seeds, and metrics of some parameters."""
    model, x, _ = KINDS["groups"].build()
    theta = {name: p for name, p in points_of(model).items() if name.startswith("2.")}
    metric = Euclidean(theta) * 4.0
    found = metric_ntk(model, x[:2], metric, x[2:], outputs="sum")
    names = list(theta)
    how = {"outputs": "sum", "parameters": names}
    assert_close(found, tnconv.ntk.empirical_ntk(model, x[:2], x[2:], **how) / 4, 1e-10)


def test_factors_by_layer_are_a_metric() -> None:
    """The NTK parametrisation's kernel is that of the identity carried back from there."""
    model, x, _ = KINDS["groups"].build()
    theta, ntk = points_of(model), parametrization_map(model, "ntk")
    metric = Euclidean(ntk(theta)).pullback(ntk, theta)
    expected = tnconv.ntk.empirical_ntk(model, x, scales="ntk")
    assert_close(metric_ntk(model, x, metric), expected, 1e-9)


@FEW
@given(pair=pairs(), flavour=st.sampled_from(["expand", "reduce"]))
def test_curvature_follows_rescaled_channels(pair: Pair, flavour: str) -> None:
    """Made anew it is what is carried along, but not with a damping that is a number."""
    model, x, y = pair.build()
    twin, map = rewritten(model, x, powers(model, x))
    theta = points_of(model)
    inverse = torch.linalg.inv(jacobian(map, theta))

    def made(net: nn.Module) -> Kronecker:
        return kfac_metric(net, LOSS, [(x, y)], flavour=flavour)

    expected = made(model).pushforward(map, theta).dense()
    assert_close(made(twin).dense(), expected, 1e-11)
    both = [made(net) for net in (model, twin)]
    damped = [each.damped(each.identity(1e-2)) for each in both]
    assert both[0].intrinsic and not damped[0].intrinsic
    carried = damped[0].pushforward(map, theta).dense()
    assert (damped[1].dense() - carried).abs().max() > 1e-6 * carried.abs().max()
    eye = torch.eye(len(inverse))
    matrices = [tnconv.GGNOperator(net, LOSS, [(x, y)]) @ eye for net in (model, twin)]
    assert_close(matrices[1], inverse.T @ matrices[0] @ inverse, 1e-10)
    damping = Euclidean(theta)
    diagonals = [
        ggn_diagonal_metric(model, LOSS, [(x, y)], damping).pushforward(map, theta),
        ggn_diagonal_metric(twin, LOSS, [(x, y)], damping_there(damping, map, theta)),
    ]
    assert_close(diagonals[1].dense(), diagonals[0].dense(), 1e-10)


def damping_there(damping, map, theta):
    """A diagonal metric carried along a diagonal map, entry by entry."""
    dense = damping.pushforward(map, theta).dense().diagonal()
    parts = dense.split([p.numel() for p in theta.values()])
    return Diagonal({n: d.reshape(theta[n].shape) for n, d in zip(theta, parts, strict=True)})
