"""Products with matrices of models with attention, whose fast kernels differentiate once."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tnconv
from tests.strategies import assert_close

pytestmark = pytest.mark.usefixtures("float64")


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.project, self.last, self.causal = nn.Linear(8, 24), nn.Linear(8, 3), causal

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).chunk(3, -1)
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in parts)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.last(heads.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [tnconv.HessianOperator, tnconv.GGNOperator])
def test_products(kind: type, causal: bool) -> None:
    """Against the dense Hessian, and for Gauss-Newton against Jacobians one output at a time."""
    model, x, y = Attention(causal), torch.randn(3, 5, 8), torch.randint(3, (3,))
    names, values = zip(*model.named_parameters(), strict=True)
    flat = nn.utils.parameters_to_vector(values).detach()

    def output(vector: Tensor) -> Tensor:
        parts = vector.split([value.numel() for value in values])
        given = {n: p.view_as(v) for n, p, v in zip(names, parts, values, strict=True)}
        return torch.func.functional_call(model, given, (x,))

    with sdpa_kernel(SDPBackend.MATH):
        if kind is tnconv.HessianOperator:
            loss = lambda vector: F.cross_entropy(output(vector), y)  # noqa: E731
            expected = torch.autograd.functional.hessian(loss, flat)
        else:
            jacobian = torch.autograd.functional.jacobian(output, flat).flatten(0, 1)
            at = output(flat).detach()
            of_loss = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, y), at)
            expected = jacobian.T @ of_loss.reshape(9, 9) @ jacobian
    v = torch.linspace(-1, 1, len(flat))
    assert_close(kind(model, nn.CrossEntropyLoss(), [(x, y)]) @ v, expected @ v, 1e-9)
