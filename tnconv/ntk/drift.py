"""How far a Jacobian moved, ``J_t - J_0``, without subtracting kernels.

A layer's row is a product of what it read and of the vectors after it, ``J = Σ_o v u``, so

    ``J_t - J_0 = Σ_o (v_t - v_0) u_t + Σ_o v_0 (u_t - u_0)``,

which is the same network with twice as many positions. In single precision the difference of
kernels loses everything that is below 1e-7 of them, the square of the drift; this loses what is
below 1e-7 of the operands, the drift itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tnconv.displays import Shown, described, html_table, text_table
from tnconv.models.computing import Inputs
from tnconv.models.terms import Term
from tnconv.ntk.kernel_blocks import matrix_of
from tnconv.ntk.sample_chunks import Chunks, kernel
from tnconv.ntk.seeds import Outputs, Seeds
from tnconv.ntk.sides import Side, State, at_state, learning
from tnconv.operators.low_rank.rows import JacobianRows


@dataclass(frozen=True, repr=False)
class Drift:
    """``‖J_t - J_0‖₂`` and ``‖J_t - J_0‖_F``, and both for each parameter by name.

    >>> Drift(5.0, 7.0, {"weight": Drift(4.0, 6.0, {}), "bias": Drift(3.0, 3.5, {})})
    Drift of a Jacobian
    parameter  spectral  frobenius
    all        5         7
    weight     4         6
    bias       3         3.5
    """

    spectral: float
    frobenius: float
    layers: Mapping[str, "Drift"]

    def __repr__(self) -> str:
        return f"{self._title}\n{text_table(self._rows())}"

    def _repr_html_(self) -> str:
        return html_table(self._title, self._rows())

    _title = "Drift of a Jacobian"

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        yield "parameter", "spectral", "frobenius"
        for name, each in {"all": self, **self.layers}.items():
            yield name, described(each.spectral), described(each.frobenius)


def jacobian_drift(
    model: nn.Module,
    x: Inputs,
    before: State,
    *,
    outputs: Outputs = "all",
    parameters: Sequence[str] | None = None,
    memory_limit: int | None = None,
    chunks: Chunks = None,
    dtype: torch.dtype | None = torch.float64,
    batch_dim: int = 0,
) -> Drift:
    """How far the Jacobian of a model on a batch is from that of an earlier checkpoint.

    Args:
        model: The model as it is now.
        x: The model's input, or a sequence or mapping of its arguments.
        before: A module with the same parameters, or values of some of them by name.
        outputs: Functions of the outputs, as in `empirical_ntk`.
        parameters: The names of those that count, by default all that learn.
        memory_limit: As in `empirical_ntk`.
        chunks: As in `empirical_ntk`.
        dtype: What inner products of differences are summed in.
        batch_dim: The dimension of the inputs that samples have.

    >>> model = nn.Linear(3, 2)
    >>> drift = jacobian_drift(model, torch.rand(4, 3), {"weight": torch.zeros(2, 3)})
    >>> drift.spectral, list(drift.layers)  # the Jacobian of a linear model does not move
    (0.0, ['weight', 'bias'])

    Raises:
        NotImplementedError: a layer that mixes samples, or that has no diagram.
        ValueError: names, shapes or sizes that do not fit, or a memory limit below what is needed.
    """
    grams = drift_kernels(
        model, x, before, outputs, parameters, memory_limit, chunks, dtype, batch_dim
    )
    layers = {name: _measured(gram, {}) for name, gram in grams.items()}
    return _measured(torch.stack([*grams.values()]).sum(0), layers)


def drift_kernels(
    model: nn.Module,
    x: Inputs,
    before: State,
    outputs: Outputs = "all",
    parameters: Sequence[str] | None = None,
    memory_limit: int | None = None,
    chunks: Chunks = None,
    dtype: torch.dtype | None = torch.float64,
    batch_dim: int = 0,
) -> dict[str, Tensor]:
    """``(J_t - J_0)(J_t - J_0)ᵀ`` of shape ``(n, c, m, d)`` by parameter name.

    Args:
        model: The model as it is now.
        x: The model's input, or a sequence or mapping of its arguments.
        before: The earlier checkpoint, as in `jacobian_drift`.
        outputs: Functions of the outputs.
        parameters: The names of those that count.
        memory_limit: As in `empirical_ntk`.
        chunks: As in `empirical_ntk`.
        dtype: What inner products are summed in.
        batch_dim: The dimension of the inputs that samples have.
    """
    names = learning(model, parameters)
    now = Side(model, x, Seeds(outputs), names, batch_dim, memory_limit)
    moved = Moved(now, replace(now, model=at_state(model, before, "before")))
    whole = slice(0, now.samples)
    return kernel(moved, moved, whole, True, "full", dtype, {}, True, chunks)


@dataclass(frozen=True, eq=False, repr=False)
class Moved(Shown):
    """A side of a kernel whose Jacobian is the difference of two."""

    now: Side
    before: Side

    @property
    def samples(self) -> int:
        """The size of the batch."""
        return self.now.samples

    @property
    def memory_limit(self) -> int | None:
        """How many bytes rows and products may hold."""
        return self.now.memory_limit

    def rows(self, start: int = 0, stop: int | None = None) -> JacobianRows:
        """The rows of ``J_t - J_0`` of samples from ``start`` to ``stop``."""
        return difference(self.now.rows(start, stop), self.before.rows(start, stop))


def difference(now: JacobianRows, before: JacobianRows) -> JacobianRows:
    """The rows ``J_t - J_0``, from differences of operands where layers saw the same shapes."""
    names = [name for name in now.like if name in now.terms or name in before.terms]
    terms = {name: _moved(now.terms.get(name), before.terms.get(name)) for name in names}
    return replace(now, terms=terms)


def _moved(now: Term | None, before: Term | None) -> Term:
    if now is None:
        assert before is not None
        return Term.known(-before.gradients, before.vectors)
    if before is None:
        return now
    held = [each.name for each in now.operation.networks[now.operand].tensors]
    alike = now.operation == before.operation and now.operand == before.operand
    if not alike or len(held) > len(set(held)):  # the network is not linear in every operand
        return Term.known(now.gradients - before.gradients, now.vectors)
    after, earlier = now.operands, before.operands
    names = [name for name in after if name in held or name == "grad_output"]
    changes = {name: after[name] - earlier[name] for name in names}
    terms = []
    for at, name in enumerate(names):
        if changes[name].any():
            first = {n: earlier[n] for n in names[:at]}
            terms.append(_with_operands(now, after | first | {name: changes[name]}))
    return Term.of(terms) if terms else _with_operands(now, after | changes)


def _with_operands(term: Term, operands: Mapping[str, Tensor]) -> Term:
    read = {name: x for name, x in operands.items() if name != "grad_output"}
    return term.reading(read, operands.get("grad_output"))


def _measured(gram: Tensor, layers: Mapping[str, Drift]) -> Drift:
    matrix = matrix_of(gram).double()
    largest = torch.linalg.eigvalsh(matrix)[-1].clamp(min=0)
    return Drift(float(largest.sqrt()), float(matrix.trace().clamp(min=0).sqrt()), layers)
