"""Factorisations of Kronecker factors: one by one, in batches, and refreshed by QR."""

import torch

from benchmarks.device.sections import Found, Rows

SIZES = (64, 128, 512, 1152, 2304, 4608)
TOGETHER = 8


def decompositions(rows: Rows) -> None:
    """Milliseconds by size."""
    for size in SIZES[: 1 if rows.setting.tiny else None]:
        rows.attempt(f"{size} columns", lambda size=size: one(rows, size))


def one(rows: Rows, size: int) -> Found:
    """Cholesky, symmetric eigenvalues, a step of subspace iteration by QR, a product."""
    setting = rows.setting
    x = torch.randn(size, size + 8, device=setting.device)
    factor = x @ x.T / size + 0.1 * torch.eye(size, device=setting.device)
    basis = torch.linalg.qr(torch.randn_like(factor)).Q
    calls = {
        "cholesky": lambda: torch.linalg.cholesky_ex(factor),
        "inverse by cholesky": lambda: torch.cholesky_inverse(torch.linalg.cholesky_ex(factor).L),
        "refresh by QR": lambda: torch.linalg.qr(factor @ basis),
        "product": lambda: factor @ basis,
        "eigh": lambda: torch.linalg.eigh(factor),
    }
    if size <= 512:
        many = factor.expand(TOGETHER, size, size).contiguous()
        calls[f"{TOGETHER} x cholesky"] = lambda: torch.linalg.cholesky_ex(many)
        calls[f"{TOGETHER} x eigh"] = lambda: torch.linalg.eigh(many)
    return {name: setting.milliseconds(call, 0.03) for name, call in calls.items()}
