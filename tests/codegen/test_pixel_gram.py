import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import Case, assert_close, geometries, operands_for
from tnconv import Program, compile
from tnconv.diagrams import TensorNetwork, conv, gradient_dots, gradient_norms

LAYER = conv((2, 4, 7, 5), (6, 2, 3, 2), stride=(2, 1), padding=((1, 0), (2, 1)), groups=2)


def by_pixels(network: TensorNetwork) -> list[Program]:
    """The programs that multiply pixels first."""
    plans = compile(network, routes=["pixel gram"]).terms[0]
    return [Program(network, ((plan,),), ()) for plan in plans if "pixel gram" in plan.routes]


@given(case=geometries(max_dims=2, empty=False), data=st.data())
def test_norms_and_gram_matrices_of_any_convolution(case: Case, data: st.DataObject) -> None:
    layer = conv(case.input_shape, case.weight_shape, **case.kwargs)
    every = gradient_norms(layer), gradient_dots(layer), gradient_norms(layer, vectors=2)
    network = data.draw(st.sampled_from(every))
    operands = operands_for(network)
    expected = network.reference(**operands)
    for program in by_pixels(network):
        assert_close(program(**operands), expected, 1e-10)


@pytest.mark.parametrize("network", [gradient_norms(LAYER), gradient_dots(LAYER)], ids=str)
def test_it_fires_and_torch_can_transform_it(network: TensorNetwork) -> None:
    program = by_pixels(network)[0]
    operands = operands_for(network)
    x, v = (operands[name] for name in program.operands)
    assert_close(program.run(x, v), network.reference(**operands), 1e-10)
    assert torch.autograd.gradcheck(program.run, [x.requires_grad_(), v], fast_mode=True)
    assert torch.autograd.gradgradcheck(program.run, [x, v.requires_grad_()], fast_mode=True)
    x, v = x.detach(), v.detach()
    several = torch.stack([x, 2 * x])
    expected = torch.stack([program.run(x, v), program.run(2 * x, v)])
    torch.testing.assert_close(torch.func.vmap(program.run, (0, None))(several, v), expected)
    whole = torch.compile(program.function, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(x, v), program.run(x, v))


def test_chosen_for_few_pixels_and_many_channels() -> None:
    program = compile(gradient_norms(conv((8, 192, 8, 8), (192, 192, 3, 3))))
    assert "pixel gram" in program.terms[0][0].label
