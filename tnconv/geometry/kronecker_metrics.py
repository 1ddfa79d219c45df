"""Metrics that are products of two factors for every parameter, such as KFAC's."""

from collections.abc import Mapping
from copy import copy
from functools import cached_property

import torch
from torch import Tensor, nn

from tnconv.geometry.damped_metrics import Damped
from tnconv.geometry.diagonal_metrics import constant_entries
from tnconv.geometry.layer_matrices import Blockwise, Rows
from tnconv.geometry.metric import Metric
from tnconv.geometry.points import Point, split
from tnconv.operators.krylov import Function
from tnconv.quantities import KroneckerFactors

Factors = Mapping[str, KroneckerFactors]


class Kronecker(Blockwise):
    """``(B ⊗ A) vec W = B W A`` for every parameter's factors ``A[g]`` and ``B[g]``.

    KFAC's factors change as a metric does where channels are rescaled or mixed (``W -> Q W Pᵀ``
    with B and A of the new outputs and inputs), so that its metric is intrinsic for such maps.

    Args:
        factors: of each parameter, from `tnconv.quantities.KFAC`.
        space: the parameters.
        model: whose layers say how a weight is a matrix; by default rows are the first dimension.
        intrinsic: whether the factors are to be made anew.

    Raises:
        ValueError: factors of another size, or of other parameters.
    """

    def __init__(
        self,
        factors: Factors,
        space: Point,
        model: nn.Module | None = None,
        intrinsic: bool = True,
    ) -> None:
        if factors.keys() != space.keys():
            names = ", ".join(sorted(factors.keys() ^ space.keys()))
            raise ValueError(f"factors and parameters differ by {names}; expected the same names")
        self.factors = {name: factors[name] for name in space}
        groups = {name: len(a) for name, (a, _) in self.factors.items()}
        self.space, self.intrinsic, self.rows = space, intrinsic, Rows(space, model, groups)
        for name, (a, b) in self.factors.items():
            expected = self.rows.of(name, space[name]).shape
            if (len(a), b.shape[-1], a.shape[-1]) != tuple(expected):
                given = tuple(a.shape), tuple(b.shape)
                raise ValueError(
                    f"the factors of {name!r} have shapes {given}; expected those of a matrix "
                    f"(g, d, a) = {tuple(expected)}"
                )

    def damped(self, other: "Kronecker") -> "Kronecker":
        """``(A + A') ⊗ (B + B')``: damping by another metric's factors, which changes as they do.

        Raises:
            ValueError: other parameters.
        """
        if self.factors.keys() != other.factors.keys():
            raise ValueError("the metrics are over different parameters; expected equal ones")
        both = {
            name: KroneckerFactors(
                a + other.factors[name].input, b + other.factors[name].grad_output
            )
            for name, (a, b) in self.factors.items()
        }
        return self._with(both, self.intrinsic and other.intrinsic)

    def identity(self, damping: float) -> "Kronecker":
        """``√δ I`` for both factors of each parameter: the identity times δ, as it is used here."""
        eyes = {
            name: KroneckerFactors(*[damping**0.5 * _eye(factor) for factor in (a, b)])
            for name, (a, b) in self.factors.items()
        }
        return self._with(eyes, False)

    def _with(self, factors: dict[str, KroneckerFactors], intrinsic: bool) -> "Kronecker":
        """The same parameters with other factors."""
        found = copy(self)
        found.__dict__.pop("cholesky", None)
        found.factors, found.intrinsic = factors, intrinsic
        return found

    @cached_property
    def cholesky(self) -> dict[str, tuple[Tensor, Tensor]]:
        """``A = L Lᵀ`` and ``B = L Lᵀ`` of each parameter, lower triangular.

        Raises:
            ValueError: a factor that is not positive definite.
        """
        return {name: (_lower(name, a), _lower(name, b)) for name, (a, b) in self.factors.items()}

    def _times(self, name: str, w: Tensor) -> Tensor:
        a, b = self.factors[name]
        return b @ w @ a

    def _solved(self, name: str, w: Tensor) -> Tensor:
        a, b = self.cholesky[name]
        return torch.cholesky_solve(torch.cholesky_solve(w, b).mT, a).mT

    def _rooted(self, name: str, w: Tensor) -> Tensor:
        """``L_B⁻ᵀ W L_A⁻¹``."""
        a, b = self.cholesky[name]
        left = torch.linalg.solve_triangular(b.mT, w, upper=True)
        found: Tensor = torch.linalg.solve_triangular(a, left, upper=False, left=False)
        return found

    def _unrooted(self, name: str, w: Tensor) -> Tensor:
        a, b = self.cholesky[name]
        left = torch.linalg.solve_triangular(b, w, upper=False)
        found: Tensor = torch.linalg.solve_triangular(a.mT, left, upper=True, left=False)
        return found

    def logdet(self) -> Tensor:
        """``Σ_g d_B log det A + d_A log det B``."""
        parts = []
        for a, b in self.cholesky.values():
            of_a, of_b = (2 * f.diagonal(dim1=1, dim2=2).log().sum() for f in (a, b))
            parts.append(b.shape[-1] * of_a + a.shape[-1] * of_b)
        return torch.stack(parts).sum()

    def __add__(self, other: Metric) -> Metric:
        """``B ⊗ A + D``: exactly and in factors, where D is such a metric or a constant times one.

        ``metric + 1e-3 * Euclidean(theta)``; `damped` adds to the factors instead.
        """
        found = other if isinstance(other, Kronecker) else self._like(other)
        return super().__add__(other) if found is None else KroneckerDamped(self, found)

    def _like(self, other: Metric) -> "Kronecker | None":
        """A diagonal metric with one entry for every parameter, in factors."""
        constants = constant_entries(other)
        if constants is None or constants.keys() != self.factors.keys():
            return None
        factors = {
            name: KroneckerFactors(_eye(a), constants[name].to(b) * _eye(b))
            for name, (a, b) in self.factors.items()
        }
        return self._with(factors, other.intrinsic)


class KroneckerDamped(Damped):
    """``B ⊗ A + B' ⊗ A'``, by the eigenvalues of one in the metric of the other.

    With ``A' = L Lᵀ``, ``L⁻¹ A L⁻ᵀ = Q diag(α) Qᵀ`` and likewise R and β of B, 1 + M has the
    eigenvalues ``1 + β αᵀ``. Source: Golub & Van Loan 2013, section 8.7.2.

    Args:
        metric: B and A.
        damping: B' and A', positive definite.
    """

    def __init__(self, metric: Kronecker, damping: Kronecker) -> None:
        if metric.factors.keys() != damping.factors.keys():
            raise ValueError("the metrics are over different parameters; expected equal ones")
        super().__init__(metric.form(), damping, metric.intrinsic)
        self.metric, self.rows = metric, metric.rows
        self.spectra: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, (a, b) in metric.factors.items():
            lower_a, lower_b = damping.cholesky[name]
            (of_a, q), (of_b, r) = _relative(a, lower_a), _relative(b, lower_b)
            self.spectra[name] = of_b.unsqueeze(2) * of_a.unsqueeze(1), q, r

    def relative_logdet(self) -> Tensor:
        return torch.stack([s.log1p().sum() for s, _, _ in self.spectra.values()]).sum()

    def _applied(self, function: Function, flat: Tensor) -> Tensor:
        parts = []
        for name, part in split(flat, self.space).items():
            s, q, r = self.spectra[name]
            w = function(1 + s) * (r.mT @ self.rows.of(name, part) @ q)
            parts.append(self.rows.back(name, r @ w @ q.mT).reshape(-1))
        return torch.cat(parts)


def _relative(factor: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, not below zero, and eigenvectors of ``L⁻¹ A L⁻ᵀ``."""
    left = torch.linalg.solve_triangular(lower, factor, upper=False)
    both = torch.linalg.solve_triangular(lower, left.mT, upper=False)
    values, vectors = torch.linalg.eigh((both + both.mT) / 2)
    return values.clamp(min=0), vectors


def _lower(name: str, factor: Tensor) -> Tensor:
    found: Tensor
    found, info = torch.linalg.cholesky_ex(factor)
    if bool(info.any()):
        raise ValueError(
            f"a factor of {name!r} is not positive definite; expected a damping: "
            "metric.damped(other)"
        )
    return found


def _eye(factor: Tensor) -> Tensor:
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return eye.expand(factor.shape)
