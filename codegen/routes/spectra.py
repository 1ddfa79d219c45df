"""Products of displaced positions by the discrete Fourier transform, for all displacements at once.

``C[δ, c, c'] = Σ_{n,t} x[n, c, t] x[n, c', t + δ]`` in two dimensions is the correlation of x with
itself: with the transform X over positions, of a period that leaves room for the largest δ,
``C[δ] = 1/P Σ_f Re(X*[f] X[f] exp(2πi f·δ / P))``. So every frequency takes one product of channels
over samples, where every displacement takes one over samples and positions. Of the frequencies of
real numbers half tell all. The transforms are products with matrices of cosines and sines, which
leave samples and channels where the next products read them; they hold for complex numbers, too.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from math import prod

from tnconv.codegen.lowering.matrices import copied
from tnconv.codegen.lowering.operations import Operation
from tnconv.codegen.lowering.strided import LIKE, Strided
from tnconv.codegen.lowering.writer import ADD, MATMUL, SUBTRACT, Writer
from tnconv.codegen.prices import cost
from tnconv.codegen.routes.tap_pairs import Dimension

Lag = tuple[int, int]

REAL_SOURCE = '''def real_waves(positions, period, like):
    """Real parts, then imaginary parts, of the frequencies that real numbers have."""
    steps = torch.arange(max(positions, period), device=like.device)
    steps = steps[: period // 2 + 1].outer(steps[:positions]) % period
    angles = steps.double() * (2 * torch.pi / period)
    return torch.cat([angles.cos(), -angles.sin()]).to(like.dtype)
'''
COMPLEX_SOURCE = '''def complex_waves(positions, period, like):
    """Real and imaginary part of each frequency, of both parts at each position."""
    steps = torch.arange(max(positions, period), device=like.device)
    steps = steps[:period].outer(steps[:positions]) % period
    angles = steps.double() * (2 * torch.pi / period)
    rows = [[angles.cos(), angles.sin()], [-angles.sin(), angles.cos()]]
    parts = torch.stack([torch.stack(row, -1) for row in rows], 1)
    return parts.reshape(2 * period, 2 * positions).to(like.dtype)
'''
LAG_SOURCE = '''def lag_waves(lags, periods, like):
    """From real parts, and from imaginary parts, of all frequencies to some displacements."""
    first, second = periods
    pairs = torch.tensor(lags, device=like.device)
    one = torch.arange(first, device=like.device)
    two = torch.arange(second // 2 + 1, device=like.device).unsqueeze(1)
    one = (one * pairs[:, :1, None] % first).double() * (2 * torch.pi / first)
    two = (two * pairs[:, 1:, None] % second).double() * (2 * torch.pi / second)
    share = 2.0 / (first * second)  # of a frequency and of its conjugate, which is not computed
    weights = torch.full_like(two[:1], share)
    weights[:, :: second // 2 if second % 2 == 0 else second] /= 2
    waves = torch.stack([(one + two).cos() * weights, -(one + two).sin() * weights])
    return waves.flatten(2).to(like.dtype)
'''


def _constant(name: str, source: str) -> Operation:
    def call(like: str, *numbers: object) -> str:
        return f"{name}({', '.join(map(str, numbers))}, {like})"

    return Operation(name, call, imports=("torch",), helper=source, precise=True)


REAL_WAVES = _constant("real_waves", REAL_SOURCE)
COMPLEX_WAVES = _constant("complex_waves", COMPLEX_SOURCE)
LAG_WAVES = _constant("lag_waves", LAG_SOURCE)


def period(x: Dimension) -> int:
    """The least one in which no position meets another one's displaced image but across zeros."""
    zeros = max(0, x.padding) + max(0, x.span - x.padding - x.inputs)
    return x.span + max(0, (x.taps - 1) * x.dilation - zeros)


def lag_products(
    writer: Writer, array: Strided, lags: Sequence[Lag], periods: tuple[int, int]
) -> tuple[Writer, dict[Lag, Strided]]:
    """The products ``(g, c, c')`` of each displacement, of positions ``(g, t1, t2, rows, c)``."""
    writer, parts = _spectrum(writer, array, periods)
    rows = parts.shape[1] // 2
    real, imaginary = parts.narrow(1, 0, rows), parts.narrow(1, rows, rows)
    writer, same = _matmul(writer, parts.mT, parts, "real parts of all frequencies")
    writer, mixed = _matmul(writer, real.mT, imaginary, "half of the imaginary parts")
    number = (periods[1] // 2 + 1) * periods[0]
    numbers = tuple(lags), periods
    writer, matrix = _waves(writer, LAG_WAVES, (2, len(lags), number), numbers)
    groups, channels, found = array.shape[0], array.shape[-1], list[Strided]()
    for at, spectrum in enumerate((same, mixed)):
        writer, flat = writer.reshape(spectrum, [groups, number, channels**2])
        writer, each = _transformed(writer, matrix.select(0, at), flat)
        writer, each = writer.reshape(each, [groups, len(lags), channels, channels])
        found.append(each)
    even, odd = found
    kernel = cost.elementwise(even.size, 2 * even.size)
    writer, total = writer.run(ADD, [even, odd], even.shape, kernel, "both parts")
    call = SUBTRACT, [total, odd.mT], even.shape, kernel, "products of all displacements"
    writer, total = writer.run(*call)
    return writer, {lag: total.select(1, at) for at, lag in enumerate(lags)}


def _spectrum(writer: Writer, array: Strided, periods: tuple[int, int]) -> tuple[Writer, Strided]:
    """``(g · frequencies, parts · rows, c)``, the last dimension's frequencies before the first's.

    Parts are real and imaginary. The last dimension of real numbers has half of the frequencies.
    """
    groups, first, second, rows, channels = array.shape
    half, entries = periods[1] // 2 + 1, rows * channels
    writer, matrix = _waves(writer, REAL_WAVES, (2 * half, second), (second, periods[1]))
    writer, flat = writer.reshape(array, [groups * first, second, entries])
    writer, array = _transformed(writer, matrix, flat)
    writer, split = writer.reshape(array, [groups, first * 2, half, entries])
    shape = 2 * periods[0], 2 * first
    writer, matrix = _waves(writer, COMPLEX_WAVES, shape, (first, periods[0]))
    writer, array = _transformed(writer, matrix, split.permute([0, 2, 1, 3]))
    return writer.reshape(array, [groups * half * periods[0], 2 * rows, channels])


def _waves(
    writer: Writer, operation: Operation, shape: tuple[int, ...], numbers: tuple[Hashable, ...]
) -> tuple[Writer, Strided]:
    kernel = cost.copy(prod(shape), shape[-1])
    comment = operation.name.replace("_", " ")
    return writer.run(operation, [LIKE], shape, kernel, comment, numbers)


def _transformed(writer: Writer, matrix: Strided, array: Strided) -> tuple[Writer, Strided]:
    """The matrix times each of the matrices ``(.., positions, entries)`` of an array."""
    repeated = matrix.expand((*array.shape[:-2], *matrix.shape))
    return _matmul(writer, repeated, array, "Fourier transform")


def _matmul(writer: Writer, left: Strided, right: Strided, comment: str) -> tuple[Writer, Strided]:
    front, (m, k), n = right.shape[:-2], left.shape[-2:], right.shape[-1]
    kernel, held = cost.matmul(prod(front), m, n, k), copied(right, front)
    if held:  # of groups: their frequencies do not merge with them
        seconds = kernel.seconds + cost.copy(held, n).seconds
        kernel = replace(kernel, seconds=seconds, scratch=cost.bytes_per_entry() * held)
    return writer.run(MATMUL, [left, right], (*front, m, n), kernel, comment)
