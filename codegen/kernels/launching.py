"""Launches of the kernels of `patch_gram`: what they are told, and when they can run."""

import os
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor

from tnconv.codegen.kernels.tiling import Tiling, tiling
from tnconv.codegen.kernels.windows import Windows
from tnconv.diagrams.notices import warn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # by Triton's interpreter, in tests
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
KERNELS_ON = DEVICES if find_spec("triton") else ()
"""The types of devices on which the kernels run."""
HALVES = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
"""The interpreter multiplies the bits of bfloat16 as if they were integers."""
DTYPES = (*HALVES, torch.float32, torch.float64)
UNITS = 1  # multiprocessors that the interpreter pretends to have
WARPS = {16: 1, 32: 2, 64: 4, 128: 8}  # of 32 threads, by the side of a tile
STAGES = 3  # products whose entries are loaded ahead
MOST = 2**31  # addresses and positions below it take 32 bits
VECTORS = 16  # channels from which on tiles are loaded along innermost channels


def has_kernel(x: Tensor) -> bool:
    """Whether the kernels support the device, the dtype and the number of dimensions."""
    return x.device.type in KERNELS_ON and x.dtype in DTYPES and x.dim() in (3, 4, 5)


def may_launch(x: Tensor, windows: Windows) -> bool:
    """Whether kernels can run now: none is compiled without a compiler, or during a capture.

    They are compiled for divisors of sizes, strides and addresses, so that these are remembered.
    """
    place = x.device, x.dtype, x.shape, x.stride(), x.data_ptr() % 16
    key = (*place, precision(x), *map(str, windows))
    if key in _launched:
        return works(x.device)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    _launched.add(key)
    return works(x.device)


@cache
def works(device: torch.device) -> bool:
    """Whether Triton can compile for a device: it needs a C compiler, for one. A warning says why.

    It is asked once, by a small call.
    """
    x = torch.ones(1, 1, 4, device=device)
    try:
        launched(x, Windows((2,), (3,), (1,), (0,), (1,)))
    except Exception as error:  # whatever a compiler, or a driver, may raise
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        warn(
            f"our kernel for products of patches does not run on {device} ({problem}); inputs are "
            "unfolded instead",
            RuntimeWarning,
        )
        return False
    return True


_launched: set[tuple[Any, ...]] = set()


def precision(x: Tensor) -> str:
    """The format of products of float32 numbers: as in torch's matrix products."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and x.dtype == torch.float32 else "ieee"


def launched(
    x: Tensor, windows: Windows, format: str | None = None, tiles: Tiling | None = None
) -> Tensor:
    """The Gram matrices by our kernels.

    Args:
        x: The input.
        windows: Its windows.
        format: Of products of float32: ``"ieee"``, ``"tf32"``, ``"tf32x3"``, or as torch's.
        tiles: How the work is divided, if not by `tiling`.
    """
    rows, groups = windows.rows(x), windows.groups
    positions = prod(windows.positions)
    total, channels = x.shape[0] * positions, x.shape[1] // groups
    result = x.new_empty(groups, rows, rows)
    if not (result.numel() and x.numel() and total):
        return result.zero_()
    item, format = x.element_size(), format or precision(x)
    tiles = tiles or tiling(rows, groups, total, item, _units(x), item == 2 or format != "ieee")
    geometry, masked, wide = _described(x, windows, tiles)
    constant: dict[str, Any] = {"BLOCK": tiles.block, "LAST": _channels_innermost(x, channels)}
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    split, parts = tiles.splits > 1, result
    if split:
        parts = x.new_empty(tiles.splits * groups * tiles.entries, dtype=sums)
    from tnconv.codegen.kernels import triton_grams as kernels

    how = {"num_warps": WARPS[tiles.block], "enable_fp_fusion": True}
    counts = (tiles.splits, tiles.tiles, tiles.side)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernels.patch_gram_tiles[(groups * tiles.tiles * tiles.splits,)](
            *(x, parts, rows, channels, total, tiles.per_split, *counts, *geometry),
            **{"DIMS": x.dim() - 2, "MASKED": masked, "WIDE": wide, "DEPTH": tiles.depth},
            **{"PRECISION": format, "SPLIT": split, **constant},
            **{"TOTAL": kernels.dtypes[sums], "num_stages": STAGES, **how},
        )
        if split:
            kernels.patch_gram_total[(groups * tiles.tiles,)](
                *(parts, result, rows, channels, *counts), **constant, **how
            )
    return result


def _described(x: Tensor, windows: Windows, tiles: Tiling) -> tuple[tuple[int, ...], int, bool]:
    """Numbers of the geometry in three dimensions; a bit for each that windows leave; wide or not.

    Wide numbers, of 64 bits, are for positions and addresses that 32 do not hold.
    """
    missing = 3 - len(windows.kernel_size)
    ones, zeros = (1,) * missing, (0,) * missing
    taps, outputs = (*ones, *windows.kernel_size), (*ones, *windows.positions)
    sizes, strides = (*ones, *x.shape[2:]), (*zeros, *x.stride()[2:])
    steps, dilations = (*ones, *windows.stride), (*ones, *windows.dilation)
    padding, masked = (*zeros, *windows.padding), 0
    reach = (x.shape[0] - 1) * x.stride(0) + (x.shape[1] - 1) * x.stride(1)
    for dim in range(3):
        last = steps[dim] * (outputs[dim] - 1) + dilations[dim] * (taps[dim] - 1)
        masked |= (padding[dim] > 0 or last - padding[dim] >= sizes[dim]) << dim
        reach += (last + abs(padding[dim])) * strides[dim]
    total = x.shape[0] * prod(outputs)
    windowed = (*taps, *outputs[1:], prod(outputs), *sizes, *steps, *dilations, *padding)
    wide = max(reach, total + tiles.per_split) >= MOST
    return (*windowed, *x.stride()[:2], *strides), masked, wide


def _channels_innermost(x: Tensor, channels: int) -> bool:
    """Whether vectors of channels lie in memory, and not of positions."""
    return channels >= VECTORS and x.stride(1) == 1 < x.stride(-1)


def _units(x: Tensor) -> int:
    if not x.is_cuda:
        return UNITS
    units: int = torch.cuda.get_device_properties(x.device).multi_processor_count
    return units
