"""What is collected of a layer for a family: the dense factor's inner products with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.measure import peak_memory
from tests.optim.structures.test_structures import FAMILIES, members, relative
from tnconv import tiered_compilation
from tnconv.models.layers import describe
from tnconv.models.terms import Term
from tnconv.optim.inverse_free import Descent, projection
from tnconv.optim.structures import STRUCTURES, structure
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


SMALL = [name for name in STRUCTURES if structure(name, 4608).count < 4608**2 // 8]


@pytest.mark.searched
@pytest.mark.parametrize("flavour", ["expand", "reduce"])
@pytest.mark.parametrize("name", SMALL)
def test_memory_of_an_update(name, flavour):
    """Of both factors of a layer with 4608 inputs: 64 times the structures, twice the input."""
    torch.set_default_dtype(torch.float32)
    layer, shape = nn.Conv2d(512, 512, 3, padding=1, bias=False), (8, 512, 4, 4)
    term = term_of(layer, shape, None)
    families = structure(name, 4608), structure(name, 512)
    given = [0.01 * torch.randn(1, f.count) for f in families]
    given = [each + f.identity(each) for each, f in zip(given, families, strict=True)]

    def update():
        sides = (Side(output, flavour) for output in (False, True))
        each = zip(sides, families, given, strict=True)
        entries = [collected(term, side, family, own) for side, family, own in each]
        found = list(map(projection, families, given, entries))
        return Descent(0.1, 0.01, 0.5).step(
            families, given, list(map(torch.zeros_like, given)), found
        )

    with tiered_compilation(True):
        update()
        own = sum(each.nbytes for each in given)
        assert peak_memory(update) <= 64 * own + 2 * term.operands["x"].nbytes
