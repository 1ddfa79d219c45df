"""A kernel over points that arrive one after the other, and exploration bonuses from it.

With ``Z = λ I + 1/m Σ_i g_i g_iᵀ`` over the gradients g of one output at the points so far and the
network's width m, the bonus of a new point is ``σ(x)² = g(x)ᵀ Z⁻¹ g(x) / m``. By Woodbury's
identity it is ``(k(x, x) - k_x ᵀ (λ I + K)⁻¹ k_x) / λ`` with ``k = g gᵀ / m``: no matrix over
parameters, and a Cholesky factor that grows by a row for each point. Source: Zhou, Li & Gu 2020,
"Neural contextual bandits with UCB-based exploration".
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log, pi, sqrt
from typing import Literal

import torch
from torch import Tensor

from tnconv.ntk.kernel_blocks import matrix_of

CLOSE = 1e-3  # relative: what a kernel in single precision may differ by from call to call
Kernel = Callable[[Tensor, Tensor | None], Tensor]
"""``k(x, y)`` between two batches, or within one where y is None."""


@dataclass(frozen=True)
class Theory:
    """NeuralUCB's ``γ = √(ν² log det(Z)/det(λ I) - 2 ν² log δ) + √λ S``, for large width.

    The terms that vanish with the width are left out, as they have constants that are not known.

    Attributes:
        noise: ν, the scale of the rewards' noise (sub-Gaussian).
        failure: δ, the probability with which the bound may fail.
        norm: S, a bound on the norm of the reward function in the kernel's space.
    """

    noise: float = 1.0
    failure: float = 0.1
    norm: float = 1.0


Exploration = float | Theory | Literal["evidence"]
"""A constant γ, the theory's, or that of the evidence of the rewards so far."""


class IncrementalNTK:
    """``K + λ I`` over all points so far, by a bordered Cholesky factor, in double precision.

    Args:
        kernel: ``k(x, y)`` as ``(n, m)``, for instance `empirical_ntk` with ``outputs="sum"``,
            ``reduce="trace"`` and parameters that stay, over the width.
        damping: λ, the prior precision.

    >>> held = IncrementalNTK(lambda x, y=None: x @ (x if y is None else y).T, damping=2.0)
    >>> held.append(torch.eye(3)[:2])
    >>> held.variance(torch.eye(3)), round(held.logdet(), 4)  # det(λ I + K) / λ²
    (tensor([0.3333, 0.3333, 0.5000], dtype=torch.float64), 0.8109)

    Raises:
        ValueError: a damping that is not positive.
    """

    def __init__(self, kernel: Kernel, damping: float = 1.0) -> None:
        if not damping > 0:
            raise ValueError(f"damping is {damping}; expected a positive number")
        self.kernel, self.damping = kernel, damping
        self.points: Tensor | None = None
        self.rewards: Tensor | None = None
        self._factor: Tensor | None = None  # lower, of K + λ I

    def __repr__(self) -> str:
        return f"<IncrementalNTK of {len(self)} points, damping {self.damping:g}>"

    def __len__(self) -> int:
        return 0 if self.points is None else len(self.points)

    def append(self, x: Tensor, rewards: Tensor | None = None) -> None:
        """Take points ``(n, ...)``, with rewards ``(n,)`` where evidence or means are asked for.

        Raises:
            ValueError: rewards for some of the points only, or of another shape.
        """
        if len(self) and (rewards is None) != (self.rewards is None):
            raise ValueError("rewards were given for some points only; expected all or none")
        if rewards is not None and rewards.shape != (len(x),):
            raise ValueError(f"rewards have shape {tuple(rewards.shape)}; expected ({len(x)},)")
        own, x = self._own(x), x.clone()  # others may put their next point into the same tensor
        own.diagonal().add_(self.damping)
        if self.points is None or self._factor is None:
            self._factor, self.points = torch.linalg.cholesky(own), x
        else:
            border = self._white(x)  # (points, n)
            corner = torch.linalg.cholesky(own - border.T @ border)
            zeros = border.new_zeros(border.shape)
            above = torch.cat([self._factor, zeros], 1)
            self._factor = torch.cat([above, torch.cat([border.T, corner], 1)])
            self.points = torch.cat([self.points, x])
        if rewards is not None:
            given = rewards.double().to(own.device)
            self.rewards = given if self.rewards is None else torch.cat([self.rewards, given])

    def variance(self, x: Tensor) -> Tensor:
        """``σ(x)²``, ``(n,)``: what the points so far leave of ``k(x, x) / λ``."""
        prior = self._own(x).diagonal()
        if self.points is None:
            return prior / self.damping
        left: Tensor = (prior - self._white(x).square().sum(0)).clamp(min=0)
        return left / self.damping

    def mean(self, x: Tensor) -> Tensor:
        """``k_xᵀ (λ I + K)⁻¹ r``, the regression of the rewards r so far; 0 without points."""
        if self.points is None or self._factor is None:
            return self._own(x).new_zeros(len(x))
        found: Tensor = (self._white(x).T @ self._white_rewards())[:, 0]
        return found

    def logdet(self) -> float:
        """``log det(Z) / det(λ I) = log det(I + K/λ)``."""
        if self._factor is None:
            return 0.0
        return float(2 * self._factor.diagonal().log().sum()) - len(self) * log(self.damping)

    def log_evidence(self, noise: float) -> float:
        """``log N(r; 0, ν²/λ (K + λ I))``: rewards of noise ν² and a prior of variance ν²/λ."""
        if self._factor is None:
            return 0.0
        white, scale = self._white_rewards(), noise**2 / self.damping
        size, half = len(self), float(self._factor.diagonal().log().sum())
        fit = float(white.square().sum()) / scale
        return -0.5 * (fit + size * log(2 * pi * scale)) - half

    def exploration(self, gamma: Exploration) -> float:
        """γ in front of σ.

        For ``"evidence"`` it maximises `log_evidence`: ``ν² = λ rᵀ (K + λ I)⁻¹ r / n`` for n
        rewards, and ``γ = ν``, as ``ν σ(x)`` is the posterior's standard deviation. Before the
        first reward it is 1.

        Raises:
            ValueError: another word, or no rewards for the evidence.
        """
        if isinstance(gamma, Theory):
            inner = gamma.noise**2 * (self.logdet() - 2 * log(gamma.failure))
            return sqrt(inner) + sqrt(self.damping) * gamma.norm
        if gamma != "evidence":
            if isinstance(gamma, str) or not 0 <= gamma < inf:
                raise ValueError(
                    f"gamma is {gamma!r}; expected a number of at least 0, Theory or 'evidence'"
                )
            return float(gamma)
        if self._factor is None:
            return 1.0
        return sqrt(self.damping * float(self._white_rewards().square().sum()) / len(self))

    def ucb(self, x: Tensor, gamma: Exploration = 1.0, mean: Tensor | None = None) -> Tensor:
        """``f(x) + γ σ(x)``, ``(n,)``: the upper confidence bound of every point.

        Args:
            x: Points.
            gamma: The exploration's factor.
            mean: f(x), for instance of a network that was trained; by default `mean`.
        """
        centre = self.mean(x) if mean is None else mean.double()
        return centre + self.exploration(gamma) * self.variance(x).sqrt()

    def _own(self, x: Tensor) -> Tensor:
        return matrix_of(self.kernel(x, None)).double().clone()

    def _white(self, x: Tensor) -> Tensor:
        """``L⁻¹ k(points, x)``.

        Raises:
            RuntimeError: the kernel is another one by now at the points so far.
        """
        assert self.points is not None and self._factor is not None
        every = torch.cat([self.points[:1], x])
        between = matrix_of(self.kernel(self.points, every)).double()
        self._expect_same(between[:, 0])
        right = between[:, 1:]
        found: Tensor = torch.linalg.solve_triangular(self._factor, right, upper=False)
        return found

    def _expect_same(self, first: Tensor) -> None:
        """Check the kernel's column of the first point."""
        assert self._factor is not None
        known = self._factor @ self._factor[0]
        known[0] -= self.damping
        if not (first - known).norm() <= CLOSE * (known.norm() + self.damping):
            raise RuntimeError(
                "the kernel has other values at the points so far than when they were appended; "
                "expected one whose parameters stay, or a new IncrementalNTK"
            )

    def _white_rewards(self) -> Tensor:
        """``L⁻¹ r``, ``(n, 1)``."""
        if self.rewards is None:
            raise ValueError("the points have no rewards; expected append(x, rewards)")
        assert self._factor is not None
        column = self.rewards[:, None]
        found: Tensor = torch.linalg.solve_triangular(self._factor, column, upper=False)
        return found
