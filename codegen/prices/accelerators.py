"""The table of an accelerator: an NVIDIA H100 (80 GB, HBM3) with torch 2.11, by precision.

Coefficients are fitted to the times that the device took for 721 kernels in float32 and 789 in
float16, each in a CUDA graph (``python -m benchmarks.device --section "kernel prices"``); launches
are those of the host, with the views between them. Other accelerators scale the table by a few
ratios: see decision 0016. ``PatchGram`` was measured on no device: its numbers are assumed, well
below what the instructions of the compiled kernel allow (decision 0030).
"""

from collections.abc import Mapping

import torch

from tnconv.codegen.prices.store import float32_format

NONE = 1e-16  # seconds per entry: a term that the device does not have
FLOAT32: Mapping[str, float] = {
    "Calls.launch": 2e-5,
    "Calls.bandwidth": 2.5e12,
    "Copy.near": 2.5e-12,
    "Copy.far": 5e-12,
    "Copy.conflict": 3e-12,
    "Copy.row": 1.4e-11,
    "Copy.loop": NONE,
    "Loop.turn": 3e-5,
    "Loop.alone": 1.0,
    "Loop.added": 2.5e12,
    "Reduction.total": NONE,
    "Reduction.outer": NONE,
    "Fold.folded": 2e-11,
    "OverlappingSum.scattered": 2.0,
    "Product.gemm": 5e13,
    "Product.dots": 3.5e12,
    "Product.half": 64.0,
    "Product.half_dot": 64.0,
    "Product.written": 1e13,
    "Product.written_in_blocks": 1e13,
    "Product.member": 1e-10,
    "Product.unaligned": NONE,
    "Product.conflicting": NONE,
    "Product.remainder": 1.0,
    "DenseConvolution.speed": 1e14,
    "DenseConvolution.weight_gradient": 7e13,
    "DenseConvolution.grouped_output": 1.2e12,
    "DenseConvolution.grouped_input_gradient": 0.35,
    "DepthwiseConvolution.entry": 4e-12,
    "DepthwiseConvolution.speed": 3.9e12,
    "DepthwiseConvolution.uncached": 1.0,
    "DepthwiseConvolution.input_gradient": 0.75,
    "DepthwiseConvolution.weight_gradient": 1.0,
    "DepthwiseConvolution.without_simd": 3.9e12,
    "DepthwiseConvolution.large_weight_gradient": 1.6e12,
    "DepthwiseConvolution.largest": 4.0,
    "PatchGram.speed": 4e13,
    "PatchGram.entry": 1e-12,
    "NativeConvolution.primitive": 1.4e-5,
    "NativeConvolution.weight_entry": NONE,
    "NativeConvolution.strided": 1.6,
    "NativeConvolution.apart": 1.0,
    "NativeConvolution.more_taps": 40.0,
}
"""Matrix products in IEEE float32, convolutions in TF32: torch's defaults."""

H100: Mapping[str, Mapping[str, float]] = {
    "float32": FLOAT32,
    "tf32": {**FLOAT32, "Product.gemm": 2e14, "PatchGram.speed": 2e14},
    "half": {  # tensor cores; convolutions bring NCHW operands into NHWC order and back
        **FLOAT32,
        "Product.gemm": 3.5e14,
        "PatchGram.speed": 3e14,
        "PatchGram.entry": 5e-13,
        "Product.dots": 7e12,
        "DenseConvolution.speed": 1.5e14,
        "DenseConvolution.weight_gradient": 1e14,
        "DenseConvolution.grouped_output": 2.5e12,
        "Copy.near": 5e-12,
        "Copy.far": 8e-12,
        "Copy.row": 3e-11,
    },
    "float64": {
        **FLOAT32,
        "Product.gemm": 3e13,
        "PatchGram.speed": 2e13,
        "Product.dots": 1.7e12,
        "DenseConvolution.speed": 1e13,
        "DenseConvolution.weight_gradient": 7e12,
        "DenseConvolution.grouped_output": 5e11,
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
