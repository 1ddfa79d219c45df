"""Summed positions: no dense pattern over kernel, outputs and inputs, no line for every tap."""

import re

import pytest
from hypothesis import given

from tests.strategies import ZOO, Case, geometries
from tnconv.codegen import compile
from tnconv.diagrams import TensorNetwork, conv, gradient_norms, kfac_expand, kfac_reduce


@pytest.mark.parametrize("name", ["kfac_reduce", "mean_patches", "avg_pool"])
@given(case=geometries(max_dims=2, empty=False))
def test_no_dense_pattern_of_three_legs(name: str, case: Case) -> None:
    source = compile(ZOO[name](case)).source
    for coefficients in re.findall(r"= pattern\(\((.*?)\)", source):
        assert len([a for a in coefficients.split(",") if a.strip()]) < 3, source


@pytest.mark.parametrize(
    "network",
    [
        kfac_reduce((8, 1, 16000), 1024, stride=16),
        kfac_reduce((4, 2, 900), 512),
        kfac_expand((8, 1, 16000), 1024, stride=16),
        gradient_norms(conv((4, 2, 900), (3, 2, 512))),
    ],
    ids=str,
)
def test_plans_for_many_taps_are_short(network: TensorNetwork) -> None:
    """Writing a step for every tap took tens of seconds; other routes read windows at once."""
    assert max(len(plan.steps) for plan in compile(network).terms[0]) < 100
