"""Programs that are planned by an accelerator's prices, run on the processor."""

from typing import Any

import pytest
import torch

from tests.strategies import SUMS, ZOO, Case, assert_close, operands_for
from tnconv import Program, compile
from tnconv.codegen.prices import cost
from tnconv.codegen.prices.calibration import coefficients
from tnconv.codegen.prices.shipped import shipped
from tnconv.codegen.prices.tables import Table
from tnconv.diagrams import Expression, conv, kfac_expand

GPU = torch.device("cuda", 0)
LAYER = conv((32, 64, 56, 56), (64, 64, 3, 3), padding=1)
NETWORKS = {
    "forward": LAYER,
    "weight gradient": LAYER.vjp("weight"),
    "input gradient": LAYER.vjp("x"),
    "per sample": LAYER.vjp("weight", per_sample=True),
    "kfac_expand": kfac_expand((32, 64, 56, 56), 3, padding=1),
}


def compiled_for_gpu(network: Expression, **options: Any) -> Program:
    """The compiler takes the tables of a GPU, which cannot be calibrated here."""

    def table(device: torch.device, dtype: torch.dtype) -> Table:
        return shipped(GPU, dtype, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tnconv.codegen.compiler.coefficients", table)
        return compile(network, **options)


@pytest.mark.parametrize("name", ZOO | SUMS)
def test_plans_compute_the_right_values(name: str) -> None:
    case = Case((3, 4, 7, 6), (4, 2, 3, 2), stride=(2, 1), padding=1, groups=2)
    network = (ZOO | SUMS)[name](case)
    operands = operands_for(network)
    program = compiled_for_gpu(network, dtype=torch.float64)
    assert_close(program(**operands), network.reference(**operands))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", NETWORKS)
def test_plans_take_few_kernels(name: str, dtype: torch.dtype) -> None:
    """Launches are dear beside the work: a processor's plan for the factor takes 88 kernels."""
    program = compiled_for_gpu(NETWORKS[name], dtype=dtype)
    assert "loop" not in program.terms[0][0].routes
    assert len(program.schedule.steps) <= 20


def test_memory_of_native_kernels_does_not_follow_processors() -> None:
    """What convolutions hold is bounded by a workspace, whatever the number of threads."""
    net = conv((8, 128, 14, 14), (128, 128, 3, 3), padding=1).vjp("weight")
    before, peaks = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            peaks.add(compiled_for_gpu(net, routes=("native",)).peak_memory())
    finally:
        torch.set_num_threads(before)
    assert len(peaks) == 1


def test_meta_tensors_have_the_prices_of_processors() -> None:
    assert coefficients(torch.device("meta"), torch.float16) == cost.SHIPPED
