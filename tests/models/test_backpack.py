"""BackPACK's own results, field by field, for networks that it supports; and where it is wrong."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnconv
from tests.loops import first_order, per_sample_gradients
from tests.strategies import assert_close
from tnconv import quantities as q

backpack = pytest.importorskip("backpack")
extensions = pytest.importorskip("backpack.extensions")
likelihood = pytest.importorskip("backpack.core.derivatives.nll_base")

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:Using padding='same'"),
]

SAMPLES = 3
MSE, CROSS, BINARY = nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss
Make = Callable[[], nn.Sequential]

NETWORKS: dict[str, tuple[Make, tuple[int, ...], type[nn.Module]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4, bias=False)),
        (6,),
        CROSS,
    ),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)
        ),
        (2, 6, 6),
        CROSS,
    ),
    "pooling": (
        lambda: nn.Sequential(
            nn.ZeroPad2d(1), nn.Conv2d(2, 3, 3, dilation=2, bias=False), nn.MaxPool2d(2),
            nn.Tanh(), nn.Conv2d(3, 2, 2), nn.AvgPool2d(2, padding=1), nn.Flatten(),
            nn.Dropout().eval(), nn.Linear(8, 3),
        ),
        (2, 10, 9),
        MSE,
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(15, 4)),
        (2, 9),
        CROSS,
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)),
        (1, 3, 4, 3),
        MSE,
    ),
    "transposed, 1-d": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 3, 2, 1), nn.Sigmoid(), nn.Flatten()),
        (2, 4),
        MSE,
    ),
    "transposed, 2-d": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2, 2), nn.Tanh(), nn.Flatten()),
        (2, 3, 2),
        CROSS,
    ),
    "transposed, 3-d": (
        lambda: nn.Sequential(nn.ConvTranspose3d(1, 2, 2), nn.ReLU(), nn.Flatten()),
        (1, 2, 1, 2),
        MSE,
    ),
    "binary": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)),
        (6,),
        BINARY,
    ),
    "batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3).eval(), nn.LeakyReLU(0.1), nn.Flatten(),
            nn.Linear(12, 4),
        ),
        (2, 4, 4),
        CROSS,
    ),
    "groups": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.ELU(), nn.Flatten(), nn.Linear(54, 3)
        ),
        (4, 3, 3),
        CROSS,
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(15, 4)),
        (5,),
        CROSS,
    ),
}  # fmt: skip
WITHOUT_FACTORS = {"batch norm", "groups", "embedding"}  # which BackPACK refuses
FIRST = {
    "grad_batch": ("BatchGrad", q.PerSampleGradients()),
    "batch_l2": ("BatchL2Grad", q.SquaredNorms()),
    "sum_grad_squared": ("SumGradSquared", q.SumOfSquares()),
    "variance": ("Variance", q.Variance()),
}
EXACT = {
    "diag_ggn_exact": ("DiagGGNExact", q.GGNDiagonal()),
    "diag_ggn_exact_batch": ("BatchDiagGGNExact", q.GGNDiagonal(per_sample=True)),
}
SAMPLED = {
    "diag_ggn_mc": ("DiagGGNMC", q.GGNDiagonal("mc", SAMPLES)),
    "diag_ggn_mc_batch": ("BatchDiagGGNMC", q.GGNDiagonal("mc", SAMPLES, None, True)),
}
FACTORS = {
    "kflr": ("KFLR", q.KFLR()),
    "kfac": ("KFAC", q.KFAC("hybrid", "mc", SAMPLES, scale="kfc")),
}
KNOWN_WRONG = {("groups", "batch_l2")}
"""Fields of networks that BackPACK gets wrong without saying so."""


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """One draw of vectors, for all of BackPACK's extensions and for ours."""
    found: list[Tensor] = []
    kind = likelihood.NLLLossDerivatives
    original = kind._sqrt_hessian_sampled

    def once(*args: Any, **kwargs: Any) -> Tensor:
        if not found:
            found.append(original(*args, **kwargs))
        return found[0]

    monkeypatch.setattr(kind, "_sqrt_hessian_sampled", once)
    monkeypatch.setattr(q.SampledColumns, "columns", lambda *_: found[0])
    yield found


def batch(
    model: nn.Sequential, shape: tuple[int, ...], kind: type[nn.Module]
) -> tuple[Tensor, Tensor]:
    words = isinstance(model[0], nn.Embedding)
    x = torch.randint(7, (4, *shape)) if words else torch.randn(4, *shape)
    y = torch.randn_like(model(x))
    if kind is CROSS:
        return x, torch.randint(y.shape[1], (4,))
    return x, y if kind is MSE else (y > 0).to(y)


def theirs(
    model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, wanted: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """BackPACK's fields by parameter."""
    model, loss_fn = backpack.extend(deepcopy(model)), backpack.extend(deepcopy(loss_fn))
    found: dict[str, dict[str, Any]] = {}
    for field, (name, _) in wanted.items():
        settings = {"mc_samples": SAMPLES} if "MC" in name or name == "KFAC" else {}
        with backpack.backpack(getattr(extensions, name)(**settings)):
            loss_fn(model(x), y).backward()
        found[field] = {name: getattr(p, field) for name, p in model.named_parameters()}
    return found


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", NETWORKS)
def test_equal(case: str, reduction: str, drawn: list[Tensor]) -> None:
    make, shape, kind = NETWORKS[case]
    model, loss_fn = make(), kind(reduction=reduction)
    x, y = batch(model, shape, kind)
    wanted = FIRST | EXACT | SAMPLED | ({} if case in WITHOUT_FACTORS else FACTORS)
    wanted = {field: each for field, each in wanted.items() if (case, field) not in KNOWN_WRONG}
    expected = theirs(model, loss_fn, x, y, wanted)
    result = tnconv.compute(model, loss_fn, x, y, [quantity for _, quantity in wanted.values()])
    for field, (_, quantity) in wanted.items():
        for name, value in expected[field].items():
            if field in FACTORS:
                b, *a = value
                assert_close(result[quantity][name].grad_output[0], b, 1e-10)
                ones = torch.ones(1, 1)
                assert_close(result[quantity][name].input[0], a[0] if a else ones, 1e-10)
            else:
                assert_close(result[quantity][name], value, 1e-10)


WRONG: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), {"batch_l2"}),
    "groups, 1-d": (lambda: nn.Conv1d(4, 6, 3, groups=2), {"batch_l2"}),
    "transposed, groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), {"batch_l2"}),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), {*FIRST, *EXACT}),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), {*FIRST, *EXACT}),
    "replicate": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), {*FIRST}),
    "same": (
        lambda: nn.Conv2d(4, 6, 3, padding="same"),
        {"grad_batch", "sum_grad_squared", "variance"},
    ),
}
"""Layers, and fields of their weights."""


@pytest.mark.parametrize("case", WRONG)
def test_right_where_backpack_is_known_to_be_wrong(case: str) -> None:
    make, fields = WRONG[case]
    layer = make()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten())
    x = torch.randn(3, 4, *[5] * (layer.weight.dim() - 2))
    y, loss_fn = torch.randn_like(model(x)), nn.MSELoss(reduction="sum")
    wanted = {name: each for name, each in (FIRST | EXACT).items() if name in fields}
    result = tnconv.compute(model, loss_fn, x, y, [quantity for _, quantity in wanted.values()])
    known = theirs(model, loss_fn, x, y, wanted)
    for name, gradients in per_sample_gradients(model, loss_fn, x, y).items():
        for kind, expected in first_order(gradients).items():
            quantity = getattr(q, kind)
            if quantity in {type(each) for _, each in wanted.values()}:
                assert_close(result[quantity][name], expected, 1e-10)
    columns = torch.func.jacrev(lambda w: torch.func.functional_call(model, {"0.weight": w}, x))
    squares = 2 * columns(layer.weight.detach()).square().sum(1)
    for field, (_, quantity) in wanted.items():
        if field in EXACT:
            each = squares if field.endswith("batch") else squares.sum(0)
            assert_close(result[quantity]["0.weight"], each, 1e-10)
        error = known[field]["0.weight"] - result[quantity]["0.weight"]
        assert error.abs().max() > 1e-3 * result[quantity]["0.weight"].abs().max()


@pytest.mark.parametrize("case", ["linear", "conv", "pooling"])
def test_products_with_blocks(case: str) -> None:
    make, shape, kind = NETWORKS[case]
    model, loss_fn = make(), kind()
    x, y = batch(model, shape, kind)
    extended = backpack.extend(deepcopy(model))
    with backpack.backpack(extensions.GGNMP(), extensions.HMP()):
        backpack.extend(deepcopy(loss_fn))(extended(x), y).backward(retain_graph=True)
        for name, parameter in extended.named_parameters():
            vector = torch.randn_like(parameter)
            for field, operator in ("ggnmp", tnconv.GGNOperator), ("hmp", tnconv.HessianOperator):
                (expected,) = getattr(parameter, field)(vector[None])
                (found,) = operator(model, loss_fn, [(x, y)], [name]) @ (vector,)
                assert_close(found, expected, 1e-10)
