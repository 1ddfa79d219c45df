"""Whether natural gradient descent stays where the Jacobian hardly moves.

Zhang, Martens & Grosse 2019 prove linear convergence with ``λ_min(J_0 J_0ᵀ) > 0`` and

    ``‖J(θ) - J_0‖₂ <= C/3 √λ_min`` for all θ with ``‖θ - θ_0‖ <= R = 3 ‖y - f_0‖ / √λ_min``

for a constant ``C < 1/2``. Wenger, Dangel & Kristiadi 2023 measure both for real networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tnconv.displays import Shown
from tnconv.models.capture import alone
from tnconv.models.computing import Inputs, arguments
from tnconv.ntk.drift import jacobian_drift
from tnconv.ntk.empirical import empirical_ntk
from tnconv.ntk.linear_model import parameter_travel
from tnconv.ntk.sample_chunks import Chunks
from tnconv.ntk.sides import State, at_state, learning
from tnconv.ntk.spectrum import spectrum, warn_of_precision

Verdict = Literal["refuted", "not refuted", "outside the ball"]


@dataclass(frozen=True, repr=False)
class StableJacobian(Shown):
    """What one checkpoint θ says about the conditions at θ_0.

    Attributes:
        smallest_eigenvalue: ``λ_min(J_0 J_0ᵀ)``, the first condition's.
        radius: R, of the ball in which the second one is asked for.
        distance: ``‖θ - θ_0‖``.
        constant: ``3 ‖J(θ) - J_0‖₂ / √λ_min``, a lower bound on C where θ is inside the ball.
        verdict: ``"refuted"`` where λ_min is not positive, or where θ is inside the ball and the
            constant is 1/2 or more; one θ never shows that a condition about all of them holds.
    """

    smallest_eigenvalue: float
    radius: float
    distance: float
    constant: float
    verdict: Verdict

    @property
    def inside_ball(self) -> bool:
        """Whether θ is one of those that the condition is about."""
        return self.distance <= self.radius


def stable_jacobian(
    model: nn.Module,
    x: Inputs,
    targets: Tensor,  # (n, *o)
    before: State,
    *,
    parameters: Sequence[str] | None = None,
    memory_limit: int | None = None,
    chunks: Chunks = None,
) -> StableJacobian:
    """The conditions of natural gradient descent at the model's parameters, from ``before`` on.

    Args:
        model: The model as it is now, at θ.
        x: The training inputs, or a sequence or mapping of the model's arguments.
        targets: What outputs are regressed on, in their shape.
        before: A module with the same parameters, or values of some of them by name: θ_0.
        parameters: The names of those that count, by default all that learn.
        memory_limit: As in `empirical_ntk`.
        chunks: As in `empirical_ntk`.

    Raises:
        NotImplementedError: a layer that mixes samples, or that has no diagram.
        ValueError: targets of another shape than the outputs, or names that do not fit.
    """
    start = at_state(model, before, "before")
    names = learning(model, parameters)
    args, kwargs = arguments(x)
    with torch.no_grad(), alone(start):
        residual = start(*args, **kwargs)
    if residual.shape != targets.shape:
        shapes = tuple(targets.shape), tuple(residual.shape)
        raise ValueError(f"targets have shape {shapes[0]}; expected the outputs' {shapes[1]}")
    error = float((targets - residual).double().norm())
    how = {"parameters": names, "memory_limit": memory_limit, "chunks": chunks}
    theta = empirical_ntk(start, x, dtype=torch.float64, **how)  # type: ignore[call-overload]
    values = spectrum(theta)
    smallest = float(values[-1])
    precision = dict(start.named_parameters())[names[0]].dtype
    warn_of_precision(precision, len(values), float(values[0]))
    drift = jacobian_drift(model, x, start, **how)  # type: ignore[arg-type]
    distance = parameter_travel(model, start, names, relative=False)
    return _judged(smallest, error, distance, drift.spectral)


def _judged(smallest: float, error: float, distance: float, drift: float) -> StableJacobian:
    if smallest <= 0:
        return StableJacobian(smallest, float("inf"), distance, float("inf"), "refuted")
    radius, constant = 3 * error / smallest**0.5, 3 * drift / smallest**0.5
    verdict: Verdict = "not refuted"
    if distance > radius:
        verdict = "outside the ball"
    elif constant >= 0.5:
        verdict = "refuted"
    return StableJacobian(smallest, radius, distance, constant, verdict)
