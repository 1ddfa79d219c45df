"""Kronecker factors against explicit patches, exact Gauss-Newton blocks, and BackPACK."""

from copy import deepcopy
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import tnconv
from tests.models.test_capture import Residual, data, hooks
from tests.models.test_layers import LAYERS
from tests.strategies import assert_close
from tnconv.diagrams.kronecker import Convention
from tnconv.losses.roots import curvature
from tnconv.quantities import KFAC, KFLR, Gradient, KroneckerFactors, SampledColumns

pytestmark = pytest.mark.usefixtures("float64")

FLAVOURS = ("expand", "reduce", "hybrid")
FACTORED = [name for name in LAYERS if "norm" not in name]
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """``U[n, g, a, o]`` by the layer itself, with one-hot kernels: no diagram, no unfolding."""
    if isinstance(layer, nn.Linear):
        return x.flatten(1, -2).mT[:, None] if x.dim() > 2 else x[:, None, :, None]
    transposed = isinstance(layer, (*TRANSPOSED, tnconv.nn.ConvTransposeNd))
    groups, weight = layer.groups, layer.weight
    inputs = weight.shape[0] // groups if transposed else weight.shape[1]
    shape = (inputs, *weight.shape[2:])
    one_hot = torch.eye(prod(shape)).reshape(-1, *shape)
    if transposed:
        one_hot = one_hot.transpose(0, 1)
    probe = deepcopy(layer)
    probe.weight = nn.Parameter(one_hot.repeat(groups, *[1] * (weight.dim() - 1)))
    probe.bias = None
    return probe(x).detach().reshape(len(x), groups, prod(shape), -1)


def by_group(layer: nn.Module, v: Tensor) -> Tensor:
    """Output vectors ``(m, n, *y)`` as ``v[m, n, g, d, o]``."""
    if isinstance(layer, nn.Linear):
        return v.reshape(*v.shape[:2], -1, v.shape[-1]).mT[:, :, None]
    return v.reshape(*v.shape[:2], layer.groups, v.shape[2] // layer.groups, -1)


def weight_rows(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight as ``(g, d, a)``."""
    if isinstance(layer, nn.Linear):
        return weight[None]
    groups = layer.groups
    if isinstance(layer, TRANSPOSED):
        split = weight.reshape(groups, -1, *weight.shape[1:])
        return split.transpose(1, 2).reshape(groups, weight.shape[1], -1)
    return weight.reshape(groups, len(weight) // groups, -1)


def explicit(u: Tensor, v: Tensor, flavour: str, scale: str = "ggn") -> KroneckerFactors:
    """The factors from patches ``u[n, g, a, o]`` and vectors ``v[m, n, g, d, o]``."""
    n, positions = u.shape[0], u.shape[-1]
    if flavour == "reduce":
        u = u.mean(-1, keepdim=True)
    elif scale == "ggn":
        u = u / positions**0.5
    if flavour != "expand":
        v = v.sum(-1, keepdim=True)
    elif scale == "kfc":
        v = v / positions**0.5
    a = torch.einsum("ngao,ngbo->gab", u, u) / n
    return KroneckerFactors(a, torch.einsum("mngdo,mngeo->gde", v, v))


def of_bias(v: Tensor, flavour: str) -> KroneckerFactors:
    """The factors of a bias, one block for all groups, with any scale: patches are 1."""
    v = v.flatten(2, 3)[:, :, None]
    b = explicit(torch.ones_like(v[0, :, :, :1]), v, flavour).grad_output
    return KroneckerFactors(torch.ones(1, 1, 1), b)


def assert_factors(found: KroneckerFactors, expected: KroneckerFactors, tolerance=1e-10) -> None:
    assert_close(found.input, expected.input, tolerance)
    assert_close(found.grad_output, expected.grad_output, tolerance)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("case", FACTORED)
def test_layer(case: str, flavour: str) -> None:
    make, shape = LAYERS[case]
    layer, x = make(), torch.randn(shape)
    targets, loss_fn = torch.randn_like(layer(x)), nn.MSELoss()
    kfac, joint = KFAC(flavour, "type-2"), KFAC(flavour, "type-2", joint=True)
    mean = KFAC(flavour, "type-2", per_group=False)
    result = tnconv.compute(layer, loss_fn, x, targets, [kfac, joint, mean])
    u = patches(layer, x)
    v = by_group(layer, curvature(loss_fn, layer(x), targets).vectors())
    expected = explicit(u, v, flavour)
    assert_factors(result[kfac]["weight"], expected)
    whole = explicit(torch.cat([u, torch.ones_like(u[:, :, :1])], 2), v, flavour)
    assert_factors(result[joint]["weight"], whole)
    averaged = KroneckerFactors(*(f.mean(0, keepdim=True) for f in expected))
    assert_factors(result[mean]["weight"], averaged)
    if layer.bias is not None:
        assert_factors(result[kfac]["bias"], of_bias(v, flavour))
    assert hooks(layer) == 0


class Linear(nn.Module):
    """A deep linear network: a layer between two that mix channels alone.

    The positions of what is ``before`` the layer are mixed by its windows, so that no flavour is
    exact there.
    """

    def __init__(self, layer: nn.Module, x: Tensor, pooled: bool) -> None:
        super().__init__()
        self.before = nn.Conv1d(x.shape[1], x.shape[1], 1)
        self.layer, self.pooled = layer, pooled
        self.after = nn.Conv1d(layer(x).shape[1], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.before(x.flatten(2)).reshape(x.shape)).flatten(2)
        return self.after(y.mean(2, keepdim=True) if self.pooled else y)


def gauss_newton(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    """``Σ_{m,n} J J'`` of one parameter, from whole Jacobians."""
    parameter = dict(model.named_parameters())[name].detach()
    jacobian = jacrev(lambda p: functional_call(model, {name: p}, (x,)))(parameter)
    rows = jacobian.detach().reshape(len(x), -1, parameter.numel())
    s = torch.einsum("mny,nyp->mnp", curvature(loss_fn, model(x), y).vectors().flatten(2), rows)
    return torch.einsum("mnp,mnq->pq", s, s)


CONVOLUTIONS = [name for name in FACTORED if not name.startswith("linear") and "our" not in name]


@pytest.mark.parametrize("flavour", ["expand", "reduce"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_exact_for_deep_linear_networks(case: str, flavour: str) -> None:
    """Every group's block of the Gauss-Newton matrix, at one and the same scale."""
    make, shape = LAYERS[case]
    x = torch.randn(shape)
    model = Linear(make(), x, pooled=flavour == "reduce")
    y, loss_fn = torch.randn_like(model(x)), nn.MSELoss()
    kfac = KFAC(flavour, "type-2")
    names = [name for name, _ in model.named_parameters() if not name.startswith("before")]
    result = tnconv.compute(model, loss_fn, x, y, [kfac])[kfac]
    for name in names:
        parameter = dict(model.named_parameters())[name].detach()
        whole = gauss_newton(model, loss_fn, x, y, name)
        indices = torch.arange(parameter.numel()).reshape(parameter.shape)
        if name == "layer.weight":
            rows = weight_rows(model.layer, indices)
        else:
            rows = indices.reshape(1, -1)
        for block, at in zip(result[name].blocks, rows.flatten(1), strict=True):
            assert_close(block, whole[at][:, at], 1e-10)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_exact_for_one_sample_with_one_position(flavour: str) -> None:
    layer, x, labels = nn.Conv2d(2, 4, 3), torch.randn(1, 2, 3, 3), torch.tensor([[[1]]])
    loss_fn, kfac = nn.CrossEntropyLoss(), KFAC(flavour, "type-2")
    block = tnconv.compute(layer, loss_fn, x, labels, [kfac])[kfac]["weight"].blocks[0]
    assert_close(block, gauss_newton(layer, loss_fn, x, labels, "weight"), 1e-10)


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)
    )


def seen(model: nn.Sequential, x: Tensor, vectors: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Patches and vectors of the weights of `small`, by autograd alone."""
    found = {}
    for name, layer, read in (("0", model[0], x), ("3", model[3], model[:3](x))):
        y = layer(read).detach().requires_grad_()
        rest = model[int(name) + 1 :](y)
        v = torch.stack([torch.autograd.grad(rest, y, s, retain_graph=True)[0] for s in vectors])
        found[f"{name}.weight"] = patches(layer, read).detach(), by_group(layer, v)
    return found


@pytest.mark.parametrize("scale", ["ggn", "kfc"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_table_of_scales(flavour: str, reduction: str, scale: Convention) -> None:
    """Every Fisher, reduction, flavour and convention, as `diagrams.kronecker` says."""
    model, x, labels = small(), torch.randn(5, 2, 6, 6), torch.randint(4, (5,))
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    sampled = KFAC(flavour, "mc", 2, ours, scale=scale)
    empirical = KFAC(flavour, "empirical", reduction=reduction, scale=scale)
    forward = KFAC(flavour, "forward-only", scale=scale)
    exact = KFAC(flavour, "type-2", scale=scale)
    result = tnconv.compute(model, loss_fn, x, labels, [sampled, empirical, forward, exact])
    with tnconv.observe(model, [empirical]) as observation:
        loss_fn(model(x), labels).backward()
    again = observation.result()[empirical]
    output = model(x)
    columns = curvature(loss_fn, output, labels).samples(2, theirs)
    alone = torch.stack([F.cross_entropy(output[n : n + 1], labels[n : n + 1]) for n in range(5)])
    own = torch.autograd.grad(alone.sum(), output, retain_graph=True)[0][None]
    own = own / 5**0.5 if reduction == "mean" else own  # 1/N Σ g gᵀ
    every = curvature(loss_fn, output, labels).vectors()
    for kfac, vectors in ((sampled, columns), (empirical, own), (exact, every)):
        for name, given in seen(model, x, vectors).items():
            assert_factors(result[kfac][name], explicit(*given, flavour, scale))
            if kfac is empirical:
                assert_factors(again[name], explicit(*given, flavour, scale))
    for name, (u, v) in seen(model, x, own).items():
        identity = torch.eye(v.shape[3])[None]
        expected = KroneckerFactors(explicit(u, v, flavour, scale).input, identity)
        assert_factors(result[forward][name], expected)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("samples", [1, 4])
def test_calls_on_several_sizes_are_more_positions(flavour: str, samples: int) -> None:
    model, (x, labels) = Residual().eval(), data(samples)
    loss_fn, kfac = nn.CrossEntropyLoss(), KFAC(flavour, "type-2")
    result = tnconv.compute(model, loss_fn, x, labels, [kfac, Gradient()])[kfac]
    calls: list[tuple[Tensor, Tensor]] = []
    model.act = nn.ReLU()
    hook = model.shared.register_forward_hook(lambda _, args, y: calls.append((args[0], y)))
    output = model(x)
    hook.remove()
    u = torch.cat([patches(model.shared, read.detach()) for read, _ in calls], -1)
    columns = curvature(loss_fn, output, labels).vectors()
    ends = [y for _, y in calls]
    grads = [torch.autograd.grad(output, ends, s, retain_graph=True) for s in columns]
    v = torch.cat(
        [by_group(model.shared, torch.stack(each)) for each in zip(*grads, strict=True)], -1
    )
    assert len(calls) == 3
    assert_factors(result["shared.weight"], explicit(u, v, flavour))
    assert_factors(result["shared.bias"], of_bias(v, flavour))
    assert not any(name.startswith("unused") for name in result)


def test_micro_batches_are_one_batch() -> None:
    model, x, labels = small(), torch.randn(6, 2, 6, 6), torch.randint(4, (6,))
    kfac = KFAC("reduce", "empirical")
    whole = tnconv.compute(model, nn.CrossEntropyLoss(), x, labels, [kfac])[kfac]
    with tnconv.observe(model, [kfac]) as observation:
        for part in ([0, 1, 2, 3], [4], [5]):
            loss = F.cross_entropy(model(x[part]), labels[part], reduction="sum") / 6
            loss.backward()
    for name, factors in observation.result()[kfac].items():
        assert_factors(factors, whole[name])


def test_frozen_parameters() -> None:
    model, x, labels = small(), torch.randn(4, 2, 6, 6), torch.randint(4, (4,))
    kfac = KFAC("expand", "type-2")
    before = tnconv.compute(model, nn.CrossEntropyLoss(), x, labels, [kfac])[kfac]
    model[0].weight.requires_grad_(False)
    after = tnconv.compute(model, nn.CrossEntropyLoss(), x, labels, [kfac])[kfac]
    assert after.keys() == before.keys() - {"0.weight"}
    for name, factors in after.items():
        assert_factors(factors, before[name])


def test_losses_without_curvature_have_zero_factors() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    kfac = KFAC("expand", "type-2")
    factors = tnconv.compute(layer, nn.L1Loss(), x, torch.randn(4, 2), [kfac])[kfac]["weight"]
    assert_factors(factors, KroneckerFactors((x.T @ x / 4)[None], torch.zeros(1, 2, 2)))


def test_equal_to_backpack() -> None:
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    model, x, labels = small(), torch.randn(5, 2, 6, 6), torch.randint(4, (5,))
    loss_fn, kflr = nn.CrossEntropyLoss(), KFLR()
    result = tnconv.compute(model, loss_fn, x, labels, [kflr])[kflr]
    backpack.extend(model)
    loss = backpack.extend(loss_fn)(model(x), labels)
    with backpack.backpack(extensions.KFLR()):
        loss.backward()
    for name, parameter in model.named_parameters():
        b, *a = parameter.kflr
        assert_close(result[name].grad_output[0], b, 1e-10)
        assert_close(result[name].input[0], a[0] if a else torch.ones(1, 1), 1e-10)


@pytest.mark.parametrize("samples", [1, 3])
def test_equal_to_backpack_given_its_samples(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    losses = pytest.importorskip("backpack.core.derivatives.crossentropyloss")
    drawn = []
    kind = losses.CrossEntropyLossDerivatives
    original = kind._sqrt_hessian_sampled

    def recorded(*args, **kwargs) -> Tensor:
        drawn.append(original(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(kind, "_sqrt_hessian_sampled", recorded)
    model, x, labels = small(), torch.randn(5, 2, 6, 6), torch.randint(4, (5,))
    theirs, loss_fn = backpack.extend(deepcopy(model)), nn.CrossEntropyLoss()
    loss = backpack.extend(deepcopy(loss_fn))(theirs(x), labels)
    with backpack.backpack(extensions.KFAC(mc_samples=samples)):
        loss.backward()
    monkeypatch.setattr(SampledColumns, "columns", lambda *_: drawn[0])
    kfac = KFAC("hybrid", "mc", samples, scale="kfc")
    result = tnconv.compute(model, loss_fn, x, labels, [kfac])[kfac]
    for name, parameter in theirs.named_parameters():
        b, *a = parameter.kfac
        assert_close(result[name].grad_output[0], b, 1e-10)
        assert_close(result[name].input[0], a[0] if a else torch.ones(1, 1), 1e-10)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("flavour", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equal_to_curvlinops(fisher: str, flavour: str, joint: bool, reduction: str) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, x, labels = small(), torch.randn(5, 2, 6, 6), torch.randint(4, (5,))
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    kfac = KFAC(flavour, fisher, joint=joint, reduction=reduction)
    found = tnconv.compute(model, loss_fn, x, labels, [kfac])[kfac]
    operator = curvlinops.KFACLinearOperator(
        model, loss_fn, list(model.parameters()), [(x, labels)], fisher_type=fisher,
        kfac_approx=flavour, separate_weight_and_bias=not joint, check_deterministic=False,
    )  # fmt: skip
    blocks = []
    for name, parameter in model.named_parameters():
        block = found[name].blocks[0]
        if joint and parameter.dim() > 1:  # a bias's column comes last in each of our rows
            rows = torch.arange(len(block)).reshape(len(parameter), -1)
            order = torch.cat([rows[:, :-1].flatten(), rows[:, -1]])
            block = block[order][:, order]
        if not joint or parameter.dim() > 1:
            blocks.append(block)
    entries = sum(p.numel() for p in model.parameters())
    assert_close(torch.block_diag(*blocks), operator @ torch.eye(entries), 1e-10)


def test_errors() -> None:
    with pytest.raises(ValueError, match="flavour is 'both'; expected one of 'expand', 'reduce'"):
        KFAC("both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fisher is 'exact'; expected one of 'type-2', 'mc'"):
        KFAC(fisher="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction is 'none'; expected one of 'mean', 'sum'"):
        KFAC(reduction="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples is 0; expected at least 1"):
        KFAC(samples=0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    with pytest.raises(NotImplementedError, match="batch's statistics"):
        tnconv.compute(model, nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 2), [KFAC()])
    with pytest.raises(NotImplementedError, match=r"shape \(1,\) is used by no layer with a diag"):
        kfac = KFAC(fisher="empirical")
        tnconv.compute(nn.PReLU(), nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 3), [kfac])
