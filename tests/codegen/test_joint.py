import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import assert_close, networks, operands_for, shipped
from tnconv import compile
from tnconv.codegen.lowering.strided import operand
from tnconv.codegen.lowering.writer import PAD
from tnconv.diagrams import Expression, TensorNetwork, conv, kfac_expand, kfac_reduce, unfold

pytestmark = pytest.mark.usefixtures("double_precision")

LAYER = conv((8, 16, 12, 12), (16, 16, 3, 3), padding=1)
SEVERAL: tuple[Expression, ...] = (
    LAYER,
    LAYER.vjp("weight"),
    LAYER.vjp("weight", per_sample=True),
    kfac_expand((8, 16, 12, 12), 3, padding=1),
    kfac_reduce((8, 16, 12, 12), 3, padding=1),
    unfold((8, 16, 12, 12), 3, padding=1),
)


@settings(max_examples=20)
@given(network=shipped(max_dims=2) | networks(selections=True, max_nodes=4), other=st.booleans())
def test_the_values_are_those_of_each(network: TensorNetwork, other: bool) -> None:
    both = [network, network.scaled(3) if other else network]
    operands = operands_for(network)
    program = compile(both)
    if operands:
        for value, net in zip(program(**operands), both, strict=True):
            assert_close(value, net.reference(**operands), 1e-10)


def test_several_networks_share_steps_and_are_right() -> None:
    program = compile(SEVERAL)
    operands = {n: torch.randn(s, dtype=torch.float64) for n, s in program.operands.items()}
    results = program(**operands)
    assert isinstance(results, tuple) and len(results) == len(SEVERAL)
    for network, value in zip(SEVERAL, results, strict=True):
        own = {name: operands[name] for name in network.operands}
        assert_close(value, network.reference(**own), 1e-10)
    alone = sum(compile(network).schedule.seconds for network in SEVERAL)
    assert program.schedule.seconds < alone
    values = [step.value for step in program.steps]
    assert len(values) == len(set(values))
    x = operand(list(program.operands).index("x"), program.operands["x"])
    assert sum(value.operation is PAD and x in value.reads for value in values) <= 1


def test_pickles_copies_and_threads() -> None:
    program = compile(SEVERAL)
    operands = {n: torch.randn(s) for n, s in program.operands.items()}
    expected = program(**operands)

    def fresh(_: int) -> tuple[torch.Tensor, ...]:
        return compile(SEVERAL)(**operands)

    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(fresh, range(8))) + list(
            pool.map(lambda _: program(**operands), range(8))
        )
    others = [
        other(**operands) for other in (pickle.loads(pickle.dumps(program)), copy.deepcopy(program))
    ]
    for results in threaded + others:
        torch.testing.assert_close(results, expected)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no networks"):
        compile([])
    with pytest.raises(ValueError, match=r"operand 'x' has shapes \(8, 16, 12, 12\) and"):
        compile([LAYER, conv((2, 16, 12, 12), (16, 16, 3, 3))])
    with pytest.raises(ValueError, match=r"expected the name of a Python file"):
        compile(LAYER).save(tmp_path / "saved.txt")
