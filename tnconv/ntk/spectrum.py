"""Numbers that describe a kernel matrix: its spectrum, and how two of them compare."""

import torch
from torch import Tensor

from tnconv.diagrams.notices import warn
from tnconv.ntk.kernel_blocks import matrix_of


def warn_of_precision(dtype: torch.dtype, size: int, largest: float) -> None:
    """Say what a smallest eigenvalue is worth in less than double precision."""
    if torch.finfo(dtype).bits >= 64:
        return
    error = torch.finfo(dtype).eps * size**0.5 * largest
    warn(
        f"the smallest eigenvalue was computed in {dtype}: entries are rounded, which moves it by "
        f"about {error:.0e} (the largest is {largest:.1e}); expected a model in double precision "
        "where that matters"
    )


def spectrum(theta: Tensor) -> Tensor:
    """The eigenvalues of a kernel in descending order, in double precision.

    ``theta`` is ``(n, c, n, c)``, ``(n, n)``, or a matrix ``(size, size)``.
    """
    found: Tensor = torch.linalg.eigvalsh(matrix_of(theta).double())
    return found.flip(0)


def smallest_eigenvalue(theta: Tensor) -> float:
    """λ_min of a kernel; in less than double precision a warning says what it is worth."""
    values = spectrum(theta)
    warn_of_precision(theta.dtype, len(values), float(values[0]))
    return float(values[-1])


def effective_rank(theta: Tensor) -> float:
    """``exp(-Σ_i p_i log p_i)`` with ``p_i = λ_i / Σ λ``: the entropy's number of directions.

    Source: Roy & Vetterli 2007. Between 1 and the size.

    >>> effective_rank(torch.eye(4))
    4.0
    """
    values = spectrum(theta).clamp(min=0)
    p = values / values.sum()
    return float(torch.special.entr(p).sum().exp())


def kernel_drift(theta: Tensor, before: Tensor) -> float:
    """``‖Θ - Θ₀‖_F / ‖Θ₀‖_F``."""
    first, second = _pair(theta, before)
    return float((first - second).norm() / second.norm())


def kernel_distance(theta: Tensor, other: Tensor) -> float:
    """``1 - ⟨Θ, Θ'⟩ / (‖Θ‖_F ‖Θ'‖_F)``, without regard to scale.

    Source: Fort et al. 2020, "Deep learning versus kernel learning".

    >>> kernel_distance(torch.eye(3), 2 * torch.eye(3))
    0.0
    """
    first, second = _pair(theta, other)
    first, second = first / first.norm(), second / second.norm()
    return float((first - second).square().sum() / 2)  # without cancellation


def centred_alignment(theta: Tensor, other: Tensor) -> float:
    """``⟨HΘH, HΘ'H⟩ / (‖HΘH‖_F ‖HΘ'H‖_F)`` with the centring ``H = I - 11ᵀ/N``.

    Source: Cortes, Mohri & Rostamizadeh 2012.
    """
    first, second = map(_centred, _pair(theta, other))
    return float((first * second).sum() / (first.norm() * second.norm()))


def target_alignment(theta: Tensor, targets: Tensor) -> float:
    """``⟨Θ, Y Yᵀ⟩ / (‖Θ‖_F ‖Y Yᵀ‖_F)``: Y is ``(n·c, 1)`` from targets ``(n, c)`` for a kernel of
    all outputs, and ``(n, k)`` for one of shape ``(n, n)``.

    Source: Cristianini et al. 2001.
    """
    matrix = matrix_of(theta).double()
    y = targets.double()
    y = y.reshape(len(matrix), -1)
    ideal = y @ y.T
    return float((matrix * ideal).sum() / (matrix.norm() * ideal.norm()))


def _centred(matrix: Tensor) -> Tensor:
    rows = matrix - matrix.mean(0, keepdim=True)
    return rows - rows.mean(1, keepdim=True)


def _pair(theta: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if theta.shape != other.shape:
        shapes = tuple(theta.shape), tuple(other.shape)
        raise ValueError(f"kernels have shapes {shapes[0]} and {shapes[1]}; expected equal ones")
    return matrix_of(theta).double(), matrix_of(other).double()
