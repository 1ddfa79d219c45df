"""Plans for a device on which kernels of our own run, and windows to run them on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from tnconv.codegen.kernels.windows import Windows
from tnconv.codegen.prices.shipped import shipped
from tnconv.codegen.prices.tables import Table


def table(device: torch.device, dtype: torch.dtype) -> Table:
    """The shipped one of an accelerator with Triton, whatever the device."""
    gpu = shipped(torch.device("cuda", 0), dtype, 1)
    return replace(gpu, machine=replace(gpu.machine, own_kernels=True), _kinds={}, answers={})


@contextmanager
def own_kernels() -> Iterator[None]:
    """The compiler plans by these prices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tnconv.codegen.compiler.coefficients", table)
        yield


DISTINCT: tuple[tuple[tuple[int, ...], Windows], ...] = (
    ((3, 4, 9), Windows((3,), (4,), (2,), (1,), (2,), groups=2)),
    ((2, 3, 7, 6), Windows((2, 3), (4, 3), (2, 1), (2, 1), (1, 2))),
    ((2, 2, 5, 4, 6), Windows((2, 1, 2), (2, 3, 4), (3, 2, 1), (1, 0, 2), (1, 2, 3))),
)
"""Of one to three dimensions, with numbers that differ between dimensions."""


@st.composite
def windows(draw: Any) -> tuple[tuple[int, ...], Windows]:
    """A shape, and windows that may leave it, crop it, or read nothing of it at all."""
    dims = draw(st.sampled_from((2, 1, 3)))

    def each(*numbers: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.sampled_from(numbers)] * dims))

    groups, channels = draw(st.integers(1, 2)), draw(st.sampled_from((2, 1, 5 if dims < 3 else 3)))
    samples, sizes = draw(st.sampled_from((2, 1, 3, 0))), each(4, 3, 2, 1, *((6, 7) * (dims < 3)))
    numbers = each(2, 3, 1), each(3, 4, 2, 5, 1, 0), each(2, 1, 3), each(1, 0, 2, 3, -1, -2)
    return (samples, groups * channels, *sizes), Windows(*numbers, each(1, 2), groups)
