"""Sections of a report: each has a share of the time, and writes what it found when it ends."""

import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Found = Mapping[str, object]
MOST_LINES = 400  # of a section that are printed
MESSAGE = 300  # characters of an error


@dataclass
class Setting:
    """The device and how much may be done on it; ``tiny`` is for tests on a processor."""

    device: torch.device
    tiny: bool = False

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, call: Callable[[], object], budget: float = 0.1) -> float:
        """Wall-clock time of a call: the best of four samples, each of several calls."""
        for _ in range(1 if self.tiny else 3):
            call()
        once = self.sample(call, 1)
        if self.tiny:
            return once
        repetitions = max(2, min(200, int(budget / max(once / 1e3, 1e-6) / 4)))
        return min(self.sample(call, repetitions) for _ in range(4))

    def sample(self, call: Callable[[], object], repetitions: int) -> float:
        self.synchronize()
        started = time.perf_counter()
        for _ in range(repetitions):
            call()
        self.synchronize()
        return (time.perf_counter() - started) / repetitions * 1e3

    def device_work(self, call: Callable[[], object]) -> Found:
        """Milliseconds that the device is busy in a call, and with how many kernels."""
        if not self.cuda:
            return {}
        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as run:
            call()
            self.synchronize()
        assert run.profiler is not None
        events = [
            event
            for event in run.profiler.kineto_results.events()
            if event.device_type().name == "CUDA" and "Sync" not in event.name()
        ]
        busy = sum(event.duration_ns() for event in events) / 1e6
        return {"device ms": busy, "kernels": len(events)}

    def mebibytes(self, call: Callable[[], object]) -> float | None:
        """The most memory that a call takes beside what is there; None on processors."""
        if not self.cuda:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


@dataclass
class Rows:
    """What a section finds, until its time is over."""

    setting: Setting
    until: float
    rows: list[Found] = field(default_factory=list)

    @property
    def left(self) -> bool:
        """Whether there is time for another row; in ``tiny`` mode for few."""
        return time.perf_counter() < self.until

    def attempt(self, name: str, call: Callable[[], Found | None], **more: object) -> None:
        """A row of what the call returns, or of why it failed."""
        if not self.left:
            return
        try:
            self.rows.append({"name": name, **more, **(call() or {})})
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.rows.append(
                {
                    "name": name,
                    **more,
                    "failed": f"{type(error).__name__}: {str(error)[:MESSAGE]}",
                    "at": f"{Path(where.filename).name}:{where.lineno}",
                }
            )


Section = Callable[[Rows], None]


@dataclass
class Report:
    """Runs sections one after the other, and writes ``device.json`` after each."""

    setting: Setting
    folder: Path
    found: dict[str, object] = field(default_factory=dict)

    def run(self, name: str, section: Section, seconds: float) -> None:
        """Run one section. After its time is over, no further row is started."""
        started = time.perf_counter()
        rows = Rows(self.setting, started + seconds)
        rows.attempt("section", lambda: section(rows))
        done = [row for row in rows.rows if set(row) != {"name"}]
        self.found[name] = {"seconds": time.perf_counter() - started, "rows": done}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "device.json").write_text(json.dumps(self.found, indent=1, default=str))
        print(f"== {name}: {time.perf_counter() - started:.1f} s", flush=True)
        for row in done[:MOST_LINES]:
            print("  ", _line(row), flush=True)

    @property
    def failures(self) -> list[Found]:
        """The rows of all sections that failed."""
        sections = (section["rows"] for section in self.found.values() if isinstance(section, dict))
        return [row for rows in sections for row in rows if "failed" in row]


def _line(row: Found) -> str:
    def short(value: object) -> object:
        if isinstance(value, float):
            return float(f"{value:.3g}")
        if isinstance(value, Mapping):
            return {key: short(each) for key, each in value.items()}
        return value

    return ", ".join(f"{name} {short(value)}" for name, value in row.items())


def error(value: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry, in float64 on the processor."""
    value, expected = value.detach().cpu().double(), expected.detach().cpu().double()
    if value.shape != expected.shape:
        raise ValueError(f"the result is {tuple(value.shape)}; expected {tuple(expected.shape)}")
    if not value.numel():
        return 0.0
    return float((value - expected).abs().max() / (expected.abs().max() + 1e-30))
