"""Densities on a manifold: modes that stay, and Laplace's evidence.

A density p with respect to the parameters' volume changes with ``|det J|⁻¹``, so that its mode
moves. With respect to the metric's volume, ``p_G = p / √det G`` is a function of the point alone.
"""

from collections.abc import Callable
from math import log, pi

from torch import Tensor

from tnconv.geometry.damped_metrics import Estimate
from tnconv.geometry.fields import MetricField, euclidean
from tnconv.geometry.landscape import Landscape
from tnconv.geometry.points import Point, Vector, size_of, split
from tnconv.geometry.shape import ShapeOperator
from tnconv.operators.krylov import matrix_function

LogDensity = Callable[[Point], Tensor]
MOST_STEPS = 200  # of Lanczos, in a step of Newton's method


def riemannian_logpdf(
    log_density: LogDensity, theta: Point, field: MetricField = euclidean
) -> Tensor:
    """``log p(θ) - ½ log det G(θ)``: the density with respect to the metric's volume.

    >>> import torch
    >>> riemannian_logpdf(lambda theta: -theta["w"].square().sum(), {"w": torch.ones(2)})
    tensor(-2.)
    """
    return log_density(theta) - field(theta).logdet() / 2


def riemannian_map(
    log_density: LogDensity,
    start: Point,
    field: MetricField = euclidean,
    *,
    steps: int = 50,
    tolerance: float = 1e-10,
) -> dict[str, Tensor]:
    """The mode of ``p / √det G``, which is one point in all parameters: by Newton's method.

    Steps solve the Hessian of the negative logarithm in a Krylov space of the gradient, with the
    magnitudes of its eigenvalues (Dauphin et al. 2014), and are halved until they descend.

    Args:
        log_density: log p with respect to the parameters' volume.
        start: where to begin; near the mode.
        field: G.
        steps: at most.
        tolerance: of the gradient's norm.

    >>> import torch
    >>> mode = riemannian_map(lambda t: -(t["w"] - 3.0).square().sum(), {"w": torch.zeros(1)})
    >>> mode["w"].round(decimals=4)
    tensor([3.])

    Raises:
        RuntimeError: no mode within the steps.
    """
    theta = dict(start)

    def energy(point: Point) -> Tensor:
        return -riemannian_logpdf(log_density, point, field)

    for _ in range(steps):
        slope = Landscape(energy, theta).gradient.flat()
        if float(slope.norm()) <= tolerance:
            return theta
        theta = _descended(energy, theta, _newton_step(energy, theta, slope))
    left = float(Landscape(energy, theta).gradient.flat().norm())
    if left > max(tolerance, 1e-3):
        raise RuntimeError(
            f"the gradient still has norm {left:.1e} after {steps} steps; expected "
            "a start nearer to a mode, or more steps"
        )
    return theta


def _newton_step(energy: LogDensity, theta: Point, slope: Tensor) -> Vector:
    """``|H|⁻¹ g``, the more exactly the smaller the gradient is."""
    form = Landscape(energy, theta).hessian("calculus")

    def solved(values: Tensor) -> Tensor:
        magnitude = values.abs()
        return 1 / magnitude.clamp(min=float(magnitude.max()) * 1e-8)

    how = min(1e-2, float(slope.norm())), MOST_STEPS
    found, _ = matrix_function(
        lambda x: form(Vector(split(x, theta))).flat(theta), slope, solved, *how
    )
    return Vector(split(found, theta))


def _descended(energy: LogDensity, theta: Point, step: Vector) -> dict[str, Tensor]:
    before, size = energy(theta), 1.0
    for _ in range(40):
        found = {name: part - size * step.parts[name] for name, part in theta.items()}
        if _lower(energy, found, before):
            return found
        size /= 2
    return dict(theta)


def _lower(energy: LogDensity, point: Point, before: Tensor) -> bool:
    """Whether a point is lower; outside of where the metric is one, none is."""
    try:
        after = energy(point)
    except ValueError:
        return False
    return bool(after.isfinite()) and bool(after <= before)


def laplace_evidence(
    log_joint: LogDensity,
    mode: Point,
    field: MetricField = euclidean,
    estimate: Estimate | None = None,
) -> Tensor:
    """``log h_G(θ*) + d/2 log 2π - ½ log det(G⁻¹ H)``, H the Hessian of ``-log h_G`` at a mode.

    ``h_G = h / √det G`` for the joint density h of data and parameters, and θ* its mode
    (`riemannian_map`): the result is one number in all parameters. With the identity it is the
    usual evidence of Laplace's method, in these parameters.

    Args:
        log_joint: log h with respect to the parameters' volume.
        mode: θ*, where the gradient of ``log h_G`` vanishes.
        field: G.
        estimate: how the determinant is estimated; by default exactly, for few parameters. For a
            network's loss over batches see `network_evidence`.

    Raises:
        ValueError: a point at which ``-log h_G`` is no minimum.
    """

    def energy(point: Point) -> Tensor:
        return -riemannian_logpdf(log_joint, point, field)

    form = Landscape(energy, mode, field).hessian("covariant")
    shape = ShapeOperator(form, field(mode))
    return -energy(mode) + size_of(mode) / 2 * log(2 * pi) - shape.logdet(estimate=estimate) / 2
