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
SAMPLE = 5e-4  # seconds that one sample takes at least, by repeating the call
FEWEST, MOST = 3, 15  # samples of each call
BEHIND = 1.5  # a call that takes so many times as long as the best is dropped early


def aside(work: Callable[[], T]) -> T:
    """Run where no autograd, autocast, transform or fake tensors apply.

    If one does here, then in a thread of its own, whose memory is another pool.
    """
    if _undisturbed():
        return _plainly(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_plainly, work).result()


def _undisturbed() -> bool:
    probe = torch.empty(())
    casts = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    plain = type(probe) is torch.Tensor and probe.device.type == "cpu"
    return plain and not casts and peek_interpreter_stack() is None


def _plainly(work: Callable[[], T]) -> T:
    with torch.no_grad():
        return work()


def seconds_of(calls: Sequence[Call], device: torch.device, budget: float) -> list[float]:
    """Seconds of each call: medians of samples taken in turns, for about ``budget`` seconds.

    Every call runs once before. One that fails, for lack of memory or of a kernel for the dtype,
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
    return [median(taken) for taken in samples]


def _sample(call: Call, repetitions: int, device: torch.device) -> float:
    try:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(repetitions):
            call()
        synchronize(device)
        return (time.perf_counter() - started) / repetitions
    except RuntimeError:
        return inf


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).synchronize(device)
