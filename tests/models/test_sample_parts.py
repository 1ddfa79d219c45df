"""Some samples of an operation are those of the whole."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tnconv
from tests.models.test_geometries import layers
from tests.operators.test_low_rank import NETWORKS
from tests.strategies import assert_close
from tnconv.ntk.seeds import Seeds, summed
from tnconv.operators.low_rank.rows import JacobianRows

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def first_programs() -> Iterator[None]:
    with tnconv.tiered_compilation(True):
        yield


def check(model: nn.Module, x: Tensor, start: int, stop: int) -> None:
    rows = JacobianRows.of(model, summed, x, None, Seeds("all"))
    part, expected = (
        rows.of_samples(start, stop),
        JacobianRows.of(model, summed, x[start:stop], None, Seeds("all")),
    )
    assert part.samples == stop - start and part.held_bytes <= rows.held_bytes
    for name, term in part.terms.items():
        assert_close(term.gradients, expected.terms[name].gradients, 1e-11)
    assert_close(part.gram(), rows.gram()[:, start:stop, :, start:stop], 1e-11)
    assert_close(part.cross_gram(rows), rows.gram()[:, start:stop], 1e-11)


@settings(max_examples=8)
@given(layers(), st.data())
def test_geometries(case: tuple[nn.Module, Tensor], data: st.DataObject) -> None:
    layer, x = case
    try:
        entries = layer(x).flatten(1).shape[1]
    except RuntimeError:  # torch refuses the geometry
        assume(False)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(entries, 2))
    start = data.draw(st.integers(0, len(x) - 1))
    check(model, x, start, data.draw(st.integers(start + 1, len(x))))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    check(model, x, 1, 3)
    check(model, x, 2, 3)
