import threading
from dataclasses import replace

import pytest

from tnconv.codegen.lowering.layouts import innermost
from tnconv.codegen.prices import cost


def test_coefficients_are_those_in_use() -> None:
    slow = replace(cost.SHIPPED, gemm=cost.SHIPPED.gemm / 10)
    usual = cost.matmul(1, 512, 512, 512).seconds
    with cost.using(slow):
        assert cost.now() == slow
        assert cost.matmul(1, 512, 512, 512).seconds > 5 * usual
        seen = []
        thread = threading.Thread(target=lambda: seen.append(cost.now()))
        thread.start()
        thread.join()
        assert seen == [cost.SHIPPED]
    assert cost.matmul(1, 512, 512, 512).seconds == usual


@pytest.mark.parametrize("columns", [5329, 5330, 5331])
def test_products_pay_for_rows_that_are_no_whole_vectors(columns: int) -> None:
    """Measured on 64 to 80 channels: 6.5 to 10 ms, and 5.7 to 6 for 5328, 5332 and 5336."""
    odd, whole = (cost.matmul(8, 64, n, 80).seconds for n in (columns, 5332))
    assert odd > 1.1 * whole
    assert cost.matmul(8, 1, columns, 80).seconds < 1.01 * cost.matmul(8, 1, 5332, 80).seconds


def test_copies_pay_for_steps_that_conflict_in_caches() -> None:
    """Columns of 64 entries, 4096 bytes apart, take four times as long as others."""
    loops = [innermost((16, width, 64), (64 * width, 1, width)) for width in (1024, 1040)]
    assert loops == [(64, 1024, 1024, 64), (64, 1040, 1040, 1)]
    times = [cost.copy(2**20, *inner).seconds for inner in loops]
    assert times[0] > 2 * times[1]


def test_conflicts_are_counted_over_dimensions() -> None:
    """7 x 7 entries, all at multiples of 4096 bytes, are read before the next of a line is."""
    assert innermost((1024, 7, 7), (1, 7 * 1024, 1024)) == (49, 1024, 1024, 49)
    assert innermost((1024, 7, 7), (1, 8 * 1024, 1024)) == (7, 1024, 7, 49)
