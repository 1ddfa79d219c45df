"""Plans for a device on which kernels of our own run; here the same calls unfold their input."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

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
