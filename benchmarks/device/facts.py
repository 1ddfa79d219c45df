"""The machine, its limits, and the tables of prices that are calibrated on it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.device.sections import Found, Rows
from tnconv.codegen.prices import calibration
from tnconv.codegen.prices.kinds import every_coefficient

HALVES = (torch.float16, torch.bfloat16)


def facts(rows: Rows) -> None:
    """Versions and settings; the fastest product and copy; tables and what they predict."""
    setting, device = rows.setting, rows.setting.device
    rows.attempt("machine", lambda: machine(device))
    size = 256 if setting.tiny else 8192

    def product(dtype: torch.dtype) -> Found:
        x = torch.randn(size, size, device=device, dtype=dtype)
        taken = setting.milliseconds(lambda: x @ x) / 1e3
        return {"Tflop/s": 2 * size**3 / taken / 1e12}

    def copied() -> Found:
        x = torch.randn(size * size, device=device)
        return {"TB/s": 2 * x.nbytes / (setting.milliseconds(x.clone) / 1e3) / 1e12}

    for dtype in (torch.float32, *HALVES):
        rows.attempt(f"product {dtype}", lambda dtype=dtype: product(dtype))
    if setting.cuda:
        with tf32_products():
            rows.attempt("product tf32", lambda: product(torch.float32))
    rows.attempt("copy", copied)
    dtypes = (torch.float32,) if setting.tiny else (torch.float32, torch.float16, torch.float64)
    for dtype in dtypes:
        rows.attempt(f"table {dtype}", lambda dtype=dtype: calibrated(device, dtype))
        if not setting.tiny:
            rows.attempt(f"residuals {dtype}", lambda dtype=dtype: residuals(device, dtype))
    if setting.cuda:
        with tf32_products():
            rows.attempt("table tf32", lambda: calibrated(device, torch.float32))


def machine(device: torch.device) -> Found:
    """What times depend on."""
    found: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "card": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "GiB": properties.total_memory / 2**30,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "products tf32": torch.backends.cuda.matmul.allow_tf32,
            "convolutions tf32": torch.backends.cudnn.allow_tf32,
        }
    return found


@contextmanager
def tf32_products() -> Iterator[None]:
    """TF32 in matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def calibrated(device: torch.device, dtype: torch.dtype) -> Found:
    """The coefficients that calibration finds, and how long it takes."""
    started = time.perf_counter()
    table = calibration.calibrate(device, dtype)
    taken = time.perf_counter() - started
    values = {one.name: table.value(one.name) for one in every_coefficient()}
    return {"calibration seconds": taken, "coefficients": values}


def residuals(device: torch.device, dtype: torch.dtype) -> Found:
    """Price over time of each probe, where they differ by more than a tenth."""
    found = calibration.residuals(device, dtype)
    ratios = {each.name: each.predicted / each.seconds for each in found}
    off = {name: ratio for name, ratio in ratios.items() if not 0.9 < ratio < 1.1}
    times = {each.name: each.seconds * 1e6 for each in found}
    return {"probes": len(found), "price over time": off, "microseconds": times}
