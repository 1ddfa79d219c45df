"""Shipped tables: where no device was calibrated, and where calibration starts."""

from collections.abc import Mapping
from dataclasses import replace
from math import exp, log

import torch

from tnconv.codegen.prices.accelerators import H100, precision
from tnconv.codegen.prices.kinds import every_coefficient
from tnconv.codegen.prices.tables import ACCELERATOR, SHIPPED, X86, Table

Values = Mapping[str, float]
BY_THREADS: Mapping[int, Values] = {1: {}}
"""Coefficients of an x86 server that differ from those declared, by the number of threads."""


def shipped(device: torch.device, dtype: torch.dtype, threads: int) -> Table:
    """The shipped table for a device, in a dtype, on so many threads.

    Processors have measured tables in float32, which serve all dtypes, by the number of threads:
    see `on_threads`. All accelerators have the assumed one of an H100, by precision: see `H100`.
    """
    if device.type in ("cpu", "meta"):
        return Table(on_threads(threads, BY_THREADS), X86, threads)
    values = H100[precision(dtype)]
    return Table(values, replace(ACCELERATOR, entry=dtype.itemsize))


def on_threads(threads: int, tables: Mapping[int, Values]) -> Values:
    """Coefficients between two measured numbers of threads, and the nearest beyond.

    Speeds grow about as powers of the number of threads, so that logarithms are interpolated along
    its logarithm.
    """
    below = max((known for known in tables if known <= threads), default=min(tables))
    above = min((known for known in tables if known >= threads), default=max(tables))
    if below == above:
        return tables[below]
    share = (log(threads) - log(below)) / (log(above) - log(below))
    few, many = (SHIPPED.changed(tables[known]) for known in (below, above))
    return {
        one.name: exp((1 - share) * log(few.value(one.name)) + share * log(many.value(one.name)))
        for one in every_coefficient()
    }
