"""Windows that overlap are added up by shifted parts or by torch's fold: both are right."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import ZOO, Case, assert_close, geometries, operands_for
from tnconv import compile
from tnconv.codegen.prices import cost
from tnconv.diagrams import Tensor, TensorNetwork, View, fold
from tnconv.diagrams.affine import Axis

pytestmark = pytest.mark.usefixtures("double_precision")
WAYS = {"overlap_add": "fold", "F.fold": "shifted"}  # and the other one's price


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of the two is cheap."""
    other = cost.Kernel("too dear", 0, 0, 1e9)
    monkeypatch.setattr(cost, WAYS[request.param], lambda *_: other)
    return str(request.param)


@pytest.mark.parametrize("name", ["fold", "input_vjp", "conv_transpose"])
def test_values(way: str, name: str) -> None:
    seen = set()

    @given(case=geometries(empty=False))
    def check(case: Case) -> None:
        network = ZOO[name](case)
        operands = operands_for(network)
        program = compile(network, routes=["window"])
        seen.update(word for word in WAYS if f"{word}(" in program.text)
        assert_close(program(**operands), network.reference(**operands), 1e-10)

    check()
    assert way in seen


@given(
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    padding=st.integers(0, 4),
    outputs=st.integers(1, 5),
    rest=st.integers(0, 2),
)
def test_fold_where_padding_cuts_or_outputs_are_few(
    stride: int, dilation: int, padding: int, outputs: int, rest: int
) -> None:
    size = (outputs - 1) * stride + 2 * dilation + 1 + min(rest, stride - 1) - 2 * padding
    if size < 1:
        return
    case = {"kernel_size": 3, "stride": stride, "padding": padding, "dilation": dilation}
    network = fold((2, 3 * 3, outputs), [size], **case)
    operands = operands_for(network)
    assert_close(compile(network)(**operands), network.reference(**operands), 1e-10)


def test_several_axes_and_taps() -> None:
    """Three legs in one axis, two in another, and one that both hold."""
    sizes = {"a": 3, "b": 4, "c": 2, "d": 5, "n": 2}
    axes = (
        Axis(2, 0, (("n", 1),)),
        Axis(9, -1, (("a", 2), ("b", 1), ("c", -3))),
        Axis(7, 1, (("d", 1), ("c", 2))),
    )
    view = View((2, 9, 7), axes)
    network = TensorNetwork((Tensor("x", View.of(sizes, *"nabcd")),), view, sizes)
    operands = operands_for(network)
    assert "overlap_add(" in compile(network).text
    assert_close(compile(network)(**operands), network.reference(**operands), 1e-10)


def test_a_module_with_shifted_parts_imports_what_it_needs(tmp_path: Path) -> None:
    program = compile(fold((8, 16 * 27, 12 * 12 * 12), (14, 14, 14), 3))
    assert "overlap_add(" in program.text
    names: dict[str, Any] = {}
    exec(program.save(tmp_path / "folded.py").read_text(), names)
    operands = operands_for(program.network)
    assert_close(names["contraction"](**operands), program(**operands), 1e-12)
