"""Low-rank matrices within memory limits: the same results, and refusals before any work."""

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import tnconv
from tests.ntk.drawn import Network, networks
from tests.operators.test_low_rank import case, close, flat
from tests.quick_programs import quick_programs
from tnconv.diagrams.errors import TooLittleMemory
from tnconv.models.propagation import Propagation
from tnconv.operators.low_rank import gram_plans, low_rank_ggn, noise_aware
from tnconv.operators.low_rank.rows import JacobianRows
from tnconv.operators.low_rank.sent_rows import SentRows

pytestmark = pytest.mark.usefixtures("float64")
SUBSETS = [{}, {"curvature_samples": [0]}, {"gradient_samples": [0], "curvature_samples": [0]}]


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """No search for programs, nor for orders: which ones there are is tested elsewhere."""
    with quick_programs(), patch.object(gram_plans, "worth_trying", lambda network: ()):
        yield


def least(*args: Any, **how: Any) -> int:
    """The limit that errors name: of gradients of other samples first, then of all."""
    limit = 1
    for _ in range(3):
        try:
            low_rank_ggn(*args, memory_limit=limit, **how)
        except TooLittleMemory as error:
            assert f"memory_limit is {limit} bytes; expected at least {error.least}" in str(error)
            limit = error.least
        else:
            break
    return limit


@settings(max_examples=settings().max_examples // 8)
@given(
    case=networks(),
    how=st.sampled_from(SUBSETS),
    groups=st.sampled_from(["network", "parameter"]),
    fisher=st.sampled_from(["type-2", "mc"]),
    times=st.sampled_from([1.0, 1.0, 1.5, 4.0, 100.0]),
)
def test_results_are_the_same(
    case: tuple[Network, Tensor], how: dict[str, Any], groups: str, fisher: str, times: float
) -> None:
    """From two vectors at a time, at the least limit, to all of them, held after all layers."""
    model, x = case
    targets = torch.randint(model.outputs[0], (len(x), *model.outputs[1:]))
    args = model, nn.CrossEntropyLoss(), x, targets
    how = {**how, "groups": groups, "fisher": fisher, "samples": 3}

    def ggn(limit: int | None = None) -> tnconv.LowRankGGN:
        generator = torch.Generator().manual_seed(0)
        return low_rank_ggn(*args, generator=generator, memory_limit=limit, **how)

    compare(ggn(int(times * least(*args, **how))), ggn())


def compare(found: tnconv.LowRankGGN, expected: tnconv.LowRankGGN) -> None:
    """All that is made of rows, by products of every kind."""
    vector = torch.rand(found.shape[0])
    close(found.eigvalsh(), expected.eigvalsh())
    close(found @ vector, expected @ vector)
    close(found.solve(vector, 0.1), expected.solve(vector, 0.1))
    close(flat(found.gradient()), flat(expected.gradient()))
    close(flat(found.diagonal()), flat(expected.diagonal()))
    directions = {name: torch.rand(3, *p.shape) for name, p in expected.like.items()}
    for name, block in expected.blocks.items():
        own, same = {n: directions[n] for n in block.rows.like}, found.blocks[name]
        close(same.gram, block.gram)
        values = block.eigvalsh()
        k = int((values > 1e-6 * values[0]).sum()) if len(values) else 0
        pairs = same.eigh(k) if k else None
        for along, by_name in ((own, own), *([(pairs, pairs.vectors)] if pairs else [])):
            one, other = same.directional_derivatives(along), block.directional_derivatives(by_name)
            close(one.slopes, other.slopes)
            close(one.curvatures, other.curvatures)
        if pairs:
            every = flat(pairs.vectors, 1)
            close(every @ every.T, torch.eye(k))
            close(flat(same.newton_step(0.1, k)), flat(block.newton_step(0.1, k)))


@pytest.mark.parametrize("network", ["normalised", "residual", "words", "dead"])
def test_networks(network: str) -> None:
    args = case(network)
    compare(low_rank_ggn(*args, memory_limit=least(*args)), low_rank_ggn(*args))


def test_samples_that_are_not_in_front() -> None:
    """Sequences first: rows of the output are no samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x, targets = torch.rand(5, 2, 3), torch.rand(5, 2, 3)
    args, how = (model, nn.MSELoss(reduction="sum"), x, targets), {"batch_dim": 1}
    limit = least(*args, **how)
    compare(low_rank_ggn(*args, memory_limit=limit, **how), low_rank_ggn(*args, **how))


def test_how_rows_are_had() -> None:
    """By the limit: vectors are held, or sent all at once, or in ever more blocks."""
    args = problem()
    limit = least(*args)
    counts = []
    for times in (1, 2, 3, 1000):
        rows = low_rank_ggn(*args, memory_limit=times * limit).block.rows
        counts.append(rows.source.schedule.at_a_time if isinstance(rows, SentRows) else None)
    assert counts[0] == 2 < counts[1] < counts[2] < 11 and counts[3] is None
    assert isinstance(rows, JacobianRows) and rows.memory_limit < 1000 * limit


def problem() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(16, 8, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 12)),
    )
    return model, nn.CrossEntropyLoss(), torch.rand(4, 3, 16, 16), torch.randint(12, (4,))


def peak(function: Callable[[], object]) -> int:
    """The most bytes that tensors and kernels hold at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = [each for each in seen.profiler.kineto_results.events() if each.name() == "[memory]"]
    changes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    return max(accumulate(changes))


@pytest.mark.parametrize("times", [1, 3])
def test_peaks(times: int) -> None:
    """A Gram matrix and a product, beside what the forward pass holds, in single precision."""
    torch.set_default_dtype(torch.float32)
    args = model, _, x, _ = problem()
    limit = times * least(*args)
    ggn = low_rank_ggn(*args, memory_limit=limit)
    assert isinstance(ggn.block.rows, SentRows)
    vector, alone = torch.rand(ggn.shape[0]), peak(lambda: model(x))
    for product in (lambda: ggn.gram, lambda: ggn @ vector):
        assert peak(product) - alone <= limit


def test_too_little_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    args = case("strided")
    limit = least(*args)

    def sent(*given: Any) -> None:
        raise AssertionError("vectors were sent")

    monkeypatch.setattr(Propagation, "_send", sent)
    for how in ({}, {"gradient_samples": [0]}):
        with pytest.raises(ValueError, match=r"memory_limit is 100 bytes; expected at least \d+"):
            low_rank_ggn(*args, memory_limit=100, **how)
    with pytest.raises(TooLittleMemory, match=f"expected at least {limit}, for 2 vectors of 5"):
        low_rank_ggn(*args, memory_limit=limit - 1)
    with pytest.raises(ValueError, match="memory_limit is 0; expected a positive number"):
        low_rank_ggn(*args, memory_limit=0)
    model, loss_fn, x, targets = args
    with tnconv.observe_low_rank(model, memory_limit=100) as observation:
        output = model(x)
        with pytest.raises(ValueError, match="memory_limit is 100 bytes; expected at least"):
            observation.ggn(loss_fn, output, targets)


@pytest.mark.parametrize("subsets", [(None, None), ([1, 3], [1, 3]), ([0], [2, 1])], ids=str)
def test_vectors_of_a_loop_are_held(subsets: tuple[Any, Any]) -> None:
    model, loss_fn, x, targets = case("residual")
    found = []
    for limit in (None, 10**6):
        with tnconv.observe_low_rank(model, memory_limit=limit) as observation:
            found.append(observation.ggn(loss_fn, model(x), targets, *subsets))
    compare(*found)
    assert 0 < found[1].block.rows.memory_limit < 10**6


def test_what_changed_meanwhile_is_noticed() -> None:
    model, _, x, _ = args = case("strided")
    limit = least(*args)
    for change in (model.eval, lambda: x.mul_(2), lambda: nn.init.ones_(model[0].weight)):
        ggn = low_rank_ggn(*args, memory_limit=limit)
        change()
        with pytest.raises(RuntimeError, match="changed since low_rank_ggn"):
            ggn.eigvalsh()


def test_random_layers_repeat() -> None:
    """Dropout drops the same entries whenever the model runs again, and draws go on after."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
    args = model, nn.CrossEntropyLoss(), torch.rand(4, 4), torch.randint(3, (4,))
    limit = least(*args)
    torch.manual_seed(1)
    expected = low_rank_ggn(*args)
    after = torch.rand(2)
    torch.manual_seed(1)
    found = low_rank_ggn(*args, memory_limit=limit)
    compare(found, expected)
    torch.manual_seed(1)
    found = low_rank_ggn(*args, memory_limit=limit)
    found.gram  # noqa: B018
    assert torch.equal(torch.rand(2), after)


def test_noise_aware_steps_within_a_limit() -> None:
    args = case("strided")
    steps = [
        low_rank_ggn(*args, memory_limit=limit).newton_step(
            noise_aware(20, generator=torch.Generator().manual_seed(0)), 3
        )
        for limit in (None, least(*args))
    ]
    close(flat(steps[1]), flat(steps[0]))
