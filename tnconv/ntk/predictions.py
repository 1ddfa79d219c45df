"""What a tangent kernel predicts: training, uncertainty and curvature, from its blocks alone."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from tnconv.displays import Shown
from tnconv.losses.roots import curvature
from tnconv.ntk.kernel_blocks import matrix_of


@dataclass(frozen=True, repr=False)
class Prediction(Shown):
    """Means ``(m, *c)``, and covariances ``(m, c, m, c)`` of a Gaussian process where asked for."""

    mean: Tensor
    covariance: Tensor | None


def ntk_predict(
    train: Tensor,  # (n, c, n, c)
    cross: Tensor,  # (m, c, n, c)
    residual: Tensor,  # (n, *c)
    start: Tensor,  # (m, *c)
    *,
    time: float = inf,
    rate: float = 1.0,
    ridge: float = 0.0,
    test: Tensor | None = None,  # (m, c, m, c)
) -> Prediction:
    """``f_t(x) = f_0(x) + Θ(x, X) φ(Θ(X, X)) (y - f_0(X))``, ``φ(λ) = (1 - e^{-η(λ+ρ)t})/(λ+ρ)``.

    Gradient flow ``dθ/dt = -η ∂/∂θ (½ ‖f(X) - y‖² + ½ ρ ‖θ - θ_0‖²)`` of the linearised model; the
    flow of a mean over k entries has the rate η/k. At infinite time it is kernel (ridge)
    regression, and the posterior of a Gaussian process with the kernel Θ as prior covariance and
    noise of variance ρ. Source: Lee et al. 2019, "Wide neural networks of any depth evolve as
    linear models under gradient descent". Computed in double precision.

    Args:
        train: The kernel of the training inputs X, or a matrix.
        cross: The kernel between test inputs x and X, or a matrix.
        residual: ``y - f_0(X)``.
        start: ``f_0(x)``.
        time: t.
        rate: η.
        ridge: ρ. Without it, directions in which Θ is zero within rounding are not learned.
        test: The kernel of the test inputs, for the posterior's covariance.

    >>> theta = torch.eye(3)
    >>> found = ntk_predict(theta, theta, torch.ones(3), torch.zeros(3), ridge=1.0, test=theta)
    >>> found.mean, found.covariance.diagonal()
    (tensor([0.5000, 0.5000, 0.5000]), tensor([0.5000, 0.5000, 0.5000]))

    Raises:
        ValueError: shapes that do not fit, a negative time, rate or ridge, or a covariance at a
            finite time.
    """
    k, between = matrix_of(train).double(), matrix_of(cross).double()
    _check_blocks(k, between, residual, start)
    if min(time, rate, ridge) < 0 or not rate:
        raise ValueError(
            f"time, rate and ridge are {time}, {rate}, {ridge}; expected them positive"
        )
    if test is not None and time != inf:
        raise ValueError(f"time is {time}; the posterior's covariance is that of infinite time")
    values, vectors = torch.linalg.eigh(k)
    damped = values + ridge
    threshold = len(k) * torch.finfo(train.dtype).eps * float(values[-1].abs())
    learned = damped.abs() > threshold
    decay = -torch.expm1(-rate * time * damped) if time != inf else torch.ones_like(damped)
    limit = rate * time if time != inf else 0.0  # of φ at zero
    phi = torch.where(learned, decay / torch.where(learned, damped, 1.0), limit)
    along = between @ vectors
    change = along @ (phi * (vectors.T @ residual.double().flatten()))
    mean = (start.double().flatten() + change).reshape(start.shape).to(start.dtype)
    if test is None:
        return Prediction(mean, None)
    found = matrix_of(test).double() - (along * phi) @ along.T
    return Prediction(mean, found.reshape(test.shape).to(test.dtype))


def ggn_spectrum(
    theta: Tensor,  # (n, c, n, c)
    loss_fn: Callable[..., Tensor],
    outputs: Tensor,  # (n, *c)
    targets: Any,
) -> Tensor:
    """The Gauss-Newton matrix's eigenvalues that are not zero, in descending order, from a kernel.

    ``Jᵀ Λ J`` and ``Sᵀ Θ S`` have them in common, with ``Λ = S Sᵀ`` the loss's Hessian in the
    outputs: no pass through the network. There may be zeros among them.

    Args:
        theta: The kernel of the batch, of all outputs.
        loss_fn: A loss whose Hessian's root is known, as for `tnconv.low_rank_ggn`.
        outputs: The model's outputs on the batch.
        targets: The loss's targets.

    Raises:
        NotImplementedError: a loss without a known root.
        ValueError: a kernel of other outputs.
    """
    root = _root(theta, loss_fn, outputs, targets)
    gram = root.T @ matrix_of(theta).double() @ root
    found: Tensor = torch.linalg.eigvalsh(gram)
    return found.flip(0)


def glm_covariance(
    train: Tensor,  # (n, c, n, c)
    cross: Tensor,  # (m, c, n, c)
    test: Tensor,  # (m, c, c) or (m, c, m, c)
    loss_fn: Callable[..., Tensor],
    outputs: Tensor,  # (n, *c)
    targets: Any,
    prior_precision: float,
) -> Tensor:
    """``J_* (Jᵀ Λ J + δ I)⁻¹ J_*ᵀ``: outputs' covariance in a linearised Laplace approximation.

    ``(Θ_** - Θ_*X S (δ I + Sᵀ Θ_XX S)⁻¹ Sᵀ Θ_X*) / δ`` with ``Λ = S Sᵀ``, exactly. Its shape is
    that of ``test``: the outputs of each test sample (`empirical_ntk` with
    ``reduce="sample_diagonal"``), or of all together. Sources: Immer, Korzepa & Bauer 2021 for the
    model, Woodbury's identity for the rest.

    Args:
        train: The kernel of the training inputs, at the Laplace approximation's mode.
        cross: The kernel between test and training inputs.
        test: The kernel of the test inputs.
        loss_fn: The negative log-likelihood, a sum over samples; as for `tnconv.low_rank_ggn`.
        outputs: The model's outputs on the training inputs.
        targets: The training targets.
        prior_precision: δ.

    Raises:
        NotImplementedError: a loss without a known root.
        ValueError: a precision that is not positive, or kernels of other outputs.
    """
    if not prior_precision > 0:
        raise ValueError(f"prior_precision is {prior_precision}; expected a positive number")
    root = _root(train, loss_fn, outputs, targets)
    inner = root.T @ matrix_of(train).double() @ root
    inner.diagonal().add_(prior_precision)
    factor = torch.linalg.cholesky(inner)
    seen = matrix_of(cross).double() @ root
    white = torch.linalg.solve_triangular(factor, seen.T, upper=False)  # (k, m·c)
    if test.dim() == 4:
        explained = (white.T @ white).reshape(test.shape)
    else:
        each = white.T.reshape(*test.shape[:2], -1)
        explained = each @ each.mT
    found: Tensor = (test.double() - explained) / prior_precision
    return found.to(test.dtype)


def _root(theta: Tensor, loss_fn: Callable[..., Tensor], outputs: Tensor, targets: Any) -> Tensor:
    """``S[(n, c), (m, n)]``."""
    matrix = matrix_of(theta)
    if len(matrix) != outputs.numel():
        raise ValueError(
            f"the kernel has {len(matrix)} rows and outputs have shape {tuple(outputs.shape)}; "
            "expected a row for every entry"
        )
    vectors = curvature(loss_fn, outputs, targets).vectors().double().flatten(2)  # (m, n, c)
    m, n, c = vectors.shape
    found = vectors.new_zeros(n, c, m, n)
    found.diagonal(dim1=0, dim2=3).copy_(vectors.permute(2, 0, 1))
    return found.flatten(2).flatten(0, 1)


def _check_blocks(train: Tensor, cross: Tensor, residual: Tensor, start: Tensor) -> None:
    size, other = residual.numel(), start.numel()
    if train.shape != (size, size) or cross.shape != (other, size):
        raise ValueError(
            f"train and cross are matrices of shapes {tuple(train.shape)} and "
            f"{tuple(cross.shape)}; expected {(size, size)} and {(other, size)} for a residual of "
            f"{size} and a start of {other} entries"
        )
