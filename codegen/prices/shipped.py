"""Shipped tables: where no device was calibrated, and where calibration starts."""

from collections.abc import Mapping
from dataclasses import replace
from math import exp, log

import torch

from tnconv.codegen.kernels.launching import KERNELS_ON
from tnconv.codegen.prices.accelerators import H100, precision
from tnconv.codegen.prices.kinds import every_coefficient
from tnconv.codegen.prices.tables import ACCELERATOR, SHIPPED, X86, Table

Values = Mapping[str, float]
BY_THREADS: Mapping[int, Values] = {
    1: {},
    2: {
        "Calls.launch": 5e-06,
        "Calls.bandwidth": 4.7e10,
        "Copy.near": 1.8e-10,
        "Copy.far": 5e-10,
        "Copy.conflict": 1.1e-09,
        "Copy.loop": 1.4e-08,
        "DepthwiseConvolution.entry": 3e-10,
        "DepthwiseConvolution.speed": 1.4e11,
        "DepthwiseConvolution.uncached": 2.2,
        "DepthwiseConvolution.without_simd": 3.3e09,
        "DepthwiseConvolution.large_weight_gradient": 2.4e09,
        "Product.gemm": 2.14e11,
        "Product.dots": 4.1e10,
        "Product.half": 16.0,
        "Product.half_dot": 30.0,
        "Product.written": 1.6e10,
        "Product.written_in_blocks": 1.6e11,
        "Product.member": 1.9e-08,
        "Product.unaligned": 3.8e-10,
        "Product.conflicting": 3.4e-10,
        "DenseConvolution.speed": 1.75e11,
        "DenseConvolution.weight_gradient": 1.28e11,
        "DenseConvolution.grouped_output": 2.8e09,
        "DenseConvolution.grouped_input_gradient": 0.8,
        "NativeConvolution.primitive": 6.5e-05,
        "Loop.turn": 5.5e-5,
        "Loop.alone": 1.15,
        "Reduction.total": 4.6e-09,
        "Reduction.outer": 9.8e-11,
        "Fold.folded": 1.2e-09,
    },
}
"""Coefficients of an x86 server that differ from those declared, by the number of threads.

Those of two threads are the declared ones times what calibrations of two threads and of one, made
in turns (nine and six of them), found as the ratio of their medians. Ratios that the repetitions
do not determine within a factor of two are left at that of products for speeds of products, and
at one otherwise. ``Loop.alone`` is from pairs of programs, a loop and the same kernels for the
batch. Speeds of dense convolutions, their primitive, sizes at half speed and steps within a cache
line are where programs of whole layers, which change with them, become faster: see decision 0011.
"""


def shipped(device: torch.device, dtype: torch.dtype, threads: int) -> Table:
    """The shipped table for a device, in a dtype, on so many threads.

    Processors have measured tables in float32, which serve all dtypes, by the number of threads:
    see `on_threads`. All accelerators have the assumed one of an H100, by precision: see `H100`.
    """
    if device.type in ("cpu", "meta"):
        return Table(on_threads(threads, BY_THREADS), X86, threads)
    values = H100[precision(dtype)]
    own = device.type in KERNELS_ON
    return Table(values, replace(ACCELERATOR, entry=dtype.itemsize, own_kernels=own))


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
