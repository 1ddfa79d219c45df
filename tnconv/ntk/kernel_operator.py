"""The tangent kernel as a linear operator: products ``Θ v = J (Jᵀ v)`` and never the matrix."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from tnconv.models.capture import alone
from tnconv.models.computing import Inputs, arguments
from tnconv.models.modules import unwrapped
from tnconv.ntk.empirical import empirical_ntk
from tnconv.ntk.parametrizations import Parametrization, scales_of
from tnconv.ntk.seeds import Outputs, Seeds, summed
from tnconv.ntk.sides import Side, learning
from tnconv.ntk.spectrum import warn_of_precision
from tnconv.operators.curvature_operators import refuse_dropout, state_of
from tnconv.operators.krylov import (
    conjugate_gradients,
    extreme_eigenvalue,
    lanczos,
    signs,
)
from tnconv.operators.linearization import Graph
from tnconv.operators.parameter_space import Space, Vector
from tnconv.operators.symmetric import SymmetricOperator


class NTKOperator(SymmetricOperator):
    """``Θ[(n, c), (m, d)]``, all pairs of a sample and an output of it as one index.

    A product is one sweep backwards and one forwards through the batch's graph, for any number of
    outputs: where ``Θ`` itself would not fit, or few products are needed. Vectors are flat, samples
    first, or matrices of columns; NumPy arrays and SciPy's solvers take it as it is. Graphs are
    kept until a parameter changes.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> theta = NTKOperator(model, [torch.rand(5, 3, 8, 8), torch.rand(3, 3, 8, 8)])
    >>> theta.shape, (theta @ torch.rand(80)).shape
    ((80, 80), torch.Size([80]))

    Args:
        model: the network; its layers must keep samples apart.
        batches: inputs of the model, which count as one batch.
        outputs: the outputs that count, as in `empirical_ntk`.
        parameters: names of those that count, by default all that learn.
        scales: the factor of each parameter's kernel, as in `empirical_ntk`.

    Raises:
        NotImplementedError: a layer that mixes samples or drops entries at random.
        ValueError: no batch, or words, names or shapes that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Inputs],
        *,
        outputs: Outputs = "all",
        parameters: Sequence[str] | None = None,
        scales: Parametrization | Mapping[str, float] | None = None,
    ) -> None:
        """Check the model on two samples of each batch.

        Args:
            model: Any model that `tnconv.compute` takes and that gives a tensor, samples first.
            batches: Inputs, a sequence of them also where there is one.
            outputs: As in `empirical_ntk`.
            parameters: The names of those that count, by default all that learn.
            scales: The factor of each parameter's kernel, as in `empirical_ntk`.
        """
        if isinstance(batches, Tensor | Mapping) or not len(batches):
            kind = type(batches).__name__
            raise ValueError(f"batches is a {kind}; expected a sequence of one or more inputs")
        self.model, self.batches, self.outputs = unwrapped(model), list(batches), outputs
        self.names = learning(model, parameters)
        self.scales = scales_of(model, scales)
        refuse_dropout(self.model)
        named = dict(self.model.named_parameters())
        self.space = Space(self.names, tuple(named[name].detach() for name in self.names))
        sides = [Side(self.model, x, Seeds("sum"), self.names) for x in self.batches]
        for side in sides:
            side.rows(0, min(2, side.samples))  # refuses samples that see each other
        self.samples = [side.samples for side in sides]
        self._held: tuple[object, list[_Linear]] | None = None
        self._functions = self._linear()[0].functions

    @property
    def size(self) -> int:
        """Samples of all batches times functions of the outputs."""
        return sum(self.samples) * self._functions

    @property
    def precision(self) -> torch.dtype:
        """What holds all the parameters' dtypes."""
        return self.space.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.space.device

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """``Θ`` itself, ``(size, size)``, by `empirical_ntk`."""
        how: dict[str, Any] = {"parameters": self.names, "scales": self.scales, "dtype": dtype}
        how |= {"outputs": self.outputs}
        rows = []
        for x in self.batches:
            blocks = [
                empirical_ntk(self.model, x, None if y is x else y, **how) for y in self.batches
            ]
            rows.append(torch.cat([each.flatten(2).flatten(0, 1) for each in blocks], 1))
        return torch.cat(rows)

    def eigenvalue_ends(
        self, tolerance: float = 1e-6, generator: torch.Generator | None = None
    ) -> tuple[float, float]:
        """The smallest and the largest eigenvalue, by Lanczos with full orthogonalisation.

        Each is within ``tolerance`` times the largest of an eigenvalue. In less than double
        precision a warning says what the smallest one is worth.
        """
        start = self._random(generator)
        both = [
            float(extreme_eigenvalue(self.matvec, start, which, tolerance).values)
            for which in ("smallest", "largest")
        ]
        warn_of_precision(self.precision, self.size, both[1])
        return both[0], both[1]

    def logdet(
        self,
        damping: float = 0.0,
        probes: int = 16,
        steps: int = 64,
        generator: torch.Generator | None = None,
    ) -> tuple[float, float]:
        """``log det(Θ + δ I)`` by stochastic Lanczos quadrature, and its standard error.

        Args:
            damping: δ.
            probes: The number of random vectors.
            steps: The most products for each of them.
            generator: Where they are drawn; torch's default generator where it is None.

        Raises:
            ValueError: fewer than two probes, or a quadrature node that is not positive.
        """
        _check_probes(probes)
        found = []
        for probe in signs(probes, self.size, self._zeros(), generator):
            ritz = lanczos(self.matvec, probe, steps)
            nodes = ritz.values + damping
            if not bool((nodes > 0).all()):
                raise ValueError(
                    f"damping is {damping}; the kernel is singular within rounding, expected a "
                    f"damping above {-float(ritz.values.min()):.1e}"
                )
            found.append(self.size * (ritz.weights * nodes.log()).sum())
        return _mean(torch.stack(found))

    def solve(
        self,
        right: Tensor,
        damping: float = 0.0,
        tolerance: float | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """``(Θ + δ I)⁻¹ b`` by conjugate gradients, for one vector or for columns.

        Args:
            right: b, ``(size,)`` or ``(size, k)``.
            damping: δ.
            tolerance: The residual's norm relative to that of b; by default a thousand times the
                rounding unit.
            steps: The most products for each column; by default twice the size.

        Raises:
            RuntimeError: the residual is larger after these steps.
            ValueError: another shape.
        """
        self._check(right)
        eps = torch.finfo(self.precision).eps
        wanted = 1e3 * eps if tolerance is None else tolerance
        columns = right.to(self.device, self.precision).reshape(self.size, -1)
        found = []
        for column in columns.unbind(1):
            solution, left = conjugate_gradients(
                lambda v: self @ v + damping * v, column, wanted, steps or 2 * self.size
            )
            if not left <= 10 * wanted:
                raise RuntimeError(
                    f"conjugate gradients left a residual of {left:.1e}; expected {wanted:.1e}: "
                    "more steps, a larger damping, or double precision"
                )
            found.append(solution)
        return torch.stack(found, 1).reshape(right.shape)

    def trace(
        self, probes: int = 16, generator: torch.Generator | None = None
    ) -> tuple[float, float]:
        """An estimate of ``Σ Θ[i, i]`` from random signs (Hutchinson 1990), and its standard error.

        Raises:
            ValueError: fewer than two probes.
        """
        _check_probes(probes)
        vectors = signs(probes, self.size, self._zeros(), generator)
        return _mean((vectors * (self @ vectors.T).T).sum(1).double())

    def diagonal(self, probes: int = 16, generator: torch.Generator | None = None) -> Tensor:
        """An estimate of ``Θ[i, i]``, ``(size,)``: the mean of ``z ⊙ Θ z`` over random signs z.

        Source: Bekas, Kokiopoulou & Saad 2007. The exact one is that of
        ``empirical_ntk(..., reduce="sample_diagonal")``.

        Raises:
            ValueError: fewer than two probes.
        """
        _check_probes(probes)
        vectors = signs(probes, self.size, self._zeros(), generator)
        found: Tensor = (vectors.T * (self @ vectors.T)).mean(1)
        return found

    def _times(self, columns: Tensor) -> Tensor:
        refuse_dropout(self.model)
        found = []
        with self._graphs() as graphs:
            for column in columns.unbind(1):
                parts = torch.split(column, [each.samples * self._functions for each in graphs])
                pulled = [each.pull(part) for each, part in zip(graphs, parts, strict=True)]
                total = [
                    self.scales.get(name, 1.0) * sum(each)
                    for name, each in zip(self.names, zip(*pulled, strict=True), strict=True)
                ]
                found.append(torch.cat([each.push(total) for each in graphs]))
        return torch.stack(found, 1) if found else torch.zeros_like(columns)

    @contextmanager
    def _graphs(self) -> Iterator[list["_Linear"]]:
        with alone(self.model):
            yield self._linear()

    def _linear(self) -> list["_Linear"]:
        """The batches' graphs, made anew where a parameter or the mode changed."""
        state = state_of(self.model, self.batches)
        if self._held is None or self._held[0] != state:
            made = [
                _Linear.of(self.model, self.names, x, self.outputs, n)
                for x, n in zip(self.batches, self.samples, strict=True)
            ]
            self._held = state, made
        return self._held[1]

    def _zeros(self) -> Tensor:
        return torch.zeros(self.size, dtype=self.precision, device=self.device)

    def _random(self, generator: torch.Generator | None) -> Tensor:
        return signs(1, self.size, self._zeros(), generator)[0]

    def _check(self, right: Tensor) -> None:
        if right.dim() not in (1, 2) or len(right) != self.size:
            shape = tuple(right.shape)
            raise ValueError(
                f"right has shape {shape}; expected ({self.size},) or ({self.size}, k)"
            )

    def __getstate__(self) -> dict[str, Any]:
        """All but the graphs, which neither copies nor pickles carry."""
        return self.__dict__ | {"_held": None}


@dataclass(frozen=True, eq=False)
class _Linear:
    """One batch's outputs as a linear function of small changes of parameters, and its adjoint.

    ``seeds`` are ``(c, n, o)`` over the entries o of outputs, None for all of them.
    """

    graph: Graph
    samples: int
    seeds: Tensor | None

    @classmethod
    def of(
        cls, model: nn.Module, names: Sequence[str], inputs: Inputs, outputs: Outputs, samples: int
    ) -> "_Linear":
        graph = Graph.of(model, names, summed, arguments(inputs), None)
        y = graph.output
        if not isinstance(y, Tensor) or y.dim() == 0 or len(y) != samples:
            given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"the output is {given}; expected a tensor of {samples} samples")
        if isinstance(outputs, str) and outputs == "all":
            return cls(graph, samples, None)
        seeds = Seeds(outputs).columns(summed, y.detach(), None)
        return cls(graph, samples, seeds.flatten(2))

    @property
    def functions(self) -> int:
        """How many functions of a sample's outputs there are."""
        if self.seeds is not None:
            return len(self.seeds)
        return int(self.graph.output[0].numel())

    def pull(self, v: Tensor) -> Vector:
        """``Σ_{n,c} J[n, c, θ] v[(n, c)]``."""
        v = v.reshape(self.samples, -1)
        if self.seeds is not None:
            v = torch.einsum("cno,nc->no", self.seeds, v)
        y = self.graph.output
        return self.graph.pull((v.reshape(y.shape).to(y.dtype),) if y.requires_grad else ())

    def push(self, u: Sequence[Tensor]) -> Tensor:
        """``Σ_θ J[n, c, θ] u[θ]``, flat."""
        found = self.graph.push(tuple(u))
        y = found[0] if found else torch.zeros_like(self.graph.output)
        if self.seeds is None:
            return y.flatten()
        return torch.einsum("cno,no->nc", self.seeds, y.reshape(self.samples, -1)).flatten()


def _check_probes(probes: int) -> None:
    if probes < 2:
        raise ValueError(f"probes is {probes}; expected at least 2 for a standard error")


def _mean(found: Tensor) -> tuple[float, float]:
    return float(found.mean()), float(found.std()) / sqrt(len(found))
