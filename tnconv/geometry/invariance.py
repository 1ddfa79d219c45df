"""A test of whether what somebody measures depends on how the parameters are written."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tnconv.geometry.landscape import Landscape
from tnconv.geometry.reparametrization import Reparametrization


def assert_invariant(
    measure: Callable[[Landscape], Any],
    landscape: Landscape,
    map: Reparametrization,
    rtol: float = 1e-10,
) -> None:
    """Check that a function of loss, point and metric is the same in other parameters.

    Args:
        measure: a number or a tensor of a landscape.
        landscape: in the first parameters; ``landscape.reparametrized(map)`` are the others.
        map: ``ψ = φ(θ)``.
        rtol: relative to the largest entry.

    >>> from tnconv.geometry import DiagonalScale
    >>> flat = Landscape(lambda theta: (theta["w"] ** 2).sum(), {"w": torch.ones(2)})
    >>> assert_invariant(lambda at: at.loss(at.theta), flat, DiagonalScale({"w": 8.0}))

    Raises:
        AssertionError: it is another.
    """
    first, second = (
        torch.as_tensor(measure(each)) for each in (landscape, landscape.reparametrized(map))
    )
    _compare(first, second, rtol)


def _compare(first: Tensor, second: Tensor, rtol: float) -> None:
    if first.shape != second.shape:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise AssertionError(f"not invariant: the results have shapes {shapes}")
    size = float(first.abs().max()) if first.numel() else 0.0
    error = float((first - second).abs().max()) if first.numel() else 0.0
    if not error <= rtol * size:
        shown = f"{float(first):g} and {float(second):g}, " if first.numel() == 1 else ""
        relative = error / size if size else error
        raise AssertionError(f"not invariant: {shown}a relative difference of {relative:.1e}")
