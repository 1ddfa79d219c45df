"""What operators are given, and what they mean: batches, Fishers, attention, checkpoints, modes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tnconv
from tests.strategies import assert_close
from tnconv import quantities as q
from tnconv.optim import KFAC

pytestmark = pytest.mark.usefixtures("float64")
OPERATORS = (tnconv.GGNOperator, tnconv.HessianOperator, tnconv.FisherOperator)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        segment = nn.Sequential(self.first, nn.Tanh())
        return self.last(checkpoint(segment, x, use_reentrant=self.reentrant))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (2, 2)).mT for t in self.inner(x).chunk(3, -1))
        return self.head(F.scaled_dot_product_attention(q, k, v).mT.flatten(2).mean(1))


class Odd(torch.autograd.Function):
    """It has no second derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        def missing(_: Tensor) -> None:
            raise RuntimeError("derivative for aten::odd_backward is not implemented")

        found = grad.clone()
        if found.requires_grad:
            found.register_hook(missing)
        return found


@pytest.mark.parametrize("operator", OPERATORS)
def test_one_batch_by_itself_is_refused(operator) -> None:
    """A pair of tensors of two rows each looks like two pairs."""
    model, pair = nn.Linear(3, 3), (torch.rand(2, 3), torch.rand(2, 3))
    with pytest.raises(TypeError, match=r"batches holds a Tensor; expected pairs, \[\(inputs"):
        operator(model, nn.MSELoss(), pair)
    with pytest.raises(TypeError, match=r"batches is a Tensor; expected \[\(inputs, targets\)"):
        operator(model, nn.MSELoss(), pair[0])
    with pytest.raises(TypeError, match="loss_fn is the class MSELoss; expected an instance"):
        operator(model, nn.MSELoss, [pair])
    with pytest.raises(TypeError, match="model is the class Linear; expected an instance"):
        operator(nn.Linear, nn.MSELoss(), [pair])
    assert (operator(model, nn.MSELoss(), [list(pair)]) @ torch.rand(12)).shape == (12,)


@pytest.mark.parametrize("given", [q.Variance(), q.Variance])
def test_one_quantity_by_itself_is_refused(given) -> None:
    batch = torch.rand(2, 3), torch.rand(2, 3)
    with pytest.raises(TypeError, match=r"quantities is Variance by itself; expected a sequence"):
        tnconv.compute(nn.Linear(3, 3), nn.MSELoss(), *batch, given)


def test_classes_are_refused() -> None:
    batch = torch.rand(2, 3), torch.rand(2, 3)
    with pytest.raises(TypeError, match="quantities is the class Variance; expected an instance"):
        tnconv.compute(nn.Linear(3, 3), nn.MSELoss(), *batch, [q.Variance])
    with pytest.raises(TypeError, match="loss_fn is the class MSELoss; expected an instance"):
        tnconv.compute(nn.Linear(3, 3), nn.MSELoss, *batch, [q.Variance()])
    with pytest.raises(TypeError, match="loss_fn is the class MSELoss; expected an instance"):
        KFAC(nn.Linear(3, 3), fisher="mc", loss_fn=nn.MSELoss)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [nn.MSELoss, nn.BCEWithLogitsLoss])
def test_the_empirical_fisher_agrees_with_the_others(loss, reduction: str) -> None:
    """With targets from the model's own distribution: in operators, quantities and optimizers.

    For a bias every per-sample gradient is the output's own, so that the matrix is diagonal.
    """
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(20000, 4)
    out = model(x).detach()
    y = out + torch.randn_like(out) * 0.5**0.5 if loss is nn.MSELoss else out.sigmoid().bernoulli()
    loss_fn, diagonals, bs = loss(reduction=reduction), [], []
    for fisher in ("type-2", "empirical"):
        batches = [(x[:7000], y[:7000]), (x[7000:], y[7000:])]
        operator = tnconv.FisherOperator(model, loss_fn, batches, ["bias"], fisher=fisher)
        diagonals.append((operator @ torch.eye(3)).diagonal())
        kfac = q.KFAC("expand", fisher, reduction=reduction)
        bs.append(tnconv.compute(model, loss_fn, x, y, [kfac])[kfac]["bias"].grad_output)
        settings = {"fisher": fisher, "loss_fn": loss_fn, "reduction": reduction, "joint": False}
        optimizer = KFAC(model, 0.0, **settings)
        loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.remove_hooks()
        bs.append(optimizer.state[model.bias]["B"])
    torch.testing.assert_close(diagonals[1], diagonals[0], rtol=0.05, atol=0)
    for b, which in zip(bs, (0, 0, 1, 1), strict=True):
        torch.testing.assert_close(b[0].diagonal(), diagonals[which], rtol=1e-8, atol=0)


@pytest.mark.parametrize("grad", [False, True])
def test_reentrant_checkpoints_are_refused(grad: bool) -> None:
    model, loss_fn = Checkpointed(), nn.CrossEntropyLoss()
    x, y = torch.randn(5, 3, requires_grad=grad), torch.arange(5) % 3
    words = r"layer 'first' runs in a reentrant checkpoint.*use_reentrant=False"
    for operator in OPERATORS:
        with pytest.raises(NotImplementedError, match=words):
            operator(model, loss_fn, [(x, y)]) @ torch.rand(31)
    with pytest.raises(NotImplementedError, match=words):
        tnconv.hessian_diagonal(model, loss_fn, x, y)
    with pytest.raises(NotImplementedError, match=words):
        tnconv.compute(model, loss_fn, x, y, [q.SquaredNorms()])
    for quantity in (q.SquaredNorms(), q.GGNDiagonal(), q.HesScale(), q.KFAC("reduce", "mc")):
        with (
            pytest.raises(NotImplementedError, match=words),
            tnconv.observe(model, [quantity]),
        ):
            model(x)


def test_a_loop_sees_the_gradient_behind_reentrant_checkpoints() -> None:
    """Layers are seen when they run once more."""
    x, y = torch.randn(5, 3, requires_grad=True), torch.arange(5) % 3
    results = []
    for reentrant in (False, True):
        torch.manual_seed(0)
        model = Checkpointed(reentrant)
        with tnconv.observe(model, [q.Gradient()]) as observation:
            nn.CrossEntropyLoss()(model(x), y).backward()
            results.append(dict(observation.result()[q.Gradient]))
    assert results[1].keys() == {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
def test_attention_has_second_derivatives(operator) -> None:
    model, loss_fn = Attention(), nn.CrossEntropyLoss()
    x, y = torch.randn(3, 5, 4), torch.arange(3) % 3
    found = operator(model, loss_fn, [(x, y)])
    v = torch.randn(found.shape[0])
    assert_close(v @ (found @ v), (found @ v) @ v)
    named = dict(model.named_parameters())

    def outputs(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [p.numel() for p in named.values()])
        values = {n: f.reshape(p.shape) for (n, p), f in zip(named.items(), parts, strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(model, values, (x,))

    flat = torch.cat([p.detach().flatten() for p in named.values()])
    if operator is tnconv.HessianOperator:
        loss = lambda flat: loss_fn(outputs(flat), y)  # noqa: E731
        expected = torch.autograd.functional.hvp(loss, flat, v)[1]
    else:
        jacobian = torch.autograd.functional.jacobian(outputs, flat)
        inner = lambda out: loss_fn(out, y)  # noqa: E731
        hessian = torch.autograd.functional.hessian(inner, outputs(flat).detach())
        expected = torch.einsum("ncp,ncmd,mdq,q->p", jacobian, hessian, jacobian, v)
    assert_close(found @ v, expected, 1e-10)


def test_a_missing_second_derivative_is_named_with_its_remedy() -> None:
    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Odd.apply(super().forward(x))

    operator = tnconv.GGNOperator(Net(3, 3), nn.MSELoss(), [(torch.rand(2, 3), torch.rand(2, 3))])
    with pytest.raises(NotImplementedError, match=r"no second derivative.*sdpa_kernel"):
        operator @ torch.rand(12)


def moved(model: nn.Module) -> None:
    model[1].running_mean.add_(0.5)


def trained(model: nn.Module) -> None:
    model.train()


def stepped(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.mul_(2)


@pytest.mark.parametrize("change", [moved, trained, stepped])
@pytest.mark.parametrize("operator", [tnconv.GGNOperator, tnconv.HessianOperator])
def test_what_changes_a_model_invalidates_products(operator, change) -> None:
    """Mode, buffers and parameters: a held graph is made again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).eval()
    batch = torch.randn(6, 3), torch.arange(6) % 3
    held = operator(model, nn.CrossEntropyLoss(), [batch])
    v = torch.randn(held.shape[0])
    before = held @ v
    change(model)
    after = held @ v
    assert not torch.allclose(before, after)
    assert torch.equal(after, operator(model, nn.CrossEntropyLoss(), [batch]) @ v)
