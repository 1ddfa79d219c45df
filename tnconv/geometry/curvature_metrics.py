"""Metrics of a network's function: Gauss-Newton and Fisher matrices, whole, diagonal, in factors.

They are intrinsic: made anew from ``L ∘ φ⁻¹`` at ``φ(θ)`` they are ``J⁻ᵀ G J⁻¹``, the whole matrix
for every φ, its diagonal for diagonal φ, Kronecker factors where channels are rescaled or mixed.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tnconv.diagrams.kronecker import Flavour
from tnconv.geometry.diagonal_metrics import Diagonal
from tnconv.geometry.kronecker_metrics import Kronecker, KroneckerEigen
from tnconv.geometry.metric import Metric
from tnconv.geometry.points import Covector, Point, Vector, split
from tnconv.models.computing import Inputs, arguments, observe
from tnconv.models.propagation import LossFunction
from tnconv.operators.curvature_operators import CurvatureOperator, GGNOperator
from tnconv.operators.krylov import conjugate_gradients
from tnconv.operators.low_rank import LowRankGGN
from tnconv.quantities import KFAC, GGNDiagonal, KroneckerFactors, Quantity
from tnconv.quantities.kronecker_factors import Fisher

Batches = Iterable[tuple[Inputs, Any]]


class Implicit(Metric):
    """``C + D`` for a curvature operator C, by products alone, and a damping metric D.

    Inverse products are conjugate gradients, preconditioned by D: whatever the parameters, they
    take the same steps. A root is not known.

    Args:
        operator: `tnconv.GGNOperator` or `tnconv.FisherOperator`.
        damping: a metric, carried along like any other.
        tolerance: of the residual relative to the right side, in the norm of D⁻¹.
        steps: of conjugate gradients at most.
    """

    intrinsic = True

    def __init__(
        self,
        operator: CurvatureOperator,
        damping: Metric,
        tolerance: float = 1e-10,
        steps: int = 1000,
    ) -> None:
        self.operator, self.damping = operator, damping
        self.tolerance, self.steps = tolerance, steps
        self.space = {name: damping.space[name] for name in operator.names}
        self.intrinsic = damping.intrinsic

    def product(self, v: Vector) -> Covector:
        own = Covector(self.operator @ dict(v.parts))
        return own + self.damping.product(v)

    def inverse_product(self, u: Covector) -> Vector:
        def product(flat: Tensor) -> Tensor:
            curved = self.operator @ dict(self.damping.root(flat).parts)
            return self.damping.root_transposed(Covector(curved)) + flat

        right = self.damping.root_transposed(u)
        found, left = conjugate_gradients(product, right, self.tolerance, self.steps)
        if left > 100 * self.tolerance:
            raise RuntimeError(
                f"conjugate gradients left a residual of {left:.1e} after {self.steps} steps; "
                "expected more steps, a larger damping or tolerance"
            )
        return self.damping.root(found)

    def root(self, coordinates: Tensor) -> Vector:
        raise NotImplementedError(_NO_ROOT)

    def root_transposed(self, u: Covector) -> Tensor:
        raise NotImplementedError(_NO_ROOT)

    def logdet(self) -> Tensor:
        raise NotImplementedError(_NO_ROOT)


_NO_ROOT = (
    "a metric of products alone has no root and no determinant; expected low_rank_metric, "
    "kfac_metric, or Dense(metric.dense(), metric.space)"
)


class LowRank(Metric):
    """``C + δ I`` for a Gauss-Newton matrix in factors, by its Gram matrix.

    Root: ``R = δ^-½ (I - U (1 - √(δ / (δ + λ))) Uᵀ)`` with C's eigenpairs. The damping's identity
    belongs to the parameters that C was made in: elsewhere the metric is carried along.

    Raises:
        ValueError: a damping that is not positive.
    """

    def __init__(self, matrix: LowRankGGN, damping: float) -> None:
        if not damping > 0:
            raise ValueError(f"damping is {damping!r}; expected a positive number")
        self.matrix, self.damping, self.space = matrix, damping, matrix.like
        pairs = matrix.eigh()
        self.values = pairs.values
        self.vectors = torch.cat(
            [pairs.vectors[name].flatten(1) for name in matrix.names], 1
        )  # (k, entries)

    def product(self, v: Vector) -> Covector:
        found = self.matrix @ dict(v.parts)
        return Covector(found) + self.damping * Covector(v.parts)

    def inverse_product(self, u: Covector) -> Vector:
        return Vector(self.matrix.solve(dict(u.parts), self.damping))

    def root(self, coordinates: Tensor) -> Vector:
        return Vector(split(self._rooted(coordinates), self.space))

    def root_transposed(self, u: Covector) -> Tensor:
        return self._rooted(u.flat())

    def logdet(self) -> Tensor:
        return self.matrix.logdet(self.damping)

    def _rooted(self, flat: Tensor) -> Tensor:
        less = 1 - (self.damping / (self.damping + self.values)).sqrt()
        along: Tensor = (less * (self.vectors @ flat)) @ self.vectors
        return (flat - along) / float(self.damping**0.5)


def ggn_metric(
    model: nn.Module, loss_fn: LossFunction, batches: Batches, damping: Metric
) -> Implicit:
    """The Gauss-Newton matrix, by products."""
    return Implicit(GGNOperator(model, loss_fn, batches), damping)


def ggn_diagonal_metric(
    model: nn.Module, loss_fn: LossFunction, batches: Batches, damping: Diagonal | None = None
) -> Diagonal:
    """The diagonal of the Gauss-Newton matrix, plus a damping: intrinsic for diagonal maps."""
    found = observed(model, loss_fn, batches, GGNDiagonal())
    if damping is not None:
        found = {name: d + damping.entries[name] for name, d in found.items()}
    intrinsic = damping is None or damping.intrinsic
    return Diagonal(_in_order(found, model), intrinsic)


def kfac_metric(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    damping: float | Kronecker | None = None,
    *,
    flavour: Flavour = "expand",
    fisher: Fisher = "type-2",
) -> Kronecker:
    """KFAC's Kronecker factors as a metric: intrinsic without damping, for maps of channels.

    Args:
        model: whose learning parameters are all in layers with factors.
        loss_fn: the loss.
        batches: pairs of inputs and targets.
        damping: another Kronecker metric, or a number δ for the identity times δ in the parameters
            as they are, see `Kronecker.damped` and `Kronecker.identity`.
        flavour: see `tnconv.quantities.KFAC`.
        fisher: see `tnconv.quantities.KFAC`.
    """
    found: dict[str, KroneckerFactors] = observed(
        model, loss_fn, batches, KFAC(flavour, fisher, joint=False)
    )
    own = Kronecker(_in_order(found, model), points_of(model), model)
    if damping is None:
        return own
    return own.damped(damping if isinstance(damping, Kronecker) else own.identity(damping))


def ekfac_metric(metric: Kronecker, scales: dict[str, Tensor] | None = None) -> KroneckerEigen:
    """A Kronecker metric in its eigenbasis, by default with its own eigenvalues ``μ λᵀ``.

    Args:
        metric: whose factors have the bases.
        scales: the second moments S ``(g, d, a)`` of the gradients in the bases.
    """
    bases, own = {}, {}
    for name, (a, b) in metric.factors.items():
        (of_a, q), (of_b, r) = torch.linalg.eigh(a), torch.linalg.eigh(b)
        bases[name], own[name] = (q, r), of_b.unsqueeze(2) * of_a.unsqueeze(1)
    found = KroneckerEigen.__new__(KroneckerEigen)
    found.rows, found.intrinsic = metric.rows, False
    found.bases, found.scales, found.space = bases, scales or own, metric.space
    return found


def points_of(model: nn.Module) -> Point:
    """The parameters of a model that learn, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def observed(
    model: nn.Module, loss_fn: LossFunction, batches: Batches, quantity: Quantity[Any]
) -> Any:
    """A quantity of all batches taken as one, by parameter name.

    Raises:
        ValueError: a parameter that learns and has none.
    """
    operator = GGNOperator(model, loss_fn, batches)
    with observe(model, [quantity]) as observation:
        for (inputs, targets), share in zip(operator.batches, operator.shares, strict=True):
            args, kwargs = arguments(inputs)
            with torch.enable_grad():
                output = model(*args, **kwargs)
                observation.propagate(loss_fn, output, targets, factor=share)
    found = observation.result()[quantity]
    if missing := sorted(set(points_of(model)) - set(found)):
        raise ValueError(
            f"{type(quantity).__name__} has nothing for {', '.join(missing)}; expected parameters "
            "of linear layers and convolutions: freeze the others"
        )
    return found


def _in_order(found: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    return {name: found[name] for name in points_of(model)}
