"""Summed positions never become a dense pattern over kernel, outputs and inputs."""

import re

import pytest
from hypothesis import given

from tests.strategies import ZOO, Case, geometries
from tnconv.codegen import compile


@pytest.mark.parametrize("name", ["kfac_reduce", "mean_patches", "avg_pool"])
@given(case=geometries(max_dims=2, empty=False))
def test_no_dense_pattern_of_three_legs(name: str, case: Case) -> None:
    source = compile(ZOO[name](case)).source
    for coefficients in re.findall(r"= pattern\(\((.*?)\)", source):
        assert len([a for a in coefficients.split(",") if a.strip()]) < 3, source
