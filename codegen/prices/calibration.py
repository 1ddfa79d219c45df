"""Calibration: the table of a device, from the times of calls that one coefficient each dominates.

A table is looked up by device, dtype, number of threads, versions and precision settings: see
`coefficients`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from statistics import median

import torch
from torch import Tensor

from tnconv.codegen.prices import accelerator_scales, store, timing
from tnconv.codegen.prices.fitting import fitted, visible
from tnconv.codegen.prices.kinds import KINDS, Probe, every_coefficient
from tnconv.codegen.prices.shipped import shipped
from tnconv.codegen.prices.store import Json
from tnconv.codegen.prices.tables import SHIPPED, Table
from tnconv.diagrams.notices import warn

KIND = "coefficients"
BUDGET = 0.03  # seconds per call


def calibrate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Table:
    """Measure a device in a dtype, for a few seconds; the table is stored and used from then on.

    Programs that were compiled before stay as they are. Where a probe fails, or its time cannot be
    explained by any physical value of its coefficient, a warning names it, the shipped value is
    used in this process, and nothing is stored, so that another process measures again.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    device = torch.device(device)
    if _capturing(device):
        raise RuntimeError("a CUDA graph is being captured; expected calibration before a capture")
    start = shipped(device, dtype, torch.get_num_threads())
    accelerator = start.machine.overlaps
    if accelerator:
        probes = dict(accelerator_scales.probes(start.machine))
    else:
        probes = {one.name: one.probe for one in every_coefficient() if visible(start, one)}
    times = timing.aside(lambda: measured(probes, device, dtype))
    found, refused = (accelerator_scales.scaled if accelerator else fitted)(start, times)
    values = {one.name: found.value(one.name) for one in every_coefficient()}
    table = found.changed(values)  # with those that no probe here tells, as it will be read back
    key = _key(device, dtype)
    for name, reason in refused.items():
        warn(
            f"calibration of {key['device']} in {dtype}: probe {name!r} is refused, since "
            f"{reason}; its shipped value is used",
            RuntimeWarning,
        )
    _known.cache_clear()
    _here.pop(json.dumps(key), None)
    if refused:
        _here[json.dumps(key)] = table
    else:
        store.save(KIND, key, {**values})
    return table


def measured(
    probes: Mapping[str, Probe], device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds of each probe; infinite for one that fails.

    Several threads have no clock of their own, and other processes only add to their time: the
    least of the samples is taken there.
    """
    of = min if device.type == "cpu" and torch.get_num_threads() > 1 else median
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    def seconds(probe: Probe) -> float:
        try:
            call = probe.call(random)
        except RuntimeError:
            return inf
        return timing.seconds_of([call], device, BUDGET, of)[0]

    return {name: seconds(probe) for name, probe in probes.items()}


@dataclass(frozen=True)
class Residual:
    """A probe with its measured and its predicted time."""

    name: str
    seconds: float
    predicted: float


def residuals(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Residual]:
    """How well the table in use for a device predicts all probes, those without a coefficient too.

    They are measured anew.
    """
    table = coefficients(device, dtype)
    probes = {one.name: one.probe for one in every_coefficient()}
    for kind in KINDS.values():
        probes |= {f"{kind.__name__}, check {at}": one for at, one in enumerate(kind.checks, 1)}
    times = timing.aside(lambda: measured(probes, device, dtype))
    return [Residual(name, times[name], probe.seconds(table)) for name, probe in probes.items()]


def coefficients(device: torch.device, dtype: torch.dtype = torch.float32) -> Table:
    """The table by which programs for a device and dtype are planned, for the threads in use.

    The first that exists of: a table calibrated in this dtype; for accelerators one measured now,
    except while a CUDA graph is captured, where nothing can be measured; for processors a table
    calibrated in float32; the shipped one, see `shipped`.
    """
    if device.type == "meta":
        return SHIPPED
    dtype = dtype if dtype.is_floating_point else torch.float32
    if _capturing(device) and _calibrated(device, dtype) is None:
        warn(
            f"prices of {device} cannot be measured while a CUDA graph is captured; assumed ones "
            "are used: call tnconv.codegen.calibrate before",
            RuntimeWarning,
        )
        return shipped(device, dtype, torch.get_num_threads())
    return _known(device, dtype, json.dumps(_key(device, dtype)))


@lru_cache
def _known(device: torch.device, dtype: torch.dtype, key: str) -> Table:
    if (table := _calibrated(device, dtype)) is not None:
        return table
    if device.type != "cpu":
        return calibrate(device, dtype)
    table = None if dtype is torch.float32 else _calibrated(device, torch.float32)
    return table or shipped(device, dtype, torch.get_num_threads())


def _calibrated(device: torch.device, dtype: torch.dtype) -> Table | None:
    """What was measured in this process, or stored by any."""
    key = _key(device, dtype)
    if (here := _here.get(json.dumps(key))) is not None:
        return here
    if (value := store.load(KIND, key)) is None:
        return None
    if (found := _valid(value)) is None:
        store.ignored(KIND, key)
        return None
    return shipped(device, dtype, torch.get_num_threads()).changed(found)


def _valid(value: Json) -> dict[str, float] | None:
    """Every coefficient, each within its bounds."""
    bounds = {one.name: one.bounds for one in every_coefficient()}
    if not isinstance(value, Mapping) or value.keys() != bounds.keys():
        return None
    found = {
        name: each
        for name, each in value.items()
        if isinstance(each, float) and bounds[name][0] <= each <= bounds[name][1]
    }
    return found if len(found) == len(bounds) else None


def _key(device: torch.device, dtype: torch.dtype) -> dict[str, Json]:
    return {**store.circumstances(device), "dtype": str(dtype)}


def _capturing(device: torch.device) -> bool:
    """Whether calls on this device are recorded into a CUDA graph, and not run."""
    return (
        device.type == "cuda"
        and torch.cuda.is_available()
        and torch.cuda.is_current_stream_capturing()
    )


_here: dict[str, Table] = {}
"""Tables that were measured in this process with some probes refused, by their keys as text."""
