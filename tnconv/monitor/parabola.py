"""Where a step ends on a parabola that is fitted to noisy losses and slopes at both of its ends."""

import math
from collections.abc import Sequence

LEAST = 1e-10  # in the place of a variance of zero


def step_length(
    size: float,
    values: Sequence[float],  # loss before and after, g·d before and after, for the update d
    variances: Sequence[float],
) -> float | None:
    """``τ / t - 1`` for the minimum t of the parabola: -1 no step, 0 there, 1 the other side.

    With τ = |d|, the parabola ``μ0 + μ1 t + μ2 t²`` fits ``f(0), f(τ), f'(0), f'(τ)`` by least
    squares, weighted by inverse variances; slopes are along ``d / |d|``. Without a minimum it is
    -1, and None where the fit is not determined. Source: Schneider, Dangel, Hennig 2021, appendix.

    >>> step_length(2.0, (1.0, 1.0, -2.0, 2.0), (1.0, 1.0, 1.0, 1.0))  # f = (t - 1)²
    1.0
    """
    if size == 0:
        return -1.0
    if not all(map(math.isfinite, (size, *values, *variances))):
        return None
    f = (values[0], values[1], values[2] / size, values[3] / size)
    v = (variances[0], variances[1], variances[2] / size**2, variances[3] / size**2)
    weights = [1 / (each or LEAST) for each in v]
    # t in units of τ: the fit is the same, and its matrix is well conditioned
    rows = ((1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 1 / size, 0.0), (0.0, 1 / size, 2 / size))
    a = [[sum(w * r[i] * r[j] for w, r in zip(weights, rows, strict=True)) for j in range(3)]
         for i in range(3)]  # fmt: skip
    b = [sum(w * r[i] * y for w, r, y in zip(weights, rows, f, strict=True)) for i in range(3)]
    found = _solved(a, b)
    if found is None:
        return None
    _, slope, bend = found
    if bend <= 0:
        return -1.0
    return 2 * bend / -slope - 1 if slope else None


def _solved(a: Sequence[Sequence[float]], b: Sequence[float]) -> list[float] | None:
    """The solution of three equations, by elimination with the rows' largest entries."""
    rows = [[*row, right] for row, right in zip(a, b, strict=True)]
    for at in range(3):
        pivot = max(range(at, 3), key=lambda row: abs(rows[row][at]))
        rows[at], rows[pivot] = rows[pivot], rows[at]
        if rows[at][at] == 0:
            return None
        for row in range(3):
            if row != at:
                factor = rows[row][at] / rows[at][at]
                rows[row] = [x - factor * y for x, y in zip(rows[row], rows[at], strict=True)]
    return [rows[at][3] / rows[at][at] for at in range(3)]
