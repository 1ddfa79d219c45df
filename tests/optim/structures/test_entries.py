"""What is collected of a layer for a family: the dense factor's inner products with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.optim.structures.test_structures import FAMILIES, members, relative
from tnconv import tiered_compilation
from tnconv.models.layers import describe
from tnconv.models.terms import Term
from tnconv.optim.structures import structure
from tnconv.optim.structures.entries import collected
from tnconv.optim.structures.factor_parts import Side
from tnconv.quantities.kronecker_factors import factor_statistic

pytestmark = pytest.mark.usefixtures("float64")
LAYERS = st.sampled_from(
    [
        lambda: (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 6, 5)),
        lambda: (nn.Conv2d(4, 6, (2, 3), dilation=2, bias=False), (2, 4, 6, 7)),
        lambda: (nn.Conv2d(6, 6, 3, padding="same", groups=6), (2, 6, 4, 4)),
        lambda: (nn.Conv1d(5, 3, 3, padding=2, padding_mode="circular"), (4, 5, 6)),
        lambda: (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (3, 4, 3, 3)),
        lambda: (nn.Linear(9, 7), (3, 4, 9)),
        lambda: (nn.Linear(11, 5, bias=False), (6, 11)),
        lambda: (nn.Conv2d(2, 3, 1), (1, 2, 3, 3)),
    ]
)


def term_of(layer, shape, vectors):
    x = torch.randn(*shape)
    y = layer(x)
    operation, operands = describe(layer, [x], tuple(y.shape))
    lead = () if vectors is None else (vectors,)
    v = torch.randn(*lead, *operation.networks["weight"].shape)
    return Term(operation, "weight", operands, v, vectors)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=4)
@given(
    made=LAYERS,
    flavour=st.sampled_from(["expand", "reduce", "hybrid"]),
    output=st.booleans(),
    vectors=st.sampled_from([None, 2]),
)
def test_entries_are_those_of_the_dense_factor(name, made, flavour, output, vectors):
    layer, shape = made()
    side = Side(output, flavour, joint=layer.bias is not None and not output)
    term = term_of(layer, shape, vectors)
    with tiered_compilation(True):
        dense = term.values([factor_statistic(output, flavour, side.joint)])[0]
        family = structure(FAMILIES[name], dense.shape[-1])
        basis = family.dense(torch.eye(family.count))
        member = members(family, 1, groups=len(dense))[0]
        root = family.dense(member)
        for own in (None, member):
            expected = dense if own is None or family.sufficient else root.mT @ dense @ root
            expected = torch.einsum("gij,eij->ge", expected, basis)
            found = collected(term, side, family, own)
            assert found.shape == expected.shape
            assert relative(found, expected) < 1e-12
