"""Programs of a first call are enough here: that searched ones agree with them is tested apart."""

from collections.abc import Iterator

import pytest

import tnconv


@pytest.fixture(autouse=True)
def first_programs() -> Iterator[None]:
    with tnconv.tiered_compilation(True):
        yield
