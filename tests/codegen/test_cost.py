import threading
from dataclasses import replace

from tnconv.codegen import cost


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
