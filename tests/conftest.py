"""Hypothesis profiles: ``fast`` (default, reproducible) and ``deep`` (many new random examples).

Choose with ``--hypothesis-profile=deep`` or ``TNCONV_HYPOTHESIS=deep``.
"""

import gc
import os
import signal
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.browser import Opened, headless_chromium

CHOSEN = os.environ.setdefault(
    "TNCONV_TESTS_OF_ONE_TIER", str(int("TNCONV_TIERED_COMPILATION" in os.environ))
)
"""Whether the caller says which tier all tests run in, "0" or "1"; workers of xdist inherit it."""

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
os.environ.setdefault("TNCONV_TIERED_COMPILATION", "0")  # searched programs: see `programs`
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts background commands so, and the commands that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "searched: searches for all programs, see `programs`")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="run each N-th test only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = items[:: config.getoption("--every", 1)]


def pytest_collection_finish() -> None:
    """What was imported and collected stays: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


BUILT_ON_PROGRAMS = {
    *("geometry", "losses", "models", "monitor", "nn", "ntk", "operators", "optim", "recursions"),
    *("test_nn.py", "test_stateful.py"),
}
"""Folders of what is right with any program: which one a search finds is the others' subject."""
SEARCHES = 4


@pytest.fixture(autouse=True)
def programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Which programs a test runs: those of searches, or of the baseline compiler.

    Where programs are no test's subject, one test in four searches for them, chosen by its name; in
    the deep profile, with the mark ``searched``, or where the environment says how, all tests do.
    """
    from tests.quick_programs import quick_programs  # after the environment is set

    part = request.path.relative_to(Path(__file__).parent).parts[0]
    all_search = CHOSEN == "1" or settings.default is settings.get_profile("deep")
    here = zlib.crc32(request.node.nodeid.encode()) % SEARCHES == 0
    if (
        all_search
        or here
        or part not in BUILT_ON_PROGRAMS
        or request.node.get_closest_marker("searched")
    ):
        yield
    else:
        with quick_programs():
            yield


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


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless browser for the tests of one file, which skip where there is none."""
    with headless_chromium() as browser:
        yield browser


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[[Path], Opened]]:
    """Opens an HTML file: ``open_page(path).pictures()``; a page's error fails the test."""
    opened: list[Opened] = []

    def open_path(path: Path) -> Opened:
        opened.append(Opened(chromium.new_page(), path))
        return opened[-1]

    yield open_path
    for each in opened:
        each.page.close()
        assert not each.errors, each.errors
