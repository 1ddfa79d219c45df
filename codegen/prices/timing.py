"""Measuring calls against each other, away from what the caller's thread is doing."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil, inf
from statistics import median
from typing import TypeVar

import torch
from torch._C._functorch import peek_interpreter_stack

Call = Callable[[], object]
T = TypeVar("T")
SAMPLE = 5e-4  # seconds of a sample at least: short calls are repeated within it
FINE = 1e-5  # seconds that a clock can tell apart
FEWEST, MOST = 3, 15  # samples of each call
BEHIND = 1.5  # a call is dropped early if it takes more than this many times the best's time


def aside(work: Callable[[], T]) -> T:
    """Run where no autograd, autocast, transform or fake-tensor mode applies.

    If one does here, the work runs in a thread of its own, which allocates from another pool.
    """
    if _undisturbed():
        return _plainly(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_plainly, work).result()


def _undisturbed() -> bool:
    probe = torch.empty(())
    casts = any(map(torch.is_autocast_enabled, ("cpu", "cuda", "xpu", "mps")))
    plain = type(probe) is torch.Tensor and probe.device.type == "cpu"
    return plain and not casts and peek_interpreter_stack() is None


def _plainly(work: Callable[[], T]) -> T:
    with torch.no_grad():
        return work()


def seconds_of(
    calls: Sequence[Call],
    device: torch.device,
    budget: float,
    of: Callable[[Sequence[float]], float] = median,
) -> list[float]:
    """Seconds of each call: ``of`` the samples, taken in turns, for about ``budget`` seconds.

    Every call warms up first. One that fails, for lack of memory or of a kernel for the dtype,
    takes infinitely long.
    """
    once = [min(_sample(call, 1, device), _sample(call, 1, device)) for call in calls]
    samples = [[first] for first in once]
    started = time.perf_counter()
    for turn in range(MOST):
        medians = [median(taken) for taken in samples]
        if turn >= FEWEST and time.perf_counter() - started > budget:
            break
        for at, call in enumerate(calls):
            if medians[at] <= BEHIND * min(medians) and medians[at] < inf:
                taken = _sample(call, ceil(SAMPLE / max(once[at], 1e-7)), device)
                samples[at] = [taken] if turn == 0 else [*samples[at], taken]
    return [of(taken) for taken in samples]


def _sample(call: Call, repetitions: int, device: torch.device) -> float:
    clock = _clock(device)
    try:
        synchronize(device)
        started = clock()
        for _ in range(repetitions):
            call()
        synchronize(device)
        return (clock() - started) / repetitions
    except RuntimeError:
        return inf


def _clock(device: torch.device) -> Callable[[], float]:
    """This thread's own time where it does all the work: other processes do not count then."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    fine = time.get_clock_info("thread_time").resolution < FINE
    return time.thread_time if alone and fine else time.perf_counter


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish what it was given."""
    if device.type not in ("cpu", "meta"):
        module = torch.get_device_module(device)
        module.synchronize(*(() if device.type == "mps" else (device,)))  # there is only one MPS
