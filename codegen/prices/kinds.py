"""Kinds of kernels: a formula, the coefficients in it, and the calls that show them on a device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor

from tnconv.codegen.prices.timing import Call

if TYPE_CHECKING:
    from tnconv.codegen.prices.tables import Table

Random = Callable[..., Tensor]
"""Normal numbers of a shape, on the device and in the dtype that are measured."""


@dataclass(unsafe_hash=True)  # in place of frozen, which takes three times as long to make
class Kernel:
    """One call into torch: its kind, floating-point operations, bytes moved, and predicted time.

    ``scratch`` is how many bytes the kernel holds beside its result while it runs.
    """

    kind: str
    flops: int
    bytes: int
    seconds: float
    scratch: int = 0


@dataclass(frozen=True)
class Probe:
    """A call to be timed, and what a table says that it takes."""

    call: Callable[[Random], Call]
    seconds: Callable[["Table"], float]


BOUNDS: Mapping[str, tuple[float, float]] = {
    "s/call": (1e-8, 1e-2),
    "s/entry": (1e-16, 1e-6),
    "flop/s": (1e7, 1e17),
    "bytes/s": (1e7, 1e16),
    "times": (1 / 64, 64.0),
    "entries": (1e-2, 512.0),
}
"""Units of coefficients, and the range of values that any device can have."""


@dataclass(frozen=True)
class Coefficient:
    """One number of a formula: its value as shipped, its unit, and the probe that it dominates."""

    name: str
    shipped: float
    unit: str
    probe: Probe

    @property
    def bounds(self) -> tuple[float, float]:
        """No device has a value outside these."""
        return BOUNDS[self.unit]


def coefficient(shipped: float, unit: str, probe: Probe) -> Any:
    """A field of a `Kind` that calibration measures. Its comment says what it is."""
    assert unit in BOUNDS, f"unit is {unit!r}; expected one of {list(BOUNDS)}"
    return field(default=shipped, metadata={"unit": unit, "probe": probe})


class Kind:
    """A kind of kernel: a frozen dataclass of coefficients with methods that price calls.

    The docstring starts with the formula. ``decisions`` are the numbers of the records in
    ``docs/decisions`` that say where formula and coefficients come from. A field of type `Machine`,
    or of another kind, or named ``threads``, is filled in by the `Table`. ``checks`` are probes of
    the formula as a whole, which a kind without a coefficient of its own must have. Subclasses are
    known to calibration from their definition on, in whatever file they are.
    """

    decisions: ClassVar[tuple[str, ...]] = ()
    checks: ClassVar[tuple[Probe, ...]] = ()

    def __init_subclass__(cls, registered: bool = True) -> None:
        if registered:
            KINDS[cls.__name__] = cls

    @classmethod
    def coefficients(cls) -> tuple[Coefficient, ...]:
        """Those of this kind, by names that are unique among all kinds."""
        return tuple(
            Coefficient(f"{cls.__name__}.{each.name}", cast(float, each.default), **each.metadata)
            for each in fields(cls)  # type: ignore[arg-type]  # every subclass is a dataclass
            if each.metadata
        )


KINDS: dict[str, type[Kind]] = {}


def every_coefficient() -> tuple[Coefficient, ...]:
    """The coefficients of all kinds that have been imported, in the order of their definition."""
    return tuple(one for kind in KINDS.values() for one in kind.coefficients())
