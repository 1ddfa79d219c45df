"""Kernels in chunks of samples, so that the rows of few samples are held at a time."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tnconv.ntk.kernel_blocks import Reduce, layer_blocks, weighted
from tnconv.ntk.sides import Range, Rows, rows_of_both
from tnconv.operators.low_rank.rows import JacobianRows

Chunks = int | tuple[int, int] | None
Blocks = dict[str, Tensor]
Pair = tuple[Range, Range]
AXES: Mapping[Reduce, tuple[int, int | None]] = {
    "full": (0, 2),
    "trace": (0, 1),
    "class_diagonal": (0, 2),
    "sample_diagonal": (0, None),
}
"""Where a kernel has the samples of the first and of the second side."""


def kernel(
    first: Rows,
    second: Rows,
    own: slice,
    symmetric: bool,
    reduce: Reduce,
    dtype: torch.dtype | None,
    scales: Mapping[str, float],
    per_layer: bool,
    chunks: Chunks,
) -> Blocks:
    """The kernel of some samples of the first side, by parameter, or under ``""`` their sum.

    Args:
        first: The side of rows.
        second: The side of columns.
        own: The rows that are wanted.
        symmetric: Whether the sides are the same: blocks below the diagonal are then mirrored.
        reduce: The part of the kernel that is wanted.
        dtype: What inner products are summed in.
        scales: Factors by parameter.
        per_layer: Whether parameters are kept apart.
        chunks: How many samples of each side are worked on at a time.
    """
    if own.start == own.stop:  # more processes than samples
        found = kernel(
            first, second, slice(0, 1), symmetric, reduce, dtype, scales, per_layer, chunks
        )
        return {name: block[:0] for name, block in found.items()}
    sizes = _sizes(first, second, own, symmetric and _covers(own, first), chunks)
    grid: dict[Pair, Blocks] = {}
    for rows in _ranges(own.start, own.stop, sizes[0]):
        every = [*_columns(rows, second.samples, sizes[1], reduce)]
        kept = first.rows(*rows) if len(every) > 1 else None
        for columns in every:
            if symmetric and (columns, rows) in grid and rows != columns:
                mirror = grid[columns, rows]
                grid[rows, columns] = {n: _mirrored(b, reduce) for n, b in mirror.items()}
                continue
            pair = first, second, rows, columns, symmetric, kept
            # rows that nothing else holds are let go layer by layer
            found = layer_blocks(*_sides(*pair), reduce, dtype)
            if per_layer:
                grid[rows, columns] = {n: b * scales.get(n, 1.0) for n, b in found.items()}
            else:
                grid[rows, columns] = {"": weighted(found, scales)}
    return _assembled(grid, reduce)


def _sides(
    first: Rows,
    second: Rows,
    rows: Range,
    columns: Range,
    symmetric: bool,
    kept: JacobianRows | None,
) -> tuple[JacobianRows, JacobianRows | None]:
    """The rows of a pair of chunks; one side alone where they are the same."""
    if symmetric and rows == columns:
        return kept or first.rows(*rows), None
    if kept is not None:
        return kept, second.rows(*columns)
    return rows_of_both(first, second, rows, columns)


def _covers(own: slice, side: Rows) -> bool:
    return own == slice(0, side.samples)


def _ranges(start: int, stop: int, size: int) -> Iterator[Range]:
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def _columns(rows: Range, samples: int, size: int, reduce: Reduce) -> Iterator[Range]:
    """The chunks of the second side that belong to one of the first."""
    if reduce == "sample_diagonal":
        yield rows
    else:
        yield from _ranges(0, samples, size)


def _mirrored(block: Tensor, reduce: Reduce) -> Tensor:
    if reduce == "full":
        return block.permute(2, 3, 0, 1)
    return block.transpose(0, 1) if reduce == "trace" else block.transpose(0, 2)


def _assembled(grid: Mapping[Pair, Blocks], reduce: Reduce) -> Blocks:
    rows, columns = AXES[reduce]
    if len(grid) == 1:
        return next(iter(grid.values()))
    found = {}
    for name in next(iter(grid.values())):
        lines: dict[Range, list[Tensor]] = {}
        for (each, _), blocks in grid.items():
            lines.setdefault(each, []).append(blocks[name])
        joined = [b[0] if columns is None else torch.cat(b, columns) for b in lines.values()]
        found[name] = torch.cat(joined, rows)
    return found


def _sizes(first: Rows, second: Rows, own: slice, alone: bool, chunks: Chunks) -> tuple[int, int]:
    """How many samples of each side are held at a time.

    Raises:
        ValueError: chunks that are not positive, or a memory limit below the rows of two samples.
    """
    rows, columns = own.stop - own.start, second.samples
    if chunks is not None:
        pair = (chunks, chunks) if isinstance(chunks, int) else tuple(chunks)
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(f"chunks is {chunks}; expected one or two positive numbers of samples")
        return min(pair[0], max(1, rows)), min(pair[1], columns)
    if first.memory_limit is None or not rows:
        return max(1, rows), columns
    probed = min(2, first.samples)
    each = max(1, first.rows(0, probed).held_bytes // probed)
    fit = first.memory_limit // 2 // each  # the other half is for products
    if alone and fit >= rows:
        return rows, columns
    if fit < 2:
        raise ValueError(
            f"memory_limit is {first.memory_limit}; the rows of two samples alone hold "
            f"{2 * each} bytes, expected at least {4 * each}"
        )
    if fit >= rows + columns:
        return rows, columns
    size = fit // 2
    return min(rows, size), min(columns, size)
