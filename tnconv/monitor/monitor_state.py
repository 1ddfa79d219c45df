"""What a monitor remembers between steps, so that a resumed run records what it would have."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import torch

from tnconv.monitor.further_measurements import Smoothed
from tnconv.monitor.lanczos_experience import Experience
from tnconv.monitor.seen import Seen

if TYPE_CHECKING:
    from tnconv.monitor.training_monitor import Monitor

KEPT = ("step", "samples", "loss", "losses", "along", "updates", "gradients")
"""What of a step the step after it can need."""


def state_of(monitor: "Monitor") -> dict[str, Any]:
    """Tensors, numbers and strings alone."""
    last, subject = monitor._last, monitor.subject
    return {
        "steps": monitor.steps,
        "compared": monitor._compared,
        "reduction": subject.found_reduction,
        **monitor._origins.state(),
        "last": None if last is None else {name: _copy(getattr(last, name)) for name in KEPT},
        "followed": [each.name for each in monitor._followed],
        "ranges": asdict(monitor._ranges),
        "generator": subject.generator.get_state(),
        "vectors": {end: v.clone() for end, v in subject.spectra.vectors.items()},
        "experience": {end: e.state() for end, e in subject.spectra.experience.items()},
        "smoothed": {m.name: _copy(m.state) for m in _smoothed(monitor)},
        "alerts": dict(monitor._rules.said),
    }


def restore(monitor: "Monitor", state: Mapping[str, Any]) -> None:
    """Take a state over, onto the devices of the monitor's parameters."""
    parameters = [p for _, p in monitor.subject.named]
    monitor.steps = state["steps"]
    monitor._compared = state.get("compared", False)
    monitor.subject.found_reduction = state.get("reduction")
    monitor._origins.load(state, parameters)
    last = state["last"]
    monitor._last = None if last is None else Seen(**{k: _copy(v) for k, v in last.items()})
    if monitor._last is not None:
        for name in ("updates", "gradients"):
            given = getattr(monitor._last, name)
            moved = [t.to(p.device) for t, p in zip(given, parameters, strict=False)]
            setattr(monitor._last, name, moved)
    monitor._followed = tuple(m for m in monitor.measurements if m.name in state["followed"])
    for each in fields(monitor._ranges):
        setattr(monitor._ranges, each.name, state["ranges"][each.name])
    monitor.subject.generator.set_state(state["generator"].cpu())
    monitor.subject.spectra.vectors = {k: v.clone() for k, v in state["vectors"].items()}
    known = _copy(state["experience"])
    monitor.subject.spectra.experience = {end: Experience.of(e) for end, e in known.items()}
    for smoothed in _smoothed(monitor):
        smoothed.state.clear()
        smoothed.state.update(_copy(state["smoothed"].get(smoothed.name, {})))
    monitor._rules.said = dict(state["alerts"])


def _smoothed(monitor: "Monitor") -> list[Smoothed]:
    return [m for m in monitor.measurements if isinstance(m, Smoothed)]


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copy(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_copy(each) for each in value]
    return value
