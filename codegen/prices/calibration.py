"""Calibration: the coefficients of a device, from the times of a few calls that each dominates."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from functools import lru_cache
from math import prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from tnconv.codegen.prices import cost, store, timing
from tnconv.codegen.prices.cost import SHIPPED, Coefficients, Kernel
from tnconv.codegen.prices.store import Json

KIND = "coefficients"
SLOW = ("depthwise_by_entries", "grouped_output")  # what kernels by vectors cannot do
BUDGET = 0.03  # seconds per call
SWEEPS = 8
MOST = 1e3  # a coefficient is at most so many times larger or smaller than on a CPU
Random = Callable[..., Tensor]
Price = Callable[[], Kernel]
Probe = tuple[str, Callable[[Random], timing.Call], Price]


def native(
    name: str, kind: str, channels: int, taps: int, groups: int = 1, size: int = 28
) -> Probe:
    """A native kernel on 8 square images: the coefficient, the call, and its price."""
    x, w = (8, channels, size, size), (channels, channels // groups, taps, taps)
    entries, each = prod(x), channels // groups
    new = prod(w) if kind == "weight gradient" else entries
    mask = [kind == "input gradient", kind == "weight gradient", False]

    def call(random: Random) -> timing.Call:
        image, weight, given = random(x), random(w), random(x)
        if kind == "convolution":
            return lambda: F.conv2d(image, weight, padding=taps // 2, groups=groups)
        settings = [1, 1], [taps // 2] * 2, [1, 1], False, [0, 0], groups, mask
        return lambda: torch.ops.aten.convolution_backward(given, image, weight, None, *settings)

    def price() -> Kernel:
        moved = 2 * entries + prod(w)
        flops = 2 * entries * each * taps**2
        by_vectors = name not in SLOW
        kernel = cost.convolution(
            kind, flops, (each, each), groups, taps**2, moved, new, by_vectors
        )
        written = new if kind == "weight gradient" else 0
        seconds = kernel.seconds + cost.now().primitive + cost.now().weight_entry * written
        return replace(kernel, seconds=seconds)

    return name, call, price


PROBES: tuple[Probe, ...] = (
    ("launch", lambda r: (lambda x: lambda: x * x)(r(8)), lambda: cost.elementwise(8, 16)),
    ("bandwidth", lambda r: r(2**22).clone, lambda: cost.copy(2**22, 2**22)),
    ("near", lambda r: r(2048, 1024)[:, ::2].contiguous, lambda: cost.copy(2**20, 512, 2)),
    ("far", lambda r: r(1000, 999).mT.contiguous, lambda: cost.copy(999_000, 1000, 999)),
    (
        "conflict",
        lambda r: r(16, 64, 1024).mT.contiguous,
        lambda: cost.copy(2**20, 64, 1024, competing=64),
    ),
    ("row", lambda r: r(2**18, 8)[:, :3].contiguous, lambda: cost.copy(3 * 2**18, 3)),
    (
        "loop",
        lambda r: r(2**7, 2**7, 8, 8)[..., :3, :3].permute(1, 0, 2, 3).contiguous,
        lambda: cost.copy(9 * 2**14, 3, 1, 3),
    ),
    (
        "total",
        lambda r: (lambda x: lambda: x.sum(1))(r(2**17, 5)),
        lambda: cost.reduction(5 * 2**17, 2**17, 5),
    ),
    (
        "gemm",
        lambda r: (lambda x: lambda: x @ x)(r(768, 768)),
        lambda: cost.matmul(1, 768, 768, 768),
    ),
    (
        "unaligned",
        lambda r: (lambda x, y: lambda: x @ y)(r(512, 64), r(64, 5329)),
        lambda: cost.matmul(1, 512, 5329, 64),
    ),
    (
        "conflicting",
        lambda r: (lambda x, y: lambda: x.mT @ y)(r(8, 256, 1024), r(8, 256, 64)),
        lambda: cost.matmul(8, 1024, 64, 256, conflict=True),
    ),
    (
        "dots",
        lambda r: (lambda x: lambda: x @ x.mT)(r(512, 4, 512)),
        lambda: cost.matmul(512, 4, 4, 512, along=True),
    ),
    (
        "outer",
        lambda r: (lambda x: lambda: x.sum(1))(r(64, 512, 513)),
        lambda: cost.reduction(64 * 512 * 513, 64 * 513, 513, outer=True),
    ),
    (
        "written",
        lambda r: (lambda x, y: lambda: x @ y)(r(2048, 8), r(8, 2048)),
        lambda: cost.matmul(1, 2048, 2048, 8),
    ),
    (
        "written_in_blocks",
        lambda r: (lambda x, y: lambda: x @ y)(r(64, 32, 8), r(8, 2048).expand(64, 8, 2048)),
        lambda: cost.matmul(1, 2048, 2048, 8, in_blocks=True),
    ),
    (
        "folded",
        lambda r: (lambda x: lambda: F.fold(x, 56, 3, padding=1))(r(8, 16 * 9, 56 * 56)),
        lambda: cost.fold(8 * 16 * 9 * 56 * 56, 8 * 16 * 56 * 56),
    ),
    native("primitive", "convolution", 8, 3, 1, 6),
    native("convolution", "convolution", 64, 3),
    native("weight_gradient", "weight gradient", 64, 3),
    native("depthwise_entry", "convolution", 128, 3, 128),
    native("depthwise", "convolution", 128, 7, 128),
    native("depthwise_input_gradient", "input gradient", 128, 3, 128),
    native("depthwise_weight_gradient", "weight gradient", 128, 3, 128),
    native("depthwise_by_entries", "convolution", 32, 15, 32),
    native("grouped_output", "convolution", 64, 3, 32),
    native("large_depthwise_weight_gradient", "weight gradient", 32, 7, 32),
)


def calibrate(device: torch.device | str = "cpu") -> Coefficients:
    """Measure a device, for about a second; its coefficients are stored and used from then on.

    Programs that were compiled before stay as they are.
    """
    device = torch.device(device)
    found = timing.aside(lambda: measured(device))
    values: dict[str, Json] = asdict(found)
    store.save(KIND, store.circumstances(device), values)
    _known.cache_clear()
    return found


def measured(device: torch.device) -> Coefficients:
    """The coefficients with which each probe's price is its time.

    Prices hold other coefficients as well, a little, so each is found several times in turn.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    found = SHIPPED
    if device.type != "cpu":  # allocators of accelerators keep their memory
        found = replace(found, fresh=1e15)
    times = [timing.seconds_of([call(random)], device, BUDGET)[0] for _, call, _ in PROBES]
    for _ in range(SWEEPS):
        for (name, _, price), seconds in zip(PROBES, times, strict=True):
            found = _fitted(found, name, price, seconds)
    return replace(found, turn=SHIPPED.turn * found.launch / SHIPPED.launch)


def _fitted(found: Coefficients, name: str, price: Price, seconds: float) -> Coefficients:
    """With the coefficient for which the price is that many seconds, by bisection."""

    def priced(value: float) -> float:
        with cost.using(replace(found, **{name: value})):
            return price().seconds

    low, high = getattr(SHIPPED, name) / MOST, getattr(SHIPPED, name) * MOST
    grows = priced(high) > priced(low)
    for _ in range(40):
        middle = sqrt(low * high)
        if (priced(middle) < seconds) == grows:
            low = middle
        else:
            high = middle
    return replace(found, **{name: sqrt(low * high)})


def coefficients(device: torch.device) -> Coefficients:
    """What is known of a device: stored, shipped for CPUs, and else measured now."""
    return _known(device, torch.get_num_threads())


@lru_cache
def _known(device: torch.device, threads: int) -> Coefficients:
    key = store.circumstances(device)
    if device.type == "meta":
        return SHIPPED
    if (value := store.load(KIND, key)) is not None:
        if (found := _valid(value)) is not None:
            return found
        store.ignored(KIND, key)
    return SHIPPED if device.type == "cpu" else calibrate(device)


def _valid(value: Json) -> Coefficients | None:
    names = {field.name for field in fields(Coefficients)}
    if not isinstance(value, Mapping) or value.keys() != names:
        return None
    numbers = {name: each for name, each in value.items() if isinstance(each, float) and each > 0}
    return Coefficients(**numbers) if len(numbers) == len(names) else None
