"""What measurements may need, and why a step did not have what one of them needs."""

from collections.abc import Hashable, Iterable
from dataclasses import fields

from tnconv.monitor.measurement import Measurement
from tnconv.monitor.needs import Activity, Diagonal, GradientHistogram, JointHistogram, Spectrum
from tnconv.monitor.seen import Seen

SETTLED = {
    "diagonals": "Diagonal(...)",
    "spectra": "Spectrum(...)",
    "histograms": "GradientHistogram(...)",
    "dead": "Activity()",
    "saturated": "Activity()",
}
"""Attributes whose needs have settings, and what is needed for them."""
KINDS = (Activity, Diagonal, GradientHistogram, JointHistogram, Spectrum)
NEEDS = tuple(
    each.name for each in fields(Seen) if each.name not in ("has", "apart", "several", *SETTLED)
)
OF_LOSS = ("loss", "losses")


def expect_needs(measurements: Iterable[Measurement]) -> None:
    """Check that everything that is needed is something that a step can have.

    Raises:
        ValueError: an unknown need.
    """
    for each in measurements:
        for need in (*each.needed(), *each.next_needs):
            if isinstance(need, str) and need in SETTLED:
                kind = f"{SETTLED[need]} of tnconv.monitor.needs"
                raise ValueError(f"{each.name} needs {need!r}; expected {kind}")
            if need not in NEEDS and not isinstance(need, KINDS):
                known = ", ".join(NEEDS)
                raise ValueError(f"{each.name} needs {need!r}; expected some of {known}")


def why_missing(need: Hashable, seen: Seen) -> str | None:
    """Why a step whose gradients arrived lacks something, where that is a mistake in its use."""
    if need == "rates":
        return "no optimizer is known; expected Monitor(..., optimizer=optimizer)"
    if isinstance(need, Diagonal | Spectrum) and "loss" in seen.has:
        if not seen.several:
            return None  # what failed was said
        return (
            "the loss has several terms, each of a call of its own; expected a loss_fn that is "
            "their sum"
        )
    if need in OF_LOSS or isinstance(need, Diagonal | Spectrum):
        return (
            "no loss was seen; expected that the loop calls the very loss_fn that the monitor has, "
            "or monitor.loss(output, targets) where it is a function"
        )
    return None
