"""Hypothesis profiles: ``fast`` (default, reproducible) and ``deep`` (many new random examples).

Choose with ``--hypothesis-profile=deep`` or ``TNCONV_HYPOTHESIS=deep``.
"""

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fast",
    max_examples=40,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "deep", settings.get_profile("fast"), max_examples=2000, derandomize=False
)
settings.load_profile(os.environ.get("TNCONV_HYPOTHESIS", "fast"))
os.environ.setdefault("TNCONV_CACHE_DIR", tempfile.mkdtemp(prefix="tnconv-tests-"))
os.environ.setdefault("TNCONV_TIERED_COMPILATION", "0")  # programs as users see them in the end
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(scope="module")
def double_precision() -> Iterator[None]:
    """Networks without operands have torch's default dtype; here it is that of the oracle."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def float64() -> Iterator[None]:
    """Modules and random tensors in float64, from one seed; ask for it with ``usefixtures``."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
