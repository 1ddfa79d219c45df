"""Losses of policies, in reinforcement learning, and of Gaussians: with their second derivatives.

``l = log π(a)`` is the likelihood of what was done, as a function of one output of a network: a
Gaussian's mean, its variance, or logits. With A the advantage and ρ = π / π_old, the losses are

    likelihood, A2C: ``L = -A l``,  PPO: ``L = -min(ρ A, clip(ρ, 1 - ε, 1 + ε) A)``,

averaged over samples, and the diagonal of their Hessians, in every output by itself, is

    ``-A l''``,  and  ``-A ρ (l'² + l'')``, or 0 where ρ is clipped.

Sources: Mnih et al. 2016; Schulman et al. 2017; Elsayed et al. 2024.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnconv.displays import shown_tuple

Distribution = Literal["gaussian mean", "gaussian variance", "softmax"]


class Actions(NamedTuple):
    """What was done, and what came of it.

    ``action`` has the outputs' shape ``(n, d)``, or is labels ``(n)`` for "softmax"; ``advantage``
    and ``old_log_probability`` (for `PPOLoss`) are ``(n)``; ``other`` is a Gaussian's variance for
    its mean, and its mean for its variance.

    Args:
        action: what was done, in the outputs' shape or as labels.
        advantage: A of each sample.
        old_log_probability: ``log π_old`` of each sample.
        other: the other parameter of a Gaussian.
    """

    action: Tensor
    advantage: Tensor | None = None
    old_log_probability: Tensor | None = None
    other: Tensor | None = None

    def __repr__(self) -> str:
        return shown_tuple(self)


class _Policy(nn.Module):
    """What losses of policies share: the distribution, and its likelihood's derivatives."""

    def __init__(
        self, distribution: Distribution, reduction: Literal["mean", "sum"] = "mean"
    ) -> None:
        super().__init__()
        known = get_args(Distribution)
        if distribution not in known:
            raise ValueError(f"distribution is {distribution!r}; expected one of {known}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'sum'")
        self.distribution, self.reduction = distribution, reduction

    def log_probability(self, output: Tensor, targets: Actions) -> Tensor:
        """``l`` of each sample, over all its dimensions: shape ``(n)``."""
        if self.distribution == "softmax":
            return output.log_softmax(1).gather(1, targets.action.unsqueeze(1)).squeeze(1)
        error, variance = self._gaussian(output, targets)
        each = -(error**2 / variance + torch.log(2 * torch.pi * variance)) / 2
        return each.flatten(1).sum(1)

    def likelihood_derivatives(self, output: Tensor, targets: Actions) -> tuple[Tensor, Tensor]:
        """``l'`` and ``l''`` in every output by itself."""
        if self.distribution == "softmax":
            p = output.softmax(1)
            return F.one_hot(targets.action, output.shape[1]) - p, p * p - p
        error, v = self._gaussian(output, targets)
        if self.distribution == "gaussian mean":
            return error / v, -1 / v
        return (error**2 / v - 1) / (2 * v), 1 / (2 * v**2) - error**2 / v**3

    def _gaussian(self, output: Tensor, targets: Actions) -> tuple[Tensor, Tensor]:
        if targets.other is None:
            raise ValueError("the targets have no other parameter; expected Actions(..., other=)")
        mean, variance = output, targets.other.expand_as(output)
        if self.distribution == "gaussian variance":
            mean, variance = variance, output
        return targets.action - mean, variance

    def _reduced(self, each: Tensor) -> Tensor:
        return each.mean() if self.reduction == "mean" else each.sum()

    def _factors(self, factor: Tensor, output: Tensor) -> Tensor:
        """A factor of each sample, with the reduction's, along the outputs."""
        factor = factor / len(output) if self.reduction == "mean" else factor
        return factor.reshape(-1, *[1] * (output.dim() - 1))


class A2CLoss(_Policy):
    """``L = -A log π(a)``: of an actor, or a likelihood where there is no advantage (A = 1).

    >>> loss_fn, mean = A2CLoss("gaussian mean"), torch.zeros(4, 2)
    >>> targets = Actions(torch.ones(4, 2), torch.ones(4), other=torch.ones(4, 2))
    >>> loss_fn.second_derivatives(mean, targets)[0]
    tensor([0.2500, 0.2500])
    """

    def forward(self, output: Tensor, targets: Actions) -> Tensor:
        l = self.log_probability(output, targets)  # noqa: E741
        return self._reduced(-l if targets.advantage is None else -targets.advantage * l)

    def second_derivatives(self, output: Tensor, targets: Actions) -> Tensor:
        """``-A l''``."""
        _, second = self.likelihood_derivatives(output, targets)
        advantage = targets.advantage
        advantage = torch.ones_like(output[:, 0]) if advantage is None else advantage
        return -self._factors(advantage, output) * second


class PPOLoss(_Policy):
    """``L = -min(ρ A, clip(ρ, 1 - ε, 1 + ε) A)``, the clipped objective.

    >>> loss_fn, logits = PPOLoss("softmax", 0.1), torch.zeros(2, 4)
    >>> targets = Actions(torch.tensor([0, 1]), torch.ones(2), torch.full((2,), 0.25).log())
    >>> loss_fn.second_derivatives(logits, targets).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        distribution: Distribution,
        clip: float = 0.2,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(distribution, reduction)
        if not clip > 0:
            raise ValueError(f"clip is {clip!r}; expected a positive number")
        self.clip = clip

    def forward(self, output: Tensor, targets: Actions) -> Tensor:
        ratio, advantage = self._ratio(output, targets)
        bounded = ratio.clamp(1 - self.clip, 1 + self.clip)
        return self._reduced(-torch.minimum(ratio * advantage, bounded * advantage))

    def second_derivatives(self, output: Tensor, targets: Actions) -> Tensor:
        """``-A ρ (l'² + l'')``, or 0 where ρ is clipped."""
        ratio, advantage = self._ratio(output, targets)
        first, second = self.likelihood_derivatives(output, targets)
        clipped = torch.where(advantage > 0, ratio > 1 + self.clip, ratio < 1 - self.clip)
        factor = torch.where(clipped, 0, -advantage * ratio)
        return self._factors(factor, output) * (first**2 + second)

    def _ratio(self, output: Tensor, targets: Actions) -> tuple[Tensor, Tensor]:
        if targets.advantage is None or targets.old_log_probability is None:
            raise ValueError("expected targets with an advantage and an old_log_probability")
        l = self.log_probability(output, targets)  # noqa: E741
        return (l - targets.old_log_probability).exp(), targets.advantage


class GaussianNLLLoss(nn.GaussianNLLLoss):
    """Torch's, of a mean: targets are a pair ``(target, variance)``, or of a variance.

    ``of="variance"`` takes the output for the variance, and ``(target, mean)`` as targets.

    >>> loss_fn = GaussianNLLLoss()
    >>> loss_fn.second_derivatives(torch.zeros(2, 1), (torch.ones(2, 1), torch.full((2, 1), 0.5)))
    tensor([[1.],
            [1.]])

    Args:
        of: what the output is: "mean" or "variance".
        full: whether the constant is added.
        eps: the least variance.
        reduction: "mean" or "sum".
    """

    def __init__(
        self,
        of: Literal["mean", "variance"] = "mean",
        *,
        full: bool = False,
        eps: float = 1e-6,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(full=full, eps=eps, reduction=reduction)
        if of not in ("mean", "variance"):
            raise ValueError(f"of is {of!r}; expected 'mean' or 'variance'")
        self.of = of

    def forward(self, output: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        target, other = targets
        mean, variance = (output, other) if self.of == "mean" else (other, output)
        return super().forward(mean, target, variance)

    def second_derivatives(self, output: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        """``1 / v`` in the mean; ``(2 e² / v - 1) / (2 v²)`` in the variance, at ε at least.

        Torch's gradient goes past the bound, as if it were not there; so does this.
        """
        target, other = targets
        mean, variance = (output, other) if self.of == "mean" else (other, output)
        v, error = variance.expand_as(output).clamp(min=self.eps), target - mean
        own = 1 / v if self.of == "mean" else (2 * error**2 / v - 1) / (2 * v**2)
        return own / output.numel() if self.reduction == "mean" else own
