"""What a kernel costs: seconds from a few physical coefficients.

Measured on two cores of an AMD EPYC with torch 2.13 in float32; only ratios between kernels matter
for a choice. Calibration per device replaces the numbers here, nothing else.
"""

from dataclasses import dataclass

ITEM = 4  # bytes per entry; the choice of kernels hardly depends on it
LAUNCH = 4e-6
GEMM = 1.6e11  # flop/s of a large matrix product
SKINNY = 1.4e9  # entries/s of a product with few rows or columns
CONVOLUTION = 1.9e11  # flop/s of a native convolution with many channels, and of its input gradient
WEIGHT_GRADIENT = 1.2e11
DEPTHWISE = 2.5e10
DEPTHWISE_WEIGHT_GRADIENT = 8e9
BANDWIDTH = 3e10  # bytes/s, read plus written
FRESH = 6e9  # bytes/s into newly mapped pages, which large results need
FRESH_FROM = 2**25
RUN = 1.4e-9  # seconds per contiguous run that a copy gathers


@dataclass(frozen=True)
class Kernel:
    """One call into torch: its kind, the multiply-adds' flops, bytes moved, and time."""

    kind: str
    flops: int
    bytes: int
    seconds: float


def matmul(batch: int, m: int, n: int, k: int) -> Kernel:
    """``(batch, m, k) @ (batch, k, n)``: full speed needs all three sizes.

    With few rows or columns the other operand is read at a fixed rate, whatever their number.
    """
    flops = 2 * batch * m * n * k
    speed = GEMM * _saturation(m, 6) * _saturation(n, 6) * _saturation(k, 12)
    entries = batch * (m * k + k * n + m * n)
    moved, written = ITEM * entries, ITEM * batch * m * n
    skinny = entries / SKINNY if min(m, n) < 16 else 0.0
    seconds = LAUNCH + max(flops / speed, moved / BANDWIDTH, skinny)
    seconds += _fresh(written) + batch * 3e-8
    return Kernel("matmul", flops, moved, seconds)


def convolution(
    kind: str, flops: int, channels: tuple[int, int], groups: int, taps: int, moved: int, new: int
) -> Kernel:
    """A native convolution or gradient kernel with (summed, kept) channels per group.

    One group is a matrix product over channels and ``taps``; groups run at half its speed, and
    depthwise kernels at the speed of memory.
    """
    summed, kept = channels
    speed = WEIGHT_GRADIENT if kind == "weight gradient" else CONVOLUTION
    speed *= _saturation(summed * taps, 48)
    speed *= _saturation(kept, 16 if kind == "input gradient" else 8)
    if groups > 1:
        speed *= 0.45
        speed = max(speed, DEPTHWISE)
    if kind == "weight gradient" and summed == kept == 1:
        speed = DEPTHWISE_WEIGHT_GRADIENT
    seconds = LAUNCH + max(flops / speed, ITEM * moved / BANDWIDTH) + _fresh(ITEM * new)
    return Kernel(kind, flops, ITEM * moved, seconds)


def copy(entries: int, run: int, read: int | None = None) -> Kernel:
    """Write ``entries`` gathered in contiguous runs of length ``run``."""
    moved = ITEM * (entries + (entries if read is None else read))
    seconds = LAUNCH + moved / BANDWIDTH + RUN * entries / max(1, run) + _fresh(ITEM * entries)
    return Kernel("copy", 0, moved, seconds)


def elementwise(entries: int, read: int) -> Kernel:
    """One operation per entry of the result, or of what a reduction reads."""
    moved = ITEM * (entries + read)
    work = max(entries, read)
    return Kernel("elementwise", work, moved, LAUNCH + moved / BANDWIDTH + _fresh(ITEM * entries))


def reduction(read: int, written: int, run: int) -> Kernel:
    """A sum; short rows cost a start each."""
    moved = ITEM * (read + written)
    return Kernel("sum", read, moved, LAUNCH + moved / BANDWIDTH + RUN * read / max(1, run))


def _saturation(size: int, half: int) -> float:
    return size / (size + half) if size else 1.0


def _fresh(written: int) -> float:
    return written / FRESH if written > FRESH_FROM else 0.0
