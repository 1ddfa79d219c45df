"""Products of two matrices, or batches of them: the ways in which torch can compute one."""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from tnconv.codegen.lowering.operations import Operation
from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.lowering.writer import MATMUL
from tnconv.codegen.prices import cost

BLOCKS = (2, 4, 8)  # block columns of a symmetric product (0005, 0032)
LEAST_ROWS = 64  # of a block (0005)
ROWS = (32, 16)  # of the blocks of a large product of few summed entries (0005)
LARGE = 512  # rows and columns of it (0005)
FEW = 16  # summed entries of it (0005)

GRAM = '''def gram(x, blocks):
    """x @ x.mT, which is symmetric: of every two mirrored blocks one is computed."""
    size = x.shape[-2]
    ends = [*(size * at // blocks // 16 * 16 for at in range(blocks)), size]  # in whole tiles
    for start, stop in zip(ends, ends[1:]):
        columns = x[..., start:, :] @ x[..., start:stop, :].mT
        if start == 0:
            full = columns.new_empty(*columns.shape[:-2], size, size)
        full[..., start:, start:stop] = columns
        full[..., start:stop, stop:] = columns[..., stop - start :, :].mT
    return full
'''

SYMMETRIC = Operation("gram", lambda x, blocks: f"gram({x}, {blocks})", helper=GRAM)


class Product(NamedTuple):
    """A way to compute a matrix product: its price, its call, and the shape of its result."""

    kernel: cost.Kernel
    operation: Operation
    factors: tuple[Strided, ...]
    shape: tuple[int, ...]
    attributes: tuple[int, ...] = ()


def products(left: Strided, right: Strided, front: tuple[int, ...]) -> Iterator[Product]:
    """Ways to compute ``left @ right``."""
    m, k, n = left.shape[-2], left.shape[-1], right.shape[-1]
    along = left.strides[-1] == right.strides[-2] == 1
    across = left.strides[-2] == right.strides[-1] == 1 < left.strides[-1]
    how = {"along": along, "conflict": _conflicts(left), "across": across}
    kernel = cost.matmul(prod(front), m, n, k, **how)
    yield Product(kernel, MATMUL, (left, right), (*front, m, n))
    if m == n and left.origin is right.origin and (left.mT is right or left is right.mT):
        half = left if left.mT is right else right.mT
        for blocks in (b for b in BLOCKS if m >= b * LEAST_ROWS):
            kernel = cost.gram(prod(front), m, k, blocks)
            yield Product(kernel, SYMMETRIC, (half,), (*front, m, n), (blocks,))
    rows = next((rows for rows in ROWS if m % rows == 0), 0)
    if rows and not front and min(m, n) >= LARGE and k <= FEW:
        parts = left.free_reshape([m // rows, rows, k])
        assert parts is not None
        repeated = right.expand((m // rows, k, n))
        kernel = cost.matmul(1, m, n, k, in_blocks=True)
        yield Product(kernel, MATMUL, (parts, repeated), (m // rows, rows, n))


def least_seconds(batch: int, m: int, k: int, n: int, mirrored: bool) -> float:
    """A lower bound of the price of all `products` of these sizes, whatever their strides.

    Args:
        batch: The number of products.
        m: Rows of the result.
        k: Summed entries.
        n: Columns of the result.
        mirrored: Whether the factors may be one matrix and its transpose.
    """
    if mirrored or (batch == 1 and min(m, n) >= LARGE and k <= FEW):
        return cost.least_product(2 * batch * m * k * n) / (2 if mirrored else 1)
    return cost.matmul(batch, m, n, k, along=True).seconds


def copied(array: Strided, front: tuple[int, ...]) -> int:
    """Entries of the copy that torch makes of a factor whose batch dimensions cannot be merged."""
    matrix = array.shape[-2:]
    if len(front) < 2 or len(array.shape) < 3:
        return 0
    for _ in range(len(front) + 2 - len(array.shape)):
        array = array.unsqueeze(0)
    expanded = array.expand((*front, *matrix))
    merged = (prod(front), *matrix)
    return expanded.size if expanded.free_reshape(merged) is None else 0


def _conflicts(array: Strided) -> bool:
    """Whether the columns of a transposed factor fall into the same cache sets."""
    row, column = array.strides[-2:]
    return row == 1 < column and cost.conflicts(column)


def is_matrix(array: Strided) -> bool:
    """Whether BLAS takes the last dimensions as they are; torch copies others, one at a time."""
    (m, n), (row, column) = array.shape[-2:], array.strides[-2:]
    return (column == 1 and row >= n) or (row == 1 and column >= m)
