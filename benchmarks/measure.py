"""Measuring: interleaved times, peak memory, and the environment they were taken in."""

import gc
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import ceil, sqrt
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tnconv.codegen.prices.store import VARIABLE

Call = Callable[[], object]
Clock = Callable[[], float]
SAMPLE = 2e-3  # seconds that one sample takes at least, by repeating the call
SHORT = 2e-2  # seconds; a shorter call is run untimed before each sample
FEW, FEWEST, MOST = 3, 15, 200  # rounds: of slow calls or long rounds, else at least, and at most
SLOW = 4.0  # times the first call's time
LONGEST = 5.0  # times the time asked for, while ratios are unsettled or rounds are fewer
SETTLED = 0.15  # of a ratio: the widest interval that holds its median
_RANDOM = Random(0)
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
PAGES = 2**31  # bytes, more than the operands and results of all contestants


@dataclass
class Timing:
    """Seconds per call, one entry per sample."""

    repetitions: int
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def minimum(self) -> float:
        return min(self.samples)


def interleaved(
    calls: Mapping[str, Call],
    seconds: float,
    device: str = "cpu",
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time all calls in turns, for about ``seconds`` of the clock together.

    Every round takes one sample of each call, in random order, and every second round in the order
    of the one before, reversed: a call that leaves caches and allocator as it used them would else
    harm the same follower again and again. A short call also runs untimed before its sample, as
    often as in it; what is close to the first call is repeated as often as that. Rounds go on
    beyond ``seconds``, up to `LONGEST` times as long, until there are `FEWEST` and the ratios of
    all calls to the first one are settled. What takes more than `SLOW` times as long as the first
    call is timed by a few rounds before the others, or once where it takes half of the time by
    itself. All calls have run before.
    """
    with _no_garbage():
        once = {name: _seconds(call, 1, device, clock) for name, call in calls.items()}
        for name, call in calls.items():
            if once[name] < SHORT:  # what ran before counts less in the second of two calls
                once[name] = min(_seconds(call, 1, device, clock) for _ in range(2))
        first = next(iter(once.values()), 0.0)
        near = [name for name in calls if once[name] <= SLOW * first]
        least = min((once[name] for name in near), default=first)
        timings = {
            name: Timing(ceil(SAMPLE / (least if name in near else once[name]))) for name in calls
        }
        slow = [name for name in calls if name not in near and once[name] < seconds / 2]
        for name in calls.keys() - {*near, *slow}:
            timings[name].samples.append(once[name])
        for names, most in ((slow, FEW), (near, MOST)):
            started = clock()
            together = [timings[name] for name in names]
            for turn in range(most if names else 0):
                taken = clock() - started
                if turn >= FEW and taken > LONGEST * seconds:
                    break
                if turn >= FEWEST and taken > seconds and settled(together):
                    break
                names = names[::-1] if turn % 2 else _RANDOM.sample(names, len(names))
                for name in names:
                    repetitions = timings[name].repetitions
                    if once[name] < SHORT:
                        _seconds(calls[name], repetitions, device, clock)
                    sample = _seconds(calls[name], repetitions, device, clock)
                    timings[name].samples.append(sample)
    return timings


def settled(timings: Sequence[Timing]) -> bool:
    """Whether the median ratio of each call to the first is known within `SETTLED` of itself.

    Of n rounds' ratios in order, those at n/2 ± 0.98 √n hold the median with a probability of about
    95 %, whatever their distribution (W. J. Conover, Practical Nonparametric Statistics, 3.2).
    """
    first, *others = (timing.samples for timing in timings)
    margin = int(max(0.0, (len(first) - 1.96 * sqrt(len(first))) / 2))
    for samples in others:
        ratios = sorted(sample / of for sample, of in zip(samples, first, strict=True))
        if ratios[-1 - margin] - ratios[margin] > SETTLED * median(ratios):
            return False
    return True


def _seconds(call: Call, repetitions: int, device: str, clock: Clock) -> float:
    _synchronize(device)
    started = clock()
    for _ in range(repetitions):
        call()
    _synchronize(device)
    return (clock() - started) / repetitions


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


@contextmanager
def _no_garbage() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def own_cache() -> Iterator[None]:
    """An empty folder for what tnconv remembers on disk: no earlier run makes this one faster."""
    before = os.environ.get(VARIABLE)
    with TemporaryDirectory() as folder:
        os.environ[VARIABLE] = folder
        try:
            yield
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


def peak_memory(call: Call, device: str = "cpu") -> int:
    """The most bytes that one call holds at a time: its result and the kernels' scratch space.

    It is the running sum of the profiler's memory events on the device, so operands do not count.
    """
    activities = [ProfilerActivity.CPU]
    kind = torch.device(device).type
    if kind == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=True) as run:
        result = call()
        _synchronize(device)
    del result
    assert run.profiler is not None
    events = [
        (event.start_ns(), event.nbytes())
        for event in run.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name.lower() == kind
    ]
    held = peak = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        held += change
        peak = max(peak, held)
    return peak


def high_water() -> float:
    """The most memory that this process held at a time, in MiB.

    Not ``ru_maxrss`` where that can be avoided: a process inherits it from the one that started it.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return (found or [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss])[0] / 1024


def environment(device: str) -> dict[str, object]:
    """What the numbers depend on. Under ``allocator`` the default setting is False."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "allocator": all(os.environ.get(name) == value for name, value in ALLOCATOR.items()),
    }


def device_name(device: str) -> str:
    """The GPU's or the processor's name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()} ({os.cpu_count()} cores)"


def write_results(path: Path, device: str, rows: Sequence[object], **more: object) -> None:
    """Rows of a benchmark as JSON, with the environment that they were taken in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment(device), **more, "rows": rows}
    path.write_text(json.dumps(results, indent=1) + "\n")


def read_rows(path: Path | None) -> list[dict[str, Any]]:
    """The rows of a results file, none where it does not exist."""
    if path is None or not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def with_allocator(module: str, arguments: Sequence[str]) -> None:
    """Start this Python module again with `ALLOCATOR` set, which malloc only reads at the start.

    By default fresh pages cost more than many kernels, and differently in every run.
    """
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        command = [sys.executable, "-m", module, *arguments]
        os.execvpe(sys.executable, command, {**os.environ, **ALLOCATOR})


def touch_pages() -> None:
    """Fill memory and give it back to malloc, so that no call pays for pages that are new.

    Where results lie changes from call to call, and only some contestants would meet such pages.
    """
    torch.ones(PAGES, dtype=torch.uint8)
