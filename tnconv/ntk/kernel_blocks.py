"""Blocks ``Θ[n, c, m, d]`` of a tangent kernel, from the rows of two Jacobians."""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from tnconv.ntk.tied_grams import tied_gram
from tnconv.operators.low_rank.rows import JacobianRows

Reduce = Literal["full", "trace", "class_diagonal", "sample_diagonal"]
"""``(n, c, m, d)``; ``(n, m)``, summed over c = d; ``(n, c, m)``, c = d; ``(n, c, d)``, n = m."""


def layer_blocks(
    rows: JacobianRows,
    other: JacobianRows | None,
    reduce: Reduce = "full",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The kernel in each parameter; with the rows themselves where there are no others.

    Layers are converted to ``dtype`` one at a time, and let go after their product, the last ones
    first: those are the cheapest, and by the time of large temporaries less is held.
    """
    names, found = list(rows.like), {}
    pairs = [(n, rows.only([n]), None if other is None else other.only([n])) for n in names]
    del rows, other
    while pairs:
        name, first, second = pairs.pop()
        if dtype is not None:
            first, second = first.to(dtype), None if second is None else second.to(dtype)
        if reduce == "full":
            block = first.gram() if second is None else first.cross_gram(second)
            found[name] = block.permute(1, 0, 3, 2)
        else:
            found[name] = tied_gram(first, second, name, reduce)
    return {name: found[name] for name in names}


def check_reduce(reduce: str) -> None:
    """Check the word.

    Raises:
        ValueError: another one.
    """
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce is {reduce!r}; expected one of {', '.join(get_args(Reduce))}")


def weighted(blocks: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    """``Σ_θ s_θ Θ_θ``, one layer after the other."""
    terms = iter(blocks.items())
    name, first = next(terms)
    total = first * scales.get(name, 1.0)
    for name, block in terms:
        total += scales.get(name, 1.0) * block
    return total


def matrix_of(theta: Tensor) -> Tensor:
    """A kernel ``(n, c, m, d)`` as a matrix ``(n·c, m·d)``; a matrix as it is.

    Raises:
        ValueError: another number of dimensions.
    """
    if theta.dim() == 4:
        return theta.flatten(2).flatten(0, 1)
    if theta.dim() != 2:
        raise ValueError(
            f"a kernel has shape {tuple(theta.shape)}; expected (n, c, m, d) or a matrix"
        )
    return theta
