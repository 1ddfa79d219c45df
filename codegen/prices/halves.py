"""Numbers of sixteen bits on processors: where torch has fast kernels for them."""

import platform
from functools import cache

import torch

HALVES = (torch.float16, torch.bfloat16)
X86_NAMES = ("x86_64", "AMD64")


@cache
def are_slow(dtype: torch.dtype) -> bool:
    """Whether torch computes in this dtype by loops, several times slower than in float32.

    That is where oneDNN has no kernels: on x86 processors without such instructions (0025).
    """
    if dtype not in HALVES or platform.machine() not in X86_NAMES:
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return True
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return not native[dtype]()
