"""What a new route with a new kernel takes: one file like this one's first half, and its test."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.strategies import assert_close, operands_for
from tnconv import compile
from tnconv.codegen import ROUTES
from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.operations import Operation
from tnconv.codegen.lowering.strided import LIKE
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.prices import cost
from tnconv.codegen.programs.names import argument_names
from tnconv.diagrams import Tensor, TensorNetwork, View, exactly

pytestmark = pytest.mark.usefixtures("double_precision")

SOURCE = '''def mirror(size, like):
    """The exchange matrix: ones on the other diagonal."""
    return torch.eye(size, dtype=like.dtype, device=like.device).flip(0)
'''
MIRROR = Operation(
    "mirror", lambda like, size: f"mirror({size}, {like})", imports=("torch",), helper=SOURCE
)


def mirrors(cover: Cover) -> Iterator[Cover]:
    """``[i + j = I - 1]`` of two legs of size I."""
    at = cover.pattern
    assert at is not None
    pattern, sizes = cover.network.nodes[at], cover.network.sizes
    size = sizes[pattern.legs[0]]
    if pattern == exactly([(leg, 1) for leg in pattern.legs], size - 1):
        if [sizes[leg] for leg in pattern.legs] == [size, size]:
            kernel = replace(cost.copy(size**2, size), kind="mirror")
            call = MIRROR, [LIKE], (size, size), kernel, "exchanged positions"
            writer, array = cover.writer.run(*call, (size,))
            yield cover.put(writer, (at,), Value(array, pattern.legs), "mirror")


SIZES = {"i": 5, "j": 5}
NETWORK = TensorNetwork(
    (Tensor("mirror", View.of(SIZES, "i")), exactly([("i", 1), ("j", 1)], 4)),
    View.of(SIZES, "j"),
    SIZES,
)


@pytest.mark.parametrize("style", ["torch", "einsum"])
def test_a_route_brings_its_kernel_with_it(monkeypatch: pytest.MonkeyPatch, style: str) -> None:
    monkeypatch.setitem(ROUTES, "mirror", mirrors)  # type: ignore[arg-type]
    program = compile(NETWORK, simplify=False, routes=["mirror"])
    assert [plan.routes for plan in program.terms[0]] == [("mirror",), ("dense",)]
    (plan,) = (plan for plan in program.terms[0] if plan.routes == ("mirror",))
    program = replace(program, terms=((plan,),), style=style)
    assert "def mirror(size, like):" in program.source and "mirror(5, " in program.source
    assert "mirror" in program.explain()
    assert argument_names(["mirror"]) == {"mirror": "operand_0"}  # the function's own name
    operands = operands_for(NETWORK)
    assert_close(program(**operands), NETWORK.reference(**operands), 1e-12)
    assert_close(program(**operands), operands["mirror"].flip(0), 1e-12)
