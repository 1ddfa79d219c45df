"""Where samples are found, what is refused, and what it takes: one situation after the other."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnconv
from tests.loops import per_sample_gradients
from tests.models.test_capture import QUANTITIES, assert_first_order, hooks
from tests.strategies import assert_close
from tnconv.models import coded_passes, samples
from tnconv.models.coded import Codes, Prediction, Sketch, Whole, judged
from tnconv.models.coded_passes import CodedPasses
from tnconv.models.sample_maps import Batch, Fold, Shared, Silent, Unknown
from tnconv.quantities import KFAC, GGNDiagonal, Gradient, PerSampleGradients, SquaredNorms

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """The ordinary case prints nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


class Made(nn.Module):
    """A model of a function and the layers that it uses."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def check(model: nn.Module, x: Tensor, y: Tensor, loss_fn: Any = F.cross_entropy) -> None:
    """Both forms, against one sample at a time."""
    each = per_sample_gradients(model, loss_fn, x, y, 1 / len(x))
    assert_first_order(tnconv.compute(model, loss_fn, x, y, QUANTITIES), each)
    with tnconv.observe(model, QUANTITIES) as observation:
        loss_fn(model(x), y).backward()
    assert_first_order(observation.result(), each)
    assert hooks(model) == 0


def words(n: int, t: int) -> Tensor:
    return torch.randint(11, (n, t))


def labels(n: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, (n,))


@pytest.mark.parametrize("steps", [4, 6])
@pytest.mark.parametrize("rank", [1, 2])
def test_tables_of_positions_have_a_row_for_each_step(steps: int, rank: int) -> None:
    """As many steps as samples, or not; looked up for one row or for none."""

    def forward(m: Any, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        return m.head(torch.tanh(m.words(x) + m.places(at if rank == 1 else at[None])).mean(1))

    layers = {"words": nn.Embedding(11, 5), "places": nn.Embedding(8, 5), "head": nn.Linear(5, 3)}
    check(Made(forward, **layers), words(6, steps), labels(6))


def test_time_in_the_batch_of_a_convolution() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        frames = m.conv(x.flatten(0, 1)).relu().flatten(1)
        return m.head(frames).view(*x.shape[:2], 3).mean(1)

    model = Made(forward, conv=nn.Conv2d(2, 3, 3), head=nn.Linear(12, 3))
    check(model, torch.randn(4, 5, 2, 4, 4), labels(4))


@pytest.mark.parametrize("flavour", ["expand", "reduce"])
def test_factors_of_folded_frames_are_those_of_a_convolution_over_time(flavour: Any) -> None:
    """A kernel of one step in time, by itself: every frame is one of its positions."""
    frames = Made(
        lambda m, x: (
            m.conv(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).sum((1, 3, 4))
        ),
        conv=nn.Conv2d(2, 3, 3),
    )
    volume = Made(lambda m, x: m.conv(x).sum((2, 3, 4)), conv=nn.Conv3d(2, 3, (1, 3, 3)))
    volume.conv.weight.data = frames.conv.weight.data.unsqueeze(2)
    volume.conv.bias.data = frames.conv.bias.data
    x, y, kfac = torch.randn(4, 2, 5, 4, 4), torch.randn(4, 3), KFAC(flavour, "type-2")
    one, other = (tnconv.compute(m, nn.MSELoss(), x, y, [kfac])[kfac] for m in (frames, volume))
    for name in ("conv.weight", "conv.bias"):
        for mine, theirs in zip(one[name], other[name], strict=True):
            assert_close(mine, theirs, 1e-10)


@pytest.mark.parametrize("order", ["nt", "tn", "time first", "channels"])
def test_rows_of_one_sample_in_the_output_are_its_positions(order: str) -> None:
    """Exact curvature of logits in rows is that of the same logits as ``(n, c, t)``."""
    arranged: dict[str, Callable[[Tensor], Tensor]] = {
        "nt": lambda y: y.flatten(0, 1),
        "tn": lambda y: y.transpose(0, 1).flatten(0, 1),
        "time first": lambda y: y.permute(1, 2, 0),
        "channels": lambda y: y.mT,
    }
    layers = {"first": nn.Linear(3, 5), "head": nn.Linear(5, 4)}

    def logits(m: Any, x: Tensor) -> Tensor:
        found: Tensor = m.head(torch.tanh(m.first(x)).cumsum(1))
        return found

    plain = Made(lambda m, x: logits(m, x).mT, **layers)
    other = Made(lambda m, x: arranged[order](logits(m, x)), **layers)
    x, y = torch.randn(3, 4, 3), torch.randint(4, (3, 4))
    targets = {"nt": y.flatten(), "tn": y.T.flatten(), "time first": y.T, "channels": y}[order]
    loss, each, kfac = nn.CrossEntropyLoss(), GGNDiagonal(per_sample=True), KFAC("expand", "type-2")
    expected = tnconv.compute(plain, loss, x, y, [GGNDiagonal(), each, kfac])
    found = tnconv.compute(other, loss, x, targets, [GGNDiagonal(), each, kfac])
    for name in ("first.weight", "first.bias", "head.weight", "head.bias"):
        assert_close(found[each][name], expected[each][name], 1e-10)
        assert_close(found[GGNDiagonal()][name], expected[GGNDiagonal()][name], 1e-10)
        for mine, theirs in zip(found[kfac][name], expected[kfac][name], strict=True):
            assert_close(mine, theirs, 1e-10)


@pytest.mark.parametrize("x", [[[4, 4], [2, 4], [4, 4]], [[4, 4], [4, 4], [4, 4]]], ids=str)
def test_samples_that_hardly_differ(x: list[list[int]]) -> None:
    """What tells samples apart is asked of two that differ; nothing tells those that are equal."""
    model = Made(
        lambda m, x: m.head(m.table(x)).flatten(0, 1),
        table=nn.Embedding(11, 4),
        head=nn.Linear(4, 3),
    )
    x, squares = torch.tensor(x), lambda y, _: y.square().sum()
    if len(x.unique(dim=0)) == 1:
        with pytest.raises(NotImplementedError, match="expected a batch whose samples differ"):
            tnconv.compute(model, squares, x, x, [PerSampleGradients()])
        return
    found = tnconv.compute(model, squares, x, x, [PerSampleGradients()])[PerSampleGradients]
    for n, each in enumerate(x):
        named = dict(model.named_parameters())
        grads = torch.autograd.grad(model(each[None]).square().sum(), list(named.values()))
        for name, grad in zip(named, grads, strict=True):
            assert_close(found[name][n], grad, 1e-12)


def test_logits_that_the_loop_flattens() -> None:
    """What vectors start from need not be what the model gave."""
    model = Made(lambda m, x: torch.tanh(m.first(x)).cumsum(1), first=nn.Linear(3, 4))
    x, y = torch.randn(3, 5, 3), torch.randint(4, (3, 5))
    loss = nn.CrossEntropyLoss()
    turned = Made(lambda m, x: m.first(x).tanh().cumsum(1).mT, first=model.first)
    expected = tnconv.compute(turned, loss, x, y, [GGNDiagonal()])[GGNDiagonal]
    with tnconv.observe(model, [GGNDiagonal()]) as observation:
        for _ in range(2):
            observation.propagate(loss, model(x).flatten(0, 1), y.flatten())
            found = observation.result()[GGNDiagonal]
            for name, value in expected.items():
                assert_close(found[name], value, 1e-10)


REORDERED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "outputs": lambda m, x: m.first(x)[[2, 0, 3, 1]],
    "inputs": lambda m, x: m.first(x.flip(0)),
    "sorted": lambda m, x: m.first(x)[x.detach().sum(1).argsort()],
    "second dimension": lambda m, x: m.first(x)[[2, 0, 3, 1]].T,
    "rows": lambda m, x: m.first(x)[[2, 0, 3, 1]].unflatten(1, (2, 2)).flatten(0, 1),
}


@pytest.mark.parametrize("case", REORDERED)
def test_samples_in_another_order_are_refused_in_words(case: str) -> None:
    """Also where equal samples hide it."""
    model = Made(REORDERED[case], first=nn.Linear(3, 4))
    few = torch.randn(2, 3)
    for x in (torch.randn(4, 3), few[[0, 1, 1, 0]]):
        if case == "sorted":
            x = x[x.sum(1).argsort(descending=True)]
        words = "samples are in another order in the model"
        words += "|samples see each other, or are sorted" if case == "sorted" else ""
        with pytest.raises(NotImplementedError, match=words):
            tnconv.compute(model, lambda y, t: y.square().sum(), x, x, [SquaredNorms()])


def test_outputs_that_are_sorted_back() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        order = x.detach().sum(1).argsort()
        return m.first(x[order])[order.argsort()]

    check(Made(forward, first=nn.Linear(3, 4)), torch.randn(4, 3), labels(4, 4))


def test_samples_among_channels_are_refused() -> None:
    model = Made(lambda m, x: m.first(x).T, first=nn.Linear(3, 4))
    with pytest.raises(NotImplementedError, match=r"in the outputs' channels \(dimension 1\)"):
        tnconv.compute(model, nn.CrossEntropyLoss(), torch.randn(5, 3), labels(4), [GGNDiagonal()])


def test_a_layer_whose_output_is_a_view() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (x.reshape(-1, 5) @ self.weight).view(*x.shape[:-1], 4)

    check(nn.Sequential(Product(), nn.Flatten()), torch.randn(6, 7, 5), labels(6, 28))


def test_bags_of_words_with_offsets() -> None:
    """The batch is as large as there are offsets, not words."""
    model = Made(
        lambda m, x, offsets: m.head(torch.tanh(m.bag(x, offsets))),
        bag=nn.EmbeddingBag(11, 4, mode="mean"), head=nn.Linear(4, 3),
    )  # fmt: skip
    x, offsets, y = torch.randint(11, (9,)), torch.tensor([0, 2, 3, 7]), labels(4)
    result = tnconv.compute(model, nn.CrossEntropyLoss(), [x, offsets], y, [PerSampleGradients()])
    assert result.samples == 4
    for n, bag in enumerate(x.tensor_split(offsets[1:])):
        loss = F.cross_entropy(model(bag, torch.zeros(1, dtype=torch.long)), y[n : n + 1]) / 4
        for (name, _), g in zip(
            model.named_parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True
        ):
            assert_close(result[PerSampleGradients][name][n], g, 1e-10)


def test_samples_along_another_dimension_of_the_inputs() -> None:
    model = Made(lambda m, x: m.head(torch.tanh(m.first(x)).mean(0)),
                 first=nn.Linear(3, 4), head=nn.Linear(4, 3))  # fmt: skip
    x, y = torch.randn(5, 4, 3), labels(4)
    turned = Made(lambda m, x: model(x.transpose(0, 1)), model=model)
    each = per_sample_gradients(turned, F.cross_entropy, x.transpose(0, 1), y, 1 / 4)
    expected = {name.removeprefix("model."): value for name, value in each.items()}
    loss = nn.CrossEntropyLoss()
    assert_first_order(tnconv.compute(model, loss, x, y, QUANTITIES, batch_dim=1), expected)
    with tnconv.observe(model, QUANTITIES, batch_dim=1) as observation:
        loss(model(x), y).backward()
    assert_first_order(observation.result(), expected)
    with pytest.raises(ValueError, match="batch_dim is -1; expected"):
        tnconv.compute(model, loss, x, y, QUANTITIES, batch_dim=-1)


def test_weights_that_are_zero_hide_no_samples() -> None:
    """At first no gradient comes before them; once they have learned, it does."""
    first, gate, head = nn.Linear(3, 3), nn.Parameter(torch.zeros(())), nn.Linear(3, 3)
    nn.init.zeros_(head.weight)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = x.transpose(0, 1) * 2
        y = y + m.gate * torch.tanh(m.first(y))
        return m.head(y.sum(0))

    model = Made(forward, first=first, gate=gate, head=head)
    for _ in range(3):
        x, y = torch.randn(4, 4, 3), labels(4)
        check(model, x, y)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))


MIXING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "similarity": lambda m, x: m.first(x) @ m.first(x).T,
    "centred": lambda m, x: m.first(x) - m.first(x).mean(0),
    "softmax over samples": lambda m, x: m.first(x).softmax(0),
    "neighbours": lambda m, x: torch.ones(5, 5) @ torch.tanh(m.first(x)),
    "detached": lambda m, x: m.first(2 * x) - m.first(2 * x).mean(0).detach(),
}


@pytest.mark.parametrize("case", MIXING)
def test_samples_that_see_each_other_are_refused(case: str) -> None:
    model, x = Made(MIXING[case], first=nn.Linear(3, 3)), torch.randn(5, 3)
    with pytest.raises(NotImplementedError, match="samples see each other"):
        tnconv.compute(model, lambda y, t: y.square().sum(), x, x, [SquaredNorms()])
    with (
        pytest.raises(NotImplementedError, match="samples see each other"),
        tnconv.observe(model, [SquaredNorms()]),
    ):
        model(x)
    assert hooks(model) == 0
    tnconv.compute(model, lambda y, t: y.square().sum(), x, x, [Gradient()])


def test_pairs_of_a_batch_and_a_set_that_all_samples_see() -> None:
    """Two inputs of as many rows: one is the batch, or both are and see each other."""
    layers = {"one": nn.Linear(3, 4), "other": nn.Linear(3, 4)}
    grid = Made(lambda m, x, grid: torch.tanh(m.one(x) + m.other(grid)).sum(1), **layers)
    rows, x, other = torch.randn(4, 4, 3), torch.randn(4, 3), torch.randn(4, 3)
    loss = F.mse_loss
    found = tnconv.compute(grid, loss, [rows, other], torch.zeros(4, 4), [PerSampleGradients()])
    for n in range(4):
        value = loss(grid(rows[n : n + 1], other), torch.zeros(1, 4)) / 4
        for (name, _), g in zip(
            grid.named_parameters(), torch.autograd.grad(value, [*grid.parameters()]), strict=True
        ):
            assert_close(found[PerSampleGradients][name][n], g, 1e-10)
    for turned in (False, True):
        order = (1, 0) if turned else (0, 1)
        pairs = Made(lambda m, x, z, o=order: (m.one(x) @ m.other(z).T).permute(o), **layers)
        with pytest.raises(NotImplementedError, match="samples see each other"):
            tnconv.compute(pairs, loss, [x, other], torch.zeros(4, 4), [SquaredNorms()])


LOSSES: dict[str, tuple[bool, Callable[[Tensor, Tensor], Tensor]]] = {
    "root of the mean": (True, lambda y, t: (y - t).square().mean().sqrt()),
    "overlap": (True, lambda y, t: 1 - (y.sigmoid() * t).sum() / (y.sigmoid() + t).sum()),
    "contrastive": (True, lambda y, t: F.cross_entropy(y @ y.T, torch.arange(len(y)))),
    "correlation": (True, lambda y, t: -torch.corrcoef(torch.stack([y[:, 0], t[:, 0]]))[0, 1]),
    "mean": (False, lambda y, t: (y - t).abs().pow(1.5).mean()),
    "weighted": (False, lambda y, t: ((y - t).square() * t).sum() / t.sum()),
    "random": (False, lambda y, t: (F.dropout(y, 0.5) - t).square().sum()),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_that_couple_samples_are_refused(case: str) -> None:
    couples, loss_fn = LOSSES[case]
    model, x, y = nn.Linear(3, 4), torch.randn(5, 3), torch.rand(5, 4)
    for _ in range(2):
        if couples:
            with pytest.raises(NotImplementedError, match="the loss couples samples"):
                tnconv.compute(model, loss_fn, x, y, [SquaredNorms()])
        else:
            tnconv.compute(model, loss_fn, x, y, [SquaredNorms()])
        tnconv.compute(model, loss_fn, x, y, [Gradient()])
    assert hooks(model) == 0


def test_losses_that_read_parameters_by_themselves_are_refused() -> None:
    model, x, y = nn.Linear(3, 4), torch.randn(5, 3), labels(5)

    def decayed(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets) + model.weight.square().sum()

    with pytest.raises(NotImplementedError, match="the loss reads parameter 'weight' by itself"):
        tnconv.compute(model, decayed, x, y, [SquaredNorms()])


def test_outputs_without_samples() -> None:
    """They are refused once a gradient comes from them to some layer."""
    layers = {"one": nn.Linear(3, 2), "other": nn.Linear(3, 2)}
    bank = torch.randn(4, 3)
    model = Made(lambda m, x: (m.one(x), m.other(bank)), **layers)
    x = torch.randn(4, 3)
    result = tnconv.compute(model, lambda y, t: y[0].square().sum(), x, x, [SquaredNorms()])
    assert result[SquaredNorms].keys() == {"one.weight", "one.bias"}
    with pytest.raises(NotImplementedError, match="tells samples apart"):
        tnconv.compute(model, lambda y, t: (y[0] + y[1]).square().sum(), x, x, [SquaredNorms()])
    scalar = Made(lambda m, x: m.one(x).square().sum(), one=layers["one"])
    with pytest.raises(NotImplementedError, match="no dimension of the model's outputs"):
        tnconv.compute(scalar, lambda y, t: y, x, x, [SquaredNorms()])


def test_dropout_and_state_are_those_of_the_users_pass() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 3))
    x, y = torch.randn(6, 3), labels(6)
    torch.manual_seed(3)
    F.cross_entropy(model(x), y).backward()
    after = torch.rand(2)
    torch.manual_seed(3)
    result = tnconv.compute(model, F.cross_entropy, x, y, [Gradient(), PerSampleGradients()])
    assert torch.equal(torch.rand(2), after)
    for name, parameter in model.named_parameters():
        assert_close(result[PerSampleGradients][name].sum(0), parameter.grad, 1e-10)


def test_running_again_leaves_a_model_as_it_was() -> None:
    """Buffers, counters and caches of modules; here, nothing reads the input itself."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls = getattr(m, "calls", 0) + 1
        m.total += x.detach().sum()
        return m.first(x * 2) * m.total.detach().clone().clamp(1, 1)

    model = Made(forward, first=nn.Linear(3, 2))
    model.register_buffer("total", torch.zeros(()))
    x, state = torch.randn(4, 3), torch.get_rng_state()
    tnconv.compute(model, F.mse_loss, x, torch.zeros(4, 2), [SquaredNorms()])
    assert model.calls == 1
    assert_close(model.total, x.sum(), 1e-12)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Notes every coded pass."""
    seen: list[bool] = []
    send = CodedPasses._arrived

    def noted(self: Any, *args: Any) -> Any:
        seen.append(True)
        return send(self, *args)

    monkeypatch.setattr(CodedPasses, "_arrived", noted)
    return seen


def test_evidence_is_kept_for_each_signature(passes: list[bool]) -> None:
    """Two passes at the first batch, for all sizes; two more when a check is due."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    with tnconv.observe(model, [SquaredNorms()]) as observation:
        for step in range(samples.EVERY + 1):
            n = 2 + step % 3
            F.cross_entropy(model(torch.randn(n, 3)), labels(n)).backward()
            observation.result()
            assert len(passes) == (2 if step < samples.EVERY else 4)
        model.eval()
        F.cross_entropy(model(torch.randn(2, 3)), labels(2)).backward()
        assert len(passes) == 6


def test_meeting_points_are_kept_for_each_graph(passes: list[bool]) -> None:
    model = Made(
        lambda m, x: m.head(torch.tanh(m.words(x) + m.places(torch.arange(x.shape[1]))).sum(1)),
        words=nn.Embedding(11, 5), places=nn.Embedding(8, 5), head=nn.Linear(5, 3),
    )  # fmt: skip
    for step in range(4):
        n, t = 2 + step % 3, 3 + step % 2
        tnconv.compute(model, F.cross_entropy, words(n, t), labels(n), [SquaredNorms()])
        assert len(passes) == 1


def test_nothing_is_asked_where_samples_stay_together(passes: list[bool]) -> None:
    model, x, y = nn.Linear(3, 4), torch.randn(5, 3), labels(5)
    tnconv.compute(model, F.cross_entropy, x, y, [Gradient()])
    tnconv.compute(model, F.cross_entropy, x[:1], y[:1], [SquaredNorms()])
    assert not passes


def test_a_layout_that_changes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By other operations at once; by codes when it is their turn."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = x.permute(m.order)
        z = torch.tanh(m.first(y.flatten(0, 1))).unflatten(0, y.shape[:2])
        return m.head((z.transpose(0, 1) if m.turned else z.permute(m.order)).mean(1))

    model = Made(forward, first=nn.Linear(3, 4), head=nn.Linear(4, 3))
    model.order, model.turned = (0, 1, 2), False
    check(model, torch.randn(3, 3, 3), labels(3))
    model.order, model.turned = (1, 0, 2), True
    check(model, torch.randn(3, 3, 3), labels(3))
    monkeypatch.setattr(samples, "EVERY", 1)
    model.turned = False
    check(model, torch.randn(3, 3, 3), labels(3))


def test_kinds_of_batches_are_forgotten(passes: list[bool]) -> None:
    """A model whose operations differ from batch to batch fills no memory."""
    model = Made(
        lambda m, x: m.head(m.chain(m.first(x))), first=nn.Linear(3, 3), head=nn.Linear(3, 3)
    )
    for count in range(samples.MOST_KINDS + 2):
        model.chain = lambda y, count=count: (
            [y := y.tanh() for _ in range(count)][-1] if count else y
        )
        check(model, torch.randn(2, 3), labels(2))
    assert len(samples._KNOWN[model]) == samples.MOST_KINDS


def test_a_loss_that_comes_to_couple_samples_is_noticed() -> None:
    """By what it is told, whatever else is the same."""

    class Penalised(nn.Module):
        weight = 0.0

        def forward(self, y: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(y, t) + self.weight * y.mean(0).square().sum()

    model, x, y, loss_fn = nn.Linear(3, 3), torch.randn(4, 3), labels(4), Penalised()

    def closed(weight: float) -> Any:
        return lambda y, t: F.cross_entropy(y, t) + weight * y.mean(0).square().sum()

    for losses in ((loss_fn, loss_fn), (closed(0.0), closed(0.5))):
        tnconv.compute(model, losses[0], x, y, [SquaredNorms()])
        loss_fn.weight = 0.5
        with pytest.raises(NotImplementedError, match="the loss couples samples"):
            tnconv.compute(model, losses[1], x, y, [SquaredNorms()])


def test_half_precision() -> None:
    """Codes scale exactly: gradients that are rounded say the same."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.first(x.transpose(0, 1).flatten(0, 1)).relu().unflatten(0, (-1, len(x)))
        return m.head(y.mean(0))

    model = Made(forward, first=nn.Linear(3, 4), head=nn.Linear(4, 3)).to(torch.bfloat16)
    x, y = torch.randn(6, 6, 3, dtype=torch.bfloat16), labels(6)
    result = tnconv.compute(model, F.cross_entropy, x, y, [PerSampleGradients()])
    exact = model.double()
    each = per_sample_gradients(exact, F.cross_entropy, x.double(), y, 1 / 6)
    for name, expected in each.items():
        found = result[PerSampleGradients][name].double()
        assert (found - expected).abs().max() < 0.02 * expected.abs().max() + 1e-3


def looks(g: Tensor, coded: Tensor, codes: Codes) -> list[Any]:
    """What is told by whole gradients, and by sums of them."""
    pairs = [(Whole(g), Whole(coded))]
    pairs += [tuple(Sketch.of(x, 4, True, None) for x in (g, coded))]
    return [judged(*pair, codes) for pair in pairs]


@pytest.mark.parametrize("noise", [0.0, 1e-9])
@pytest.mark.parametrize("found", [Batch(0), Batch(1), Fold(1, 2, "nt"), Fold(1, 2, "tn")])
def test_codes_tell_rows(found: Batch | Fold, noise: float) -> None:
    """To the last bit, or but for rounding; the first dimension alone can leave it open."""
    shape = (4, 8, 3) if isinstance(found, Fold) else (4, 4, 3)
    codes, g = Codes.drawn(4, 1), torch.randn(shape)
    coded = codes.applied(g, found) * (1 + noise * torch.randn(shape))
    assert looks(g, coded, codes) == [(found, True)] * 2
    first = judged(*(Sketch.of(x, 4, False, None) for x in (g, coded)), codes)
    assert first == ((found, True) if not noise and found.dim == 0 else None)
    asked = judged(*(Sketch.of(x, 4, False, found.dim) for x in (g, coded)), codes)
    assert asked == (None if noise else (found, True))


def test_one_wrong_entry_is_seen() -> None:
    """Also one of those that are not looked at one by one."""
    codes, g = Codes.drawn(4, 1), torch.randn(4, 5, 64)
    for at in (0, 1, 100, 101, 1279):
        coded = codes.applied(g, Batch(0))
        coded.view(-1)[at] *= 1.001
        assert all(found != (Batch(0), True) for found in looks(g, coded, codes)), at


def test_codes_tell_what_is_shared_or_not_said() -> None:
    codes, each = Codes.drawn(4, 1), torch.randn(4, 5, 4, 4)
    sums = (each.sum(0), codes.applied(each, Batch(0)).sum(0))
    assert looks(*sums, codes) == [(Shared(), True)] * 2
    g = torch.randn(5, 4, 4)
    rows = g * torch.from_numpy(codes.array)[torch.tensor([2, 0, 3, 1])][:, None]
    assert all(isinstance(found[0], Unknown) for found in looks(g, rows, codes))
    nothing = torch.zeros(4, 3)
    assert looks(nothing, nothing, codes) == [(Silent(), False)] * 2
    assert judged(None, None, codes) == (Silent(), False)
    one = torch.randn(4, 4) * torch.tensor([0.0, 1, 0, 0])[:, None]
    assert looks(one, codes.applied(one, Batch(0)), codes) == [(Batch(0), False)] * 2


def test_what_one_pass_shows_is_confirmed(
    passes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess that is wrong costs two more passes, and no result."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x, guess, wrong = torch.randn(4, 3), coded_passes.predicted, list[Any]()

    def guessed(coded: Any, codes: Codes) -> Any:
        found = guess(coded, codes)
        places = [at for at, each in enumerate(coded) if each.shape == (4, 4)]
        if places and not wrong:
            wrong.append(True)
            found[places[0]] = Prediction(Batch(1), 1)
        return found

    monkeypatch.setattr(coded_passes, "predicted", guessed)
    check(model, x, labels(4))
    assert wrong and len(passes) == 3
    check(model, x, labels(4))
    assert len(passes) == 3


@pytest.mark.parametrize("hidden", [0, 1])
def test_samples_that_see_another_are_refused_whichever_is_hidden(
    hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass with a code of zero cannot tell that a sample alone sees the other one."""
    monkeypatch.setattr(coded_passes, "_seeds", iter(range(100)))
    drawn = Codes.drawn

    def fixed(samples: int, seed: int, *args: Any, hiding: bool = False) -> Codes:
        codes = drawn(samples, seed, *args)
        if hiding:
            codes.array[:] = 2
            codes.array[hidden] = 0
        return codes

    monkeypatch.setattr(Codes, "drawn", fixed)
    model = Made(
        lambda m, x: m.head(m.first(x) + torch.stack([m.first(x)[1] ** 2, 0 * m.first(x)[0]])),
        first=nn.Linear(3, 4), head=nn.Linear(4, 3),
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="samples see each other"):
        tnconv.compute(model, F.cross_entropy, torch.randn(2, 3), labels(2), [SquaredNorms()])
