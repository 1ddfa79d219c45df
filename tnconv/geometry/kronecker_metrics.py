"""Metrics that are products of two factors for every parameter: KFAC, EKFAC, Shampoo."""

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from tnconv.geometry.metric import Metric
from tnconv.geometry.points import Covector, Point, Vector, split
from tnconv.models.layers import layout
from tnconv.optim.blocks import Block
from tnconv.quantities import KroneckerFactors

Factors = Mapping[str, KroneckerFactors]


class Rows:
    """Parameters as matrices ``W[g, d, a]``: groups, outgoing channels, incoming ones and taps."""

    def __init__(
        self,
        space: Point,
        model: nn.Module | None = None,
        groups: Mapping[str, int] | None = None,  # of what has one entry per channel
    ) -> None:
        self.blocks: dict[str, Block] = {}
        self.groups = groups or {}
        for name, part in space.items():
            if part.dim() < 2:
                continue
            parameter = nn.Parameter(torch.empty_like(part, device="meta"))
            found = None
            if model is not None:
                owner, _, key = name.rpartition(".")
                found = layout(model.get_submodule(owner), key)
            self.blocks[name] = Block(name, parameter, None, found or (1, False))

    def of(self, name: str, part: Tensor) -> Tensor:
        block = self.blocks.get(name)
        if block is None:
            return part.reshape(self.groups.get(name, 1), -1, 1)
        return block.rows({block.key: part})

    def back(self, name: str, rows: Tensor) -> Tensor:
        block = self.blocks.get(name)
        return rows.flatten() if block is None else next(iter(block.tensors(rows).values()))


class _Blocks(Metric):
    """What such metrics share: every parameter by itself, as a matrix."""

    rows: Rows

    def product(self, v: Vector) -> Covector:
        return Covector(self._each(v.parts, self._times))

    def inverse_product(self, u: Covector) -> Vector:
        return Vector(self._each(u.parts, self._solved))

    def root(self, coordinates: Tensor) -> Vector:
        return Vector(self._each(split(coordinates, self.space), self._rooted))

    def root_transposed(self, u: Covector) -> Tensor:
        found = self._each({name: u.parts[name] for name in self.space}, self._unrooted)
        return torch.cat([part.reshape(-1) for part in found.values()])

    def _each(self, parts: Point, function: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        return {
            name: self.rows.back(name, function(name, self.rows.of(name, part)))
            for name, part in parts.items()
        }

    def _times(self, name: str, w: Tensor) -> Tensor:
        raise NotImplementedError

    def _solved(self, name: str, w: Tensor) -> Tensor:
        raise NotImplementedError

    def _rooted(self, name: str, w: Tensor) -> Tensor:
        raise NotImplementedError

    def _unrooted(self, name: str, w: Tensor) -> Tensor:
        raise NotImplementedError


class Kronecker(_Blocks):
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
        found = Kronecker.__new__(Kronecker)
        found.factors, found.intrinsic = factors, intrinsic
        found.space, found.rows = self.space, self.rows
        return found

    @cached_property
    def _cholesky(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (_lower(name, a), _lower(name, b)) for name, (a, b) in self.factors.items()}

    def _times(self, name: str, w: Tensor) -> Tensor:
        a, b = self.factors[name]
        return b @ w @ a

    def _solved(self, name: str, w: Tensor) -> Tensor:
        a, b = self._cholesky[name]
        return torch.cholesky_solve(torch.cholesky_solve(w, b).mT, a).mT

    def _rooted(self, name: str, w: Tensor) -> Tensor:
        """``L_B⁻ᵀ W L_A⁻¹``."""
        a, b = self._cholesky[name]
        left = torch.linalg.solve_triangular(b.mT, w, upper=True)
        found: Tensor = torch.linalg.solve_triangular(a, left, upper=False, left=False)
        return found

    def _unrooted(self, name: str, w: Tensor) -> Tensor:
        a, b = self._cholesky[name]
        left = torch.linalg.solve_triangular(b, w, upper=False)
        found: Tensor = torch.linalg.solve_triangular(a.mT, left, upper=True, left=False)
        return found

    def logdet(self) -> Tensor:
        """``Σ_g d_B log det A + d_A log det B``."""
        parts = []
        for a, b in self._cholesky.values():
            of_a, of_b = (2 * f.diagonal(dim1=1, dim2=2).log().sum() for f in (a, b))
            parts.append(b.shape[-1] * of_a + a.shape[-1] * of_b)
        return torch.stack(parts).sum()


class KroneckerEigen(_Blocks):
    """``(R ⊗ Q) diag(S) (R ⊗ Q)ᵀ`` with eigenvectors Q of A and R of B: EKFAC.

    Args:
        bases: Q and R of each parameter.
        scales: S ``(g, d, a)``, positive.
        space: the parameters.
        model: whose layers say how a weight is a matrix.

    Raises:
        ValueError: scales that are not positive.
    """

    def __init__(
        self,
        bases: Mapping[str, tuple[Tensor, Tensor]],
        scales: Mapping[str, Tensor],
        space: Point,
        model: nn.Module | None = None,
    ) -> None:
        for name, s in scales.items():
            if not bool((s > 0).all()):
                raise ValueError(f"the scales of {name!r} are not all positive; expected a damping")
        self.bases, self.scales, self.space = bases, scales, space
        self.rows = Rows(space, model, {name: len(s) for name, s in scales.items()})

    def _times(self, name: str, w: Tensor) -> Tensor:
        return self._out(name, self.scales[name] * self._in(name, w))

    def _solved(self, name: str, w: Tensor) -> Tensor:
        return self._out(name, self._in(name, w) / self.scales[name])

    def _rooted(self, name: str, w: Tensor) -> Tensor:
        return self._out(name, w / self.scales[name].sqrt())

    def _unrooted(self, name: str, w: Tensor) -> Tensor:
        return self._in(name, w) / self.scales[name].sqrt()

    def logdet(self) -> Tensor:
        return torch.stack([s.log().sum() for s in self.scales.values()]).sum()

    def _in(self, name: str, w: Tensor) -> Tensor:
        q, r = self.bases[name]
        return r.mT @ w @ q

    def _out(self, name: str, w: Tensor) -> Tensor:
        q, r = self.bases[name]
        return r @ w @ q.mT


def shampoo_metric(
    statistics: Mapping[str, tuple[Tensor, Tensor]],
    space: Point,
    model: nn.Module | None = None,
    exponent: float = 0.25,
) -> Kronecker:
    """``L^p ⊗ R^p`` with Shampoo's sums ``L = Σ G Gᵀ`` and ``R = Σ Gᵀ G`` of gradients, p = 1/4.

    Extrinsic. Source: Gupta, Koren & Singer 2018.

    Args:
        statistics: L ``(d, d)`` and R ``(a, a)`` of each parameter as a matrix, positive definite.
        space: the parameters.
        model: whose layers say how a weight is a matrix.
        exponent: p.
    """
    factors = {
        name: KroneckerFactors(
            _power(name, right, exponent)[None], _power(name, left, exponent)[None]
        )
        for name, (left, right) in statistics.items()
    }
    return Kronecker(factors, space, model, intrinsic=False)


def _power(name: str, matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    if not bool((values > 0).all()):
        raise ValueError(f"a factor of {name!r} is not positive definite; expected a damping")
    found: Tensor = (vectors * values**exponent) @ vectors.mT
    return found


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
