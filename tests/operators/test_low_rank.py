"""Gauss-Newton matrices of low rank against the dense matrix from autograd's columns."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor, nn

import tnconv
from tests.models.test_capture import Residual
from tnconv.losses import curvature
from tnconv.operators.low_rank import constant, low_rank_ggn, noise_aware, relative
from tnconv.operators.low_rank.damping import Damping

pytestmark = pytest.mark.usefixtures("float64")


class Tied(nn.Module):
    """A layer that is called twice, on two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 3, 3, padding=1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(torch.tanh(self.conv(x))[..., ::2])
        return self.head(y.mean(-1))


class Words(nn.Module):
    """An embedding, and a layer over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mixed, self.head = nn.Embedding(7, 4), nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mixed(self.table(ids))).sum(1))


def head(features: int, out: int = 4) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(features, out)]


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "strided": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.Tanh(), *head(27)),
        torch.rand(5, 2, 5, 6),
    ),
    "dilated groups": lambda: (
        nn.Sequential(nn.Conv1d(4, 6, 2, dilation=2, groups=2), nn.ReLU(), *head(30)),
        torch.rand(5, 4, 7),
    ),
    "circular": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 2, 3, padding="same", padding_mode="circular"), nn.Sigmoid(), *head(24)
        ),
        torch.rand(5, 2, 3, 4),
    ),
    "transposed": lambda: (
        nn.Sequential(nn.ConvTranspose1d(2, 3, 3, 2, 1, 1), nn.Tanh(), *head(24)),
        torch.rand(5, 2, 4),
    ),
    "volumes": lambda: (
        nn.Sequential(nn.Conv3d(1, 2, 2, padding="same"), nn.Tanh(), *head(16)),
        torch.rand(4, 1, 2, 2, 2),
    ),
    "normalised": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3).eval(), nn.Tanh(), nn.LayerNorm(3), *head(27)
        ),
        torch.rand(5, 2, 4, 4),
    ),
    "residual": lambda: (nn.Sequential(Residual(), nn.Linear(3, 4)).eval(), torch.rand(5, 2, 4, 4)),
    "tied": lambda: (Tied(), torch.rand(5, 3, 6)),
    "words": lambda: (Words(), torch.randint(7, (5, 3))),
    "dead": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4)),
        -torch.ones(5, 3),
    ),
}
CLASSES = torch.tensor([0, 3, 1, 1, 2])
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), lambda y: CLASSES[: len(y)]),
    "summed": (nn.CrossEntropyLoss(reduction="sum"), lambda y: CLASSES[: len(y)]),
    "weighted": (
        nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3, 4]).double(), ignore_index=3),
        lambda y: CLASSES[: len(y)],
    ),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), lambda y: CLASSES[: len(y)]),
    "squares": (nn.MSELoss(), lambda y: torch.zeros_like(y)),
    "binary": (nn.BCEWithLogitsLoss(reduction="sum"), lambda y: (y > 0).to(y)),
}


def case(network: str, loss: str = "cross-entropy"):
    torch.manual_seed(0)
    model, x = NETWORKS[network]()
    loss_fn, targets = LOSSES[loss]
    return model, loss_fn, x, targets(model(x).detach())


def dense(model, loss_fn, x, targets, vectors=None) -> tuple[Tensor, Tensor]:
    """V of shape ``(P, m, n)`` and gradients ``(P, n)`` as the loss gives them, by autograd."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    output = model(x)
    if vectors is None:
        vectors = curvature(loss_fn, output, targets).vectors()
    end = output.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_fn(end, targets), end)

    def pulled(vector: Tensor, at: int) -> Tensor:
        masked = torch.zeros_like(vector)
        masked[at] = vector[at]
        found = torch.autograd.grad(
            output, parameters, masked, retain_graph=True, allow_unused=True
        )
        pairs = zip(found, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])

    each = [[pulled(v, n) for n in range(len(x))] for v in vectors]
    rows = torch.stack([torch.stack(row, 1) for row in each], 1)
    return rows, torch.stack([pulled(gradient, n) for n in range(len(x))], 1)


def flat(named: dict[str, Tensor], lead: int = 0) -> Tensor:
    return torch.cat([value.flatten(lead) for value in named.values()], lead)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.to(expected), expected, rtol=1e-9, atol=1e-9)


def projector(vectors: Tensor) -> Tensor:
    return vectors.T @ vectors


def noisy() -> Damping:
    """Noise-aware damping with the same resamples each time."""
    return noise_aware(20, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", ["strided", "tied"])
def test_losses(network: str, loss: str) -> None:
    check(*case(network, loss))


@pytest.mark.parametrize("network", NETWORKS)
def test_networks(network: str) -> None:
    check(*case(network))


def test_spatial_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 3, 1))
    x = torch.rand(4, 2, 3)
    check(model, nn.CrossEntropyLoss(), x, torch.randint(3, (4, 2)))


def check(model, loss_fn, x, targets) -> None:
    """All methods of the whole matrix."""
    v, g = dense(model, loss_fn, x, targets)
    size, count = len(v), len(x)
    matrix = v.flatten(1) @ v.flatten(1).T
    ggn = low_rank_ggn(model, loss_fn, x, targets)
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    rank = ggn.block.rank
    assert rank == int((expected > 1e-10 * expected[0]).sum())
    close(ggn.eigvalsh()[:rank], expected[:rank])
    pairs = ggn.eigh()
    e = flat(pairs.vectors, 1)
    close(e @ e.T, torch.eye(rank))
    close(projector(e), projector(torch.linalg.eigh(matrix)[1].flip(1)[:, :rank].T))
    close(matrix @ e.T, e.T * pairs.values)
    own = count if ggn.block.averages else 1
    for directions in (None, pairs, pairs.vectors):
        found = ggn.directional_derivatives(directions)
        close(found.slopes, own * g.T @ e.T)
        curved = own * torch.einsum("pmn,kp->nkm", v, e).square().sum(2)
        close(found.curvatures, curved)
    slopes, values = g.sum(1) @ e.T, expected[:rank]
    each = 0.1 + torch.rand(2)
    for damping, delta in (
        (0.3, 0.3),
        (each, each),
        (constant(0.1), 0.1),
        (relative(0.1), 0.1 * values[0]),
        (lambda values, slopes, curvatures: curvatures.mean(0), values[:2]),
        (noisy(), noisy()(values, count * g.T @ e.T, count / own * curved)),
    ):
        k = len(delta) if isinstance(delta, Tensor) and delta.dim() else rank
        step = flat(ggn.newton_step(damping, k))
        close(step, -(slopes[:k] / (values[:k] + delta)) @ e[:k])
    close(flat(ggn.gradient()), g.sum(1))
    vector = torch.rand(size)
    damped = matrix + 0.1 * torch.eye(size)
    close(ggn @ vector, matrix @ vector)
    close(ggn.solve(vector, 0.1), torch.linalg.solve(damped, vector))
    close(ggn.logdet(0.1), torch.logdet(damped))
    close(ggn.trace(), matrix.trace())
    close(ggn.frobenius_norm(), torch.linalg.matrix_norm(matrix))
    close(flat(ggn.diagonal()), matrix.diagonal())
    named = dict(zip(ggn.names, ggn.space.split(vector), strict=True))
    close(flat(ggn @ named), matrix @ vector)


@pytest.mark.parametrize("groups", ["layer", "parameter", "some"])
def test_blocks(groups: str) -> None:
    model, loss_fn, x, targets = case("normalised")
    v, g = dense(model, loss_fn, x, targets)
    chosen = {"one": ["0.bias", "5.weight"], "other": ["0.weight"]} if groups == "some" else groups
    ggn = low_rank_ggn(model, loss_fn, x, targets, groups=chosen)
    named = dict(model.named_parameters())
    at, rows, slopes = 0, {}, {}
    for name, parameter in named.items():
        rows[name] = v[at : at + parameter.numel()].flatten(1)
        slopes[name] = g[at : at + parameter.numel()]
        at += parameter.numel()
    blocks = {name: torch.cat([rows[own] for own in b.rows.like]) for name, b in ggn.blocks.items()}
    assert set(ggn.names) == ({*chosen["one"], *chosen["other"]} if groups == "some" else {*named})
    matrix = torch.block_diag(*[b @ b.T for b in blocks.values()])
    order = [n for b in ggn.blocks.values() for n in b.rows.like]
    vector = {name: torch.rand_like(named[name]) for name in ggn.names}
    along = torch.cat([vector[name].flatten() for name in order])
    found = ggn @ vector
    close(torch.cat([found[name].flatten() for name in order]), matrix @ along)
    solved = ggn.solve(vector, 0.5)
    damped = matrix + 0.5 * torch.eye(len(matrix))
    close(torch.cat([solved[n].flatten() for n in order]), torch.linalg.solve(damped, along))
    close(ggn.logdet(0.5), torch.logdet(damped))
    close(ggn.trace(), matrix.trace())
    close(ggn.frobenius_norm(), torch.linalg.matrix_norm(matrix))
    for name, block in ggn.blocks.items():
        rank = block.rank
        close(
            block.eigvalsh()[:rank],
            torch.linalg.eigvalsh(blocks[name] @ blocks[name].T).flip(0)[:rank],
        )
        pairs = block.eigh()
        e = flat(pairs.vectors, 1)
        own = torch.cat([slopes[parameter] for parameter in block.rows.like])
        found = block.directional_derivatives()
        close(found.slopes, len(x) * own.T @ e.T)
        split = blocks[name].unflatten(1, (-1, len(x)))
        close(found.curvatures, len(x) * torch.einsum("pmn,kp->nkm", split, e).square().sum(2))
        step = -(own.sum(1) @ e.T / (pairs.values + 0.1)) @ e
        close(flat(block.newton_step(0.1)), step)
        close(flat(block.diagonal()), blocks[name].square().sum(1))
    with pytest.raises(ValueError, match=r"there are \d+ blocks"):
        ggn.eigh()


@pytest.mark.parametrize("loss", ["cross-entropy", "summed", "weighted"])
@pytest.mark.parametrize("gradients", [None, [0, 1, 2], [1, 4]])
def test_subsets(loss: str, gradients: list[int] | None) -> None:
    model, loss_fn, x, targets = case("strided", loss)
    curved = [1, 4]
    v, g = dense(model, loss_fn, x, targets)
    matrix = v[:, :, curved].flatten(1) @ v[:, :, curved].flatten(1).T * 5 / 2
    used = gradients or list(range(5))
    g = g[:, used] * 5 / len(used)
    ggn = low_rank_ggn(
        model, loss_fn, x, targets, curvature_samples=curved, gradient_samples=gradients
    )
    pairs = ggn.eigh()
    e = flat(pairs.vectors, 1)
    close(matrix @ e.T, e.T * pairs.values)
    found = ggn.directional_derivatives(k=2)
    own, scale = (len(used), 2) if ggn.block.averages else (len(used) / 5, 2 / 5)
    close(found.slopes, own * g.T @ e[:2].T)
    close(found.curvatures.sum(0), scale * torch.einsum("kp,pq,kq->k", e[:2], matrix, e[:2]))
    step = ggn.newton_step(0.1, 2)
    close(flat(step), -(g.sum(1) @ e[:2].T / (pairs.values[:2] + 0.1)) @ e[:2])
    vector, damped = torch.rand(len(matrix)), matrix + 0.1 * torch.eye(len(matrix))
    close(ggn.solve(vector, 0.1), torch.linalg.solve(damped, vector))
    close(ggn.logdet(0.1), torch.logdet(damped))
    close(ggn.trace(), matrix.trace())
    close(flat(ggn.diagonal()), matrix.diagonal())


def test_monte_carlo_with_the_same_draws() -> None:
    model, loss_fn, x, targets = case("residual")
    draws = curvature(loss_fn, model(x), targets).samples(3, torch.Generator().manual_seed(1))
    v, _ = dense(model, loss_fn, x, targets, draws)
    generator = torch.Generator().manual_seed(1)
    ggn = low_rank_ggn(model, loss_fn, x, targets, fisher="mc", samples=3, generator=generator)
    close(ggn.gram, v.flatten(1).T @ v.flatten(1))


DRAWN = ["both", "vectors", "subsets"]
if settings.default is not settings.get_profile("deep"):
    DRAWN = DRAWN[:1]  # each takes ten seconds


@pytest.mark.parametrize("drawn", DRAWN)
def test_estimates_are_unbiased(drawn: str) -> None:
    """The mean of 10^3 draws is within 5 standard errors of the matrix, in every entry."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), *head(4, 2)), torch.rand(5, 1, 3)
    loss_fn, targets = nn.CrossEntropyLoss(), torch.tensor([0, 1, 1, 0, 1])
    v, _ = dense(model, loss_fn, x, targets)
    exact, found = v.flatten(1) @ v.flatten(1).T, []
    for _ in range(1000):
        subset = None if drawn == "vectors" else torch.randperm(5)[:2]
        chosen = {"curvature_samples": subset, "gradient_samples": subset}
        fisher = "type-2" if drawn == "subsets" else "mc"
        pairs = low_rank_ggn(model, loss_fn, x, targets, fisher=fisher, **chosen).eigh()
        e = flat(pairs.vectors, 1)
        found.append(e.T * pairs.values @ e)
    mean, errors = torch.stack(found).mean(0), torch.stack(found).std(0) / 1000**0.5
    assert bool(((mean - exact).abs() <= 5 * errors + 1e-12).all())


def test_confident_mistakes_stay_finite() -> None:
    """Probabilities of labels down to 1e-300: eigenvalues are those of exact columns."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    with torch.no_grad():
        model.weight.mul_(400)
    x, targets = torch.rand(6, 3), torch.arange(6) % 4
    v, _ = dense(model, nn.CrossEntropyLoss(), x, targets)
    ggn = low_rank_ggn(model, nn.CrossEntropyLoss(), x, targets)
    expected = torch.linalg.eigvalsh(v.flatten(1) @ v.flatten(1).T).flip(0)
    close(ggn.eigvalsh()[: len(expected)], expected[: len(ggn.gram)])
    found = low_rank_ggn(model.float(), nn.CrossEntropyLoss(), x.float(), targets)
    assert bool(found.eigvalsh().isfinite().all()) and bool(found.gram.isfinite().all())
    assert bool(found.directional_derivatives().slopes.isfinite().all())


def test_noise_aware_damping_spares_what_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    slopes = torch.stack([torch.ones(64), torch.randn(64, generator=generator)], 1)
    curvatures = torch.ones(64, 2)
    delta = noise_aware(200, generator=generator)(torch.ones(2), slopes, curvatures)
    assert delta[0] < 1.1e-3 and delta[1] > 0.1


def test_noise_aware_damping_is_its_formula() -> None:
    """With standard errors of means as they are, ``std / √n``, for those of resamples."""
    generator = torch.Generator().manual_seed(0)
    slopes = 2 + torch.randn(50, 2, generator=generator)
    curvatures = 3 + torch.randn(50, 2, generator=generator) * torch.tensor([0.0, 0.5])
    noise, unsure = (each.std(0, correction=0) / 50**0.5 for each in (slopes, curvatures))
    expected = unsure + curvatures.mean(0) * (noise / slopes.mean(0)).square() + 1e-3 * 8
    found = noise_aware(5_000, generator=generator)(torch.tensor([8.0, 2.0]), slopes, curvatures)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


def test_eigenvectors_of_zero_are_not_invented() -> None:
    """All samples are equal: the rank is that of one sample's root."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4))
    x = torch.rand(1, 3).expand(6, 3).clone()
    ggn = low_rank_ggn(model, nn.CrossEntropyLoss(), x, torch.tensor([0, 1, 2, 3, 0, 1]))
    assert ggn.block.rank == 3 and len(ggn.eigh().values) == 3
    with pytest.raises(ValueError, match="k is 4; expected 1 to 3"):
        ggn.eigh(4)
    with pytest.raises(ValueError, match="k is 4; expected 1 to 3"):
        ggn.newton_step(0.1, 4)


def test_a_criterion_chooses() -> None:
    ggn = low_rank_ggn(*case("strided"))
    every = ggn.eigh()
    chosen = ggn.eigh(criterion=lambda values: values > values[2])
    assert len(chosen.values) == 2
    close(chosen.values, every.values[:2])
    with pytest.raises(ValueError, match="both k and a criterion"):
        ggn.eigh(1, lambda values: values > 0)


def test_wrong_directions_are_refused_in_words() -> None:
    """A number in the place of directions is taken for k, which comes second."""
    ggn = low_rank_ggn(*case("strided"))
    for given in (1, 1.0, True, "all", [1], (1, 2), torch.rand(3), torch.nn.Linear(2, 2)):
        kind = type(given).__name__
        with pytest.raises(TypeError, match=rf"directions are of type {kind}; .*k=1\)"):
            ggn.directional_derivatives(given)  # type: ignore[arg-type]
    for wrong in (1.0, "all", torch.rand(3)):
        for call in (ggn.eigh, lambda k: ggn.directional_derivatives(k=k)):
            with pytest.raises(TypeError, match=f"k is of type {type(wrong).__name__}"):
                call(wrong)  # type: ignore[operator]
    with pytest.raises(ValueError, match="both directions and k"):
        ggn.directional_derivatives(ggn.eigh(2), k=1)


WRONG = {
    "unknown": ({"curvature_samples": [5]}, r"curvature_samples are \(5,\); expected positions"),
    "empty": ({"gradient_samples": []}, r"gradient_samples are \(\); expected positions"),
    "repeated positions": (
        {"curvature_samples": [3, 1, 0, 1, 3]},
        r"curvature_samples have 1, 3 repeated; expected positions, each once",
    ),
    "repeated gradients": ({"gradient_samples": [2, 2]}, "gradient_samples have 2 repeated"),
    "foreign": ({"groups": {"a": ["9.weight"]}}, "no parameters that learn are called 9.weight"),
    "repeated": ({"groups": {"a": ["0.bias"], "b": ["0.bias"]}}, "0.bias repeated"),
    "empty block": ({"groups": {"a": [], "b": ["0.bias"]}}, "block 'a' has no names; expected"),
    "words": ({"groups": "layers"}, "groups is 'layers'; expected 'network'"),
    "fisher": ({"fisher": "monte"}, "fisher is 'monte'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    wrong, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        low_rank_ggn(*case("strided"), **wrong)


def test_losses_without_columns() -> None:
    model, _, x, _ = case("strided")
    with pytest.raises(NotImplementedError, match="no second derivative is known"):
        low_rank_ggn(model, lambda y, t: y.exp().sum(), x, None)


def test_batch_statistics_are_refused() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), *head(9))
    with pytest.raises(NotImplementedError, match="layer '1' normalises"):
        low_rank_ggn(model, nn.CrossEntropyLoss(), torch.rand(4, 2, 4), CLASSES[:4])


def test_scipy_takes_it() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    ggn = low_rank_ggn(*case("strided"))
    largest = linalg.eigsh(linalg.aslinearoperator(ggn), k=2, return_eigenvectors=False)
    close(torch.tensor(largest[::-1].copy()), ggn.eigvalsh()[:2])


def test_the_model_stays_as_it_is() -> None:
    model, loss_fn, x, targets = case("normalised")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tnconv.low_rank_ggn(model, loss_fn, x, targets, memory_limit=2**20).newton_step(1.0)
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_functions_and_partials_are_losses() -> None:
    model, _, x, targets = case("strided")
    ggn = low_rank_ggn(model, partial(F.cross_entropy, reduction="sum"), x, targets)
    close(ggn.trace(), 5 * low_rank_ggn(model, F.cross_entropy, x, targets).trace())


@pytest.mark.parametrize("count", [1, 2, 8, 9, 17])
def test_any_number_of_combinations(count: int) -> None:
    """Of rows, a few at a time: a remainder of one as well."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.rand(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    rows = low_rank_ggn(model, nn.CrossEntropyLoss(), x, y).block.rows
    coefficients = torch.rand(count, rows.vectors, rows.samples, dtype=torch.float64)
    found = rows.combined(coefficients)
    for at in range(count):
        one = rows.combined(coefficients[at : at + 1])
        for name, like in rows.like.items():
            assert found[name].shape == (count, *like.shape)
            torch.testing.assert_close(found[name][at], one[name][0])
