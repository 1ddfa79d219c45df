"""What a layer's legs are to its parameter."""

import pytest

from tnconv.diagrams import Roles, conv, conv_transpose, linear, lookup, repeated, scale
from tnconv.diagrams.roles import sample_count

ROLES = {
    "conv": (conv((2, 4, 9, 9), (6, 2, 3, 3), groups=2), ("g", "d", "c k1 k2", "o1 o2")),
    "transposed": (conv_transpose((2, 4, 9), (4, 3, 2), groups=2), ("g", "d", "c k1", "o1")),
    "linear": (linear((2, 5, 3), (4, 3)), ("", "d", "c", "o1")),
    "embedding": (lookup((2, 5, 9), (9, 3)), ("", "d", "c", "o1")),
    "scale": (scale((2, 3, 5), (3,)), ("d", "", "", "o1")),
    "repeated": (repeated(linear((2, 3), (4, 3)), 2), ("", "d", "c", "t")),
}


@pytest.mark.parametrize("name", ROLES)
def test_roles(name: str) -> None:
    layer, expected = ROLES[name]
    found = Roles.of(layer)
    assert (found.groups, found.outputs, found.patch, found.positions) == tuple(
        tuple(legs.split()) for legs in expected
    )
    assert sample_count(layer).reference() == 2
