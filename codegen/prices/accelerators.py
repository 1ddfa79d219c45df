"""The table of an accelerator: an H100 as it is assumed to be. None of its numbers was measured.

They come from data sheets and typical times of cuBLAS and cuDNN (4.5 us a launch, 16 us a call of a
convolution, 2.5 TB/s, 35 Tflop/s of products in IEEE float32), and serve where an accelerator can
not be calibrated: see decision 0011.
"""

from collections.abc import Mapping

import torch

from tnconv.codegen.prices.store import float32_format

NONE = 1e-16  # seconds per entry: a term that the device does not have
FLOAT32: Mapping[str, float] = {
    "Calls.launch": 4.5e-6,
    "Calls.bandwidth": 2.5e12,
    "Copy.near": 2.5e-12,
    "Copy.far": 3e-12,
    "Copy.conflict": 3e-12,
    "Copy.row": 1.4e-11,
    "Copy.loop": NONE,
    "Loop.turn": 4.5e-6,
    "Reduction.total": NONE,
    "Reduction.outer": NONE,
    "Fold.folded": 3.5e-12,
    "OverlappingSum.scattered": 2.0,
    "Product.gemm": 3.5e13,
    "Product.dots": 3.5e12,
    "Product.half": 64.0,
    "Product.half_dot": 64.0,
    "Product.written": 1e13,
    "Product.written_in_blocks": 1e13,
    "Product.member": 1e-10,
    "Product.unaligned": NONE,
    "Product.conflicting": NONE,
    "Product.remainder": 1.0,
    "DenseConvolution.speed": 3.5e13,
    "DenseConvolution.weight_gradient": 2.7e13,
    "DenseConvolution.grouped_output": 1.4e11,
    "DenseConvolution.grouped_input_gradient": 1.0,
    "DepthwiseConvolution.entry": 2e-12,
    "DepthwiseConvolution.speed": 3e12,
    "DepthwiseConvolution.uncached": 1.0,
    "DepthwiseConvolution.input_gradient": 0.9,
    "DepthwiseConvolution.weight_gradient": 0.2,
    "DepthwiseConvolution.without_simd": 3e12,
    "DepthwiseConvolution.large_weight_gradient": 5e11,
    "DepthwiseConvolution.largest": 10.0,
    "NativeConvolution.primitive": 1.15e-5,
    "NativeConvolution.weight_entry": NONE,
    "NativeConvolution.strided": 1.0,
    "NativeConvolution.apart": 1.0,
    "NativeConvolution.more_taps": 2.0,
}
"""Matrix products in IEEE float32, convolutions in TF32: torch's defaults."""

H100: Mapping[str, Mapping[str, float]] = {
    "float32": FLOAT32,
    "tf32": {**FLOAT32, "Product.gemm": 2e14},
    "half": {  # tensor cores; convolutions bring NCHW operands into NHWC order and back
        **FLOAT32,
        "Product.gemm": 3.5e14,
        "Product.dots": 7e12,
        "DenseConvolution.speed": 1.5e14,
        "DenseConvolution.weight_gradient": 1e14,
        "DenseConvolution.grouped_output": 2.8e11,
    },
    "float64": {
        **FLOAT32,
        "Product.gemm": 3e13,
        "Product.dots": 1.7e12,
        "DenseConvolution.speed": 1e13,
        "DenseConvolution.weight_gradient": 7e12,
        "DenseConvolution.grouped_output": 7e10,
        "DepthwiseConvolution.speed": 1.5e12,
        "DepthwiseConvolution.without_simd": 1.5e12,
    },
}
"""Coefficients by precision."""


def precision(dtype: torch.dtype) -> str:
    """The entry of `H100` for a dtype, with the formats that torch's settings allow now."""
    if dtype.itemsize < torch.float32.itemsize:
        return "half"
    if dtype == torch.float64:
        return "float64"
    return "tf32" if float32_format(torch.backends.cuda.matmul) in ("tf32", True) else "float32"
