"""How much each direction of a Newton step is damped.

A rule is a function of ``(eigenvalues, slopes, curvatures)``, of shapes ``(k,)``, ``(n, k)`` and
``(n', k)``, to a damping ``(k,)``: the step along direction k is ``-γ[k] / (λ[k] + δ[k])`` with
the means γ and λ over samples. Source: Dangel, Tatzel & Hennig 2022, section 4.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Damping = Callable[[Tensor, Tensor, Tensor], Tensor]


def constant(value: float) -> Damping:
    """``δ[k] = value``.

    >>> constant(0.1)(torch.ones(2), torch.ones(8, 2), torch.ones(8, 2))
    tensor([0.1000, 0.1000])

    Raises:
        ValueError: a value that is not positive.
    """
    _positive("value", value)
    return lambda eigenvalues, slopes, curvatures: torch.full_like(eigenvalues, value)


def relative(factor: float) -> Damping:
    """``δ[k] = factor · max_k λ[k]``: a fixed ratio to the largest eigenvalue.

    >>> relative(0.1)(torch.tensor([4.0, 2.0]), torch.ones(8, 2), torch.ones(8, 2))
    tensor([0.4000, 0.4000])

    Raises:
        ValueError: a factor that is not positive.
    """
    _positive("factor", factor)
    return lambda eigenvalues, slopes, curvatures: (factor * eigenvalues.max()).expand_as(
        eigenvalues
    )


def noise_aware(
    resamples: int = 100, least: float = 1e-3, generator: torch.Generator | None = None
) -> Damping:
    """Damp directions whose slope or curvature the batch does not determine.

    With the standard errors ``s_γ`` and ``s_λ`` of the means γ and λ over samples, by bootstrap,

        ``δ[k] = s_λ[k] + λ[k] s_γ[k]² / γ[k]² + least · max_k λ[k]``.

    The second term shrinks the step along a direction by ``γ² / (γ² + s_γ²)``, the factor that
    minimises the expected squared error of an unbiased estimate of γ with that variance; the first
    is one standard error on the safe side of the curvature.

    Args:
        resamples: The number of bootstrap resamples.
        least: A floor, relative to the largest eigenvalue.
        generator: Where resamples are drawn; torch's default generator where it is None.

    Raises:
        ValueError: fewer than two resamples, or a floor that is not positive.
    """
    if resamples < 2:
        raise ValueError(f"resamples is {resamples}; expected at least 2")
    _positive("least", least)

    def rule(eigenvalues: Tensor, slopes: Tensor, curvatures: Tensor) -> Tensor:
        slope, curvature = slopes.mean(0), curvatures.mean(0)
        noise = bootstrapped(slopes, resamples, generator)
        shrinkage = curvature * (noise / slope).square()
        unsure = bootstrapped(curvatures, resamples, generator)
        found = unsure + shrinkage + least * eigenvalues.max()
        return found.nan_to_num(nan=torch.inf, posinf=torch.inf)

    return rule


def bootstrapped(values: Tensor, resamples: int, generator: torch.Generator | None) -> Tensor:
    """Standard errors ``(k,)`` of means of ``values`` ``(n, k)``, by resampling the samples.

    Source: Efron 1979.
    """
    samples = len(values)
    device = values.device if generator is None else generator.device
    draws = torch.randint(samples, (resamples, samples), generator=generator, device=device)
    means = values[draws.to(values.device)].mean(1)
    return means.std(0)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; expected a positive number")
