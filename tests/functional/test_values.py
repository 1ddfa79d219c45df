"""Every operation, for every kind of layer and random geometries, is what torch computes."""

from math import prod

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.functional.rows import ROWS, layers
from tests.strategies import assert_close
from tnconv import functional


@pytest.mark.parametrize("name", ROWS)
@given(data=st.data())
@settings(max_examples=settings.default.max_examples * 3 // 20)
def test_values(name: str, data: st.DataObject) -> None:
    row = ROWS[name]
    layer = data.draw(layers(row))
    if row.dense:
        batch = max(1, layer.shapes["x"][0])
        assume(prod(layer.shapes["y"]) * prod(layer.shapes["x"]) // batch < 100_000)
    ours, expected, operands = row(layer)
    assert_close(ours(*operands), expected(*operands), 1e-10)


def test_every_function_has_a_row() -> None:
    assert {name.split()[0] for name in ROWS} == set(functional.__all__)
