"""One diagonal block ``G = V Vᵀ`` of a Gauss-Newton matrix, through Gram matrices of V's columns.

With ``VᵀV ẽ = λ ẽ``, ``e = V ẽ / √λ`` is a unit eigenvector of G; the slope of a sample's loss
along it is ``e · g_n``, its curvature ``e · G_n e``. Source: Dangel, Tatzel & Hennig 2022 (ViViT);
solves and log-determinants by the identities of Woodbury and Sylvester.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import log, sqrt

import torch
from torch import Tensor

from tnconv.displays import Shown
from tnconv.operators.low_rank.damping import Damping
from tnconv.operators.low_rank.row_products import Rows
from tnconv.operators.low_rank.rows import JacobianRows

Named = Mapping[str, Tensor]
Criterion = Callable[[Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class Eigenpairs(Shown):
    """Eigenvalues ``(k,)`` in descending order, and unit eigenvectors ``(k, *parameter)`` by name.

    ``gram_vectors`` ``(m·n, k)`` are the unit eigenvectors of the Gram matrix that belong to them.
    """

    values: Tensor
    vectors: dict[str, Tensor]
    gram_vectors: Tensor


@dataclass(frozen=True, repr=False)
class DirectionalDerivatives(Shown):
    """Along directions k: ``slopes[n, k] = e_k · g_n``, ``curvatures[n', k] = e_k · G_n' e_k``.

    g_n is the gradient of a sample's own loss and G_n its Gauss-Newton matrix: the means over
    samples are the slope and the curvature of a mean loss, the sums those of a sum. Slopes are of
    the samples that gradients were asked for, curvatures of those of the matrix.
    """

    slopes: Tensor
    curvatures: Tensor


@dataclass(frozen=True, eq=False)
class Gradients:
    """``g_n = Σ_m weights[m] J[m, n]``, what sample n adds to the loss's gradient, from rows."""

    rows: Rows
    weights: Tensor  # (m,)

    @property
    def samples(self) -> int:
        return self.rows.samples

    @property
    def explicit(self) -> JacobianRows:
        """The rows, which hold their vectors: where they are of a batch of their own, they do."""
        assert isinstance(self.rows, JacobianRows)
        return self.rows

    def total(self) -> dict[str, Tensor]:
        """``Σ_n g_n`` by parameter name."""
        used = self.weights.nonzero().flatten().tolist() or [0]
        if len(used) == 1:
            weight = self.weights[used[0]]
            return {name: g * weight for name, g in self.rows.summed(used[0]).items()}
        start, stop = used[0], used[-1] + 1
        every = self.weights[start:stop, None].expand(-1, self.rows.samples)
        found = self.rows.between(start, stop).combined(every[None])
        return {name: g[0] for name, g in found.items()}

    def projected(self, directions: Named) -> Tensor:
        """``g_n · u_k`` of shape ``(n, k)`` in double precision."""
        found = self.rows.projected(directions).double()
        return torch.einsum("m,kmn->nk", self.weights.double(), found)


@dataclass(frozen=True, eq=False, repr=False)
class LowRankBlock:
    """``G = V Vᵀ`` over some of the parameters, V with a column for each pair (m, n).

    V's columns are ``scale[m, n] J[m, n]`` with the rows J of the vectors m; vectors after those of
    ``scale`` are none. Where ``gradients`` are made of the same rows, one Gram matrix shows all
    inner products. ``curvature_scale`` and
    ``gradient_scale`` are the factors that make sums over the samples used unbiased for all;
    ``averages`` is whether the loss is a mean.

    Args:
        rows: J, for all vectors and samples.
        scale: the factor of each row as a column of V, ``(m, n)``.
        gradients: those of the samples.
        averages: whether the loss is a mean.
        curvature_scale: of sums over the curvature's samples.
        gradient_scale: of sums over the gradients' samples.
    """

    rows: Rows
    scale: Tensor  # (m, n)
    gradients: Gradients
    averages: bool
    curvature_scale: float
    gradient_scale: float

    @cached_property
    def _factors(self) -> Tensor:
        """From rows as the loss gives them to V's columns, ``(m·n,)``."""
        return self.scale.double().flatten() * sqrt(self.curvature_scale)

    @cached_property
    def _columns(self) -> Rows:
        """The rows of V's columns alone."""
        count = len(self.scale)
        return self.rows if count == self.rows.vectors else self.rows.between(0, count)

    @cached_property
    def _products(self) -> Tensor:
        """``J[m, n] · J[m', n']`` of all vectors m and the columns m', in double precision."""
        return self.rows.gram_with(len(self.scale)).double()

    def _expect_gradients(self) -> None:
        """Take all inner products at once, where those with gradients are wanted, too."""
        if self.gradients.rows is self.rows:
            _ = self._products

    @cached_property
    def gram(self) -> Tensor:
        """``K = VᵀV`` of shape ``(m·n, m·n)``, m first, in double precision."""
        count, size = len(self.scale), self.scale.numel()
        if self._columns is self.rows or "_products" in vars(self):
            found = self._products[:count].reshape(size, size)
        else:
            found = self._columns.gram().double().reshape(size, size)
        return self._factors[:, None] * found * self._factors

    @cached_property
    def gradient_products(self) -> Tensor:
        """``g_n · V_j`` of shape ``(n, m·n')``, with g_n what the sample adds to the gradient."""
        if self.gradients.rows is self.rows:
            every = self._products
        else:
            every = self._columns.gram_under(self.gradients.explicit).double()
        found = torch.einsum("m,mnij->nij", self.gradients.weights.double(), every)
        return found.flatten(1) * (self.gradient_scale * self._factors)

    def gradient(self) -> dict[str, Tensor]:
        """The loss's gradient by name, an unbiased estimate where samples were chosen for it."""
        total = self.gradients.total()
        if self.gradient_scale == 1:
            return total
        return {name: g * self.gradient_scale for name, g in total.items()}

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the Gram matrix in descending order, and its eigenvectors as columns."""
        values, vectors = torch.linalg.eigh(self.gram)
        return values.flip(0), vectors.flip(1)

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self.rows.like))
        return f"<LowRankBlock of {self.size} rows: {names}>"

    @property
    def size(self) -> int:
        """The number of parameters' entries: rows and columns of G."""
        return sum(each.numel() for each in self.rows.like.values())

    @property
    def threshold(self) -> float:
        """Eigenvalues up to this are zero within rounding: ``size · ε · λ_max`` of the Gram matrix.

        ε is that of the parameters' dtype, in which inner products were summed. Source: the rank of
        a matrix in Golub & Van Loan 2013, section 5.5.8.
        """
        largest = float(self._spectrum[0][0]) if len(self.gram) else 0.0
        return len(self.gram) * torch.finfo(self.rows.dtype).eps * max(largest, 0.0)

    @property
    def rank(self) -> int:
        """How many eigenvalues are above `threshold`."""
        return int((self._spectrum[0] > self.threshold).sum())

    def eigvalsh(self) -> Tensor:
        """All eigenvalues of the Gram matrix in descending order, ``(m·n,)``: G's but for zeros."""
        found: Tensor = torch.linalg.eigvalsh(self.gram)
        return found.flip(0).to(self.rows.dtype)

    def eigh(self, k: int | None = None, criterion: Criterion | None = None) -> Eigenpairs:
        """The leading k eigenpairs, or those that a criterion chooses; by default all above zero.

        ``criterion`` is a function from the eigenvalues above `threshold`, in descending order, to
        the positions that are wanted, or to a mask of them.

        Raises:
            ValueError: both arguments, or more than there are eigenvalues above zero.
        """
        values, vectors = self._chosen(k, criterion)
        found = self._combined((vectors / values.sqrt()).T)
        return Eigenpairs(values.to(self.rows.dtype), found, vectors)

    def directional_derivatives(
        self, directions: Eigenpairs | Named | None = None, k: int | None = None
    ) -> DirectionalDerivatives:
        """Slopes ``(n, k)`` and curvatures ``(n', k)`` of every sample along directions.

        ``directions`` are eigenpairs from `eigh`, tensors ``(k, *parameter)`` by name, which are
        taken as they are (a curvature grows with the square of a direction's norm), or by default
        the leading k eigenvectors, all above zero where k is None.

        Raises:
            ValueError: more eigenvectors than there are eigenvalues above zero, or other names; a
                k beside directions, whose number it would be.
            TypeError: directions of another kind; how many of the leading ones is ``k=2``.
        """
        _check_directions(directions, k)
        if isinstance(directions, Mapping):
            slopes, products = self._along(directions)
        else:
            self._expect_gradients()
            if directions is None:
                values, vectors = self._chosen(k, None)
            else:
                values, vectors = directions.values.double(), directions.gram_vectors
            slopes, products = self._along_eigenvectors(values, vectors)
        return self._of_samples(slopes, self._summed_squares(products))

    def newton_step(
        self, damping: float | Tensor | Damping, k: int | None = None
    ) -> dict[str, Tensor]:
        """``s = -Σ_k γ[k] / (λ[k] + δ[k]) e_k`` over the leading k eigenvectors, by name.

        See `newton_coefficients`.

        Raises:
            ValueError: a damping of another shape or below zero, or more directions than there are.
        """
        self._expect_gradients()
        values, vectors = self._chosen(k, None)
        coefficients = self.newton_coefficients(damping, k)
        return self._single(vectors @ (coefficients / values.sqrt()))

    def newton_coefficients(
        self, damping: float | Tensor | Damping, k: int | None = None
    ) -> Tensor:
        """``-γ[k] / (λ[k] + δ[k])``, of shape ``(k,)`` in double precision.

        ``γ[k]`` is the loss's slope and ``λ[k]`` its curvature along e_k. ``damping`` is a number,
        one for each direction, or a rule (`tnconv.operators.low_rank.damping`), whose slopes and
        curvatures are scaled such that their means over samples are γ and λ.

        Raises:
            ValueError: a damping of another shape or below zero, or more directions than there are.
        """
        self._expect_gradients()
        values, vectors = self._chosen(k, None)
        slopes, products = self._along_eigenvectors(values, vectors)
        curvatures = self._summed_squares(products)
        if callable(damping):
            damping = damping(values, slopes * len(slopes), curvatures * len(curvatures))
        delta = torch.as_tensor(damping, dtype=values.dtype, device=values.device)
        if delta.dim() > 1 or (delta.dim() and delta.shape != values.shape):
            raise ValueError(
                f"damping has shape {tuple(delta.shape)}; expected a number or ({len(values)},)"
            )
        if not bool((delta >= 0).all()):
            raise ValueError("a damping is negative or NaN; expected numbers of at least 0")
        return -slopes.sum(0) / (values + delta)

    def product(self, vector: Named) -> dict[str, Tensor]:
        """``G v``, by name."""
        return self._single(self._transposed(vector))

    def solve(self, vector: Named, damping: float) -> dict[str, Tensor]:
        """``(G + δ I)⁻¹ v = (v - V (δ I + VᵀV)⁻¹ Vᵀ v) / δ`` (Woodbury), by name.

        Raises:
            ValueError: a damping that is not positive.
        """
        _check(damping)
        inner = self.gram + damping * torch.eye(len(self.gram), dtype=torch.float64).to(self.gram)
        inverted = torch.linalg.solve(inner, self._transposed(vector))
        corrections = self._single(inverted)
        return {name: (vector[name] - corrections[name]) / damping for name in corrections}

    def logdet(self, damping: float) -> Tensor:
        """``log det(G + δ I) = (P - m·n) log δ + log det(VᵀV + δ I)`` (Sylvester).

        Raises:
            ValueError: a damping that is not positive.
        """
        _check(damping)
        values = torch.linalg.eigvalsh(self.gram).clamp(min=0)
        found: Tensor = torch.log1p(values / damping).sum() + self.size * log(damping)
        return found

    def trace(self) -> Tensor:
        """``Σ_i G[i, i]``."""
        return self.gram.trace()

    def frobenius_norm(self) -> Tensor:
        """``√(Σ_{i,j} G[i, j]²)``, that of the Gram matrix."""
        return self.gram.square().sum().sqrt()

    def diagonal(self) -> dict[str, Tensor]:
        """``G[i, i]`` in the parameters' shapes, by name."""
        vectors, samples = self.scale.shape
        scaled = self._columns.scaled(self._factors.reshape(vectors, samples))
        return scaled.squares()

    def _chosen(self, k: int | None, criterion: Criterion | None) -> tuple[Tensor, Tensor]:
        """Eigenvalues above zero and their eigenvectors of the Gram matrix, as columns."""
        if k is not None and criterion is not None:
            raise ValueError("both k and a criterion are given; expected one of them")
        rank = self.rank
        if k is not None and not isinstance(k, int):
            raise TypeError(f"k is of type {type(k).__name__}; expected an int")
        if k is not None and not 0 < k <= rank:
            raise ValueError(
                f"k is {k}; expected 1 to {rank}, the number of eigenvalues above {self.threshold}"
            )
        values, vectors = (each[..., : rank if k is None else k] for each in self._spectrum)
        if criterion is not None:
            wanted = criterion(values.to(self.rows.dtype))
            values, vectors = values[wanted], vectors[:, wanted]
        return values, vectors

    def _along_eigenvectors(self, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """What samples add to slopes ``(n, k)``, and ``Vᵀ e`` ``(m·n, k)``."""
        scaled = vectors / values.sqrt()
        return self.gradient_products @ scaled, self.gram @ scaled

    def _along(self, directions: Named) -> tuple[Tensor, Tensor]:
        self._check_names(directions)
        products = self._columns.projected(directions).double().flatten(1) * self._factors
        return self.gradient_scale * self.gradients.projected(directions), products.T

    def _summed_squares(self, products: Tensor) -> Tensor:  # (m·n, k)
        """``Σ_m (V_mn · e_k)²`` of shape ``(n, k)``: what samples add to curvatures."""
        return products.reshape(*self.scale.shape, -1).square().sum(0)

    def _of_samples(self, slopes: Tensor, curvatures: Tensor) -> DirectionalDerivatives:
        """From what samples add to the loss's derivatives to derivatives of their own losses."""
        if self.averages:
            slopes, curvatures = slopes * len(slopes), curvatures * len(curvatures)
        else:
            slopes, curvatures = slopes / self.gradient_scale, curvatures / self.curvature_scale
        return DirectionalDerivatives(slopes.to(self.rows.dtype), curvatures.to(self.rows.dtype))

    def _transposed(self, vector: Named) -> Tensor:
        """``Vᵀ v``, of shape ``(m·n,)`` in double precision."""
        self._check_names(vector)
        one = {name: vector[name].unsqueeze(0) for name in self.rows.like}
        return self._columns.projected(one).double().flatten() * self._factors

    def _combined(self, coefficients: Tensor) -> dict[str, Tensor]:  # (k, m·n)
        """``V c``, by name."""
        return self._columns.combined((coefficients * self._factors).reshape(-1, *self.scale.shape))

    def _single(self, coefficients: Tensor) -> dict[str, Tensor]:  # (m·n,)
        found = self._combined(coefficients.unsqueeze(0))
        return {name: value.squeeze(0) for name, value in found.items()}

    def _check_names(self, given: Named) -> None:
        if given.keys() != self.rows.like.keys():
            other = ", ".join(sorted(given.keys() ^ self.rows.like.keys()))
            raise ValueError(f"tensors missing or unknown: {other}; expected the parameters'")


def _check_directions(directions: Eigenpairs | Named | None, k: int | None) -> None:
    if directions is not None and not isinstance(directions, Eigenpairs | Mapping):
        raise TypeError(
            f"directions are of type {type(directions).__name__}; expected Eigenpairs or tensors "
            "by name (the leading k eigenvectors: k=1)"
        )
    if directions is not None and k is not None:
        raise ValueError("both directions and k are given; expected one of them")


def _check(damping: float) -> None:
    if not damping > 0:
        raise ValueError(f"damping is {damping}; expected a positive number")
