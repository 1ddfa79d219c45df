"""Vectors that go backwards together, against autograd's engine, one by one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from tests.strategies import assert_close
from tnconv.recursions import Rows, column_plan, columns_walk
from tnconv.recursions.column_step import _RULES
from tnconv.recursions.step import operation

pytestmark = pytest.mark.usefixtures("float64")
SAMPLES = 4
Function = Callable[[Tensor], Tensor]
CONSTANT = torch.rand(SAMPLES, 3, 6, 6, dtype=torch.float64) + 0.5
IMAGES: dict[str, Function] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "in place": lambda x: F.relu_(x * 2),
    "leaky": F.leaky_relu,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "power": lambda x: (x * x + 1) ** 1.5,
    "difference": lambda x: x.sin() - 2 * x,
    "gate": lambda x: x * x.sigmoid() + CONSTANT,
    "constants": lambda x: x * CONSTANT / CONSTANT[:1] * CONSTANT[0],
    "residual": lambda x: x + F.softplus(x) + 1,
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "adaptive max pool": lambda x: F.adaptive_max_pool2d(x, 2),
    "max pool in one dimension": lambda x: F.max_pool1d(x.flatten(2), 2),
    "max pool of relu": lambda x: F.max_pool2d(F.relu(x), 3, 2, 1),
    "adaptive max pool of relu": lambda x: F.adaptive_max_pool2d(F.relu(x), (2, 3)),
    "max pool beside relu": lambda x: F.max_pool2d(y := F.relu(x), 3, 1, 1) + y,
    "average pool": lambda x: F.avg_pool2d(x, 2),
    "padded": lambda x: F.pad(x, (1, 0, 0, 2)),
    "reflected": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "upsampled": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "mean": lambda x: torch.relu(x.mean((2, 3), keepdim=True)) * 2,
    "sums": lambda x: x.sum(-1).mean(1),
    "softmax": lambda x: x.softmax(1),
    "log-softmax": lambda x: x.flatten(1).log_softmax(-1),
    "turned": lambda x: x.transpose(1, 3).permute(0, 2, 1, 3).flatten(2).squeeze(1),
    "attention": lambda x: torch.bmm(x.flatten(2).softmax(-1), x.flatten(2).transpose(1, 2)),
    "heads": lambda x: torch.bmm(x.flatten(0, 1), x.flatten(0, 1)).reshape(SAMPLES, -1),
    "concatenated": lambda x: torch.cat([x, x.tanh(), 2 * x], 1),
    "sequence": lambda x: x.flatten(2).transpose(1, 2) @ torch.ones(3, 2),
    "single precision": lambda x: x.float().tanh().double(),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(3, 4, 3, 2, 1, dilation=2),
    "strided": lambda: nn.Conv2d(3, 4, 2, 3, bias=False),
    "groups": lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3),
    "transposed": lambda: nn.ConvTranspose2d(3, 2, 3, 2, output_padding=1),
    "dilated twice": lambda: nn.Conv2d(3, 2, 2, 1, 2, dilation=3),
    "batch norm": lambda: nn.BatchNorm2d(3).eval(),
    "bare batch norm": lambda: nn.BatchNorm2d(3, affine=False).eval(),
    "layer norm": lambda: nn.LayerNorm((6, 6)),
    "bare layer norm": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 3)),
    "rows": lambda: nn.Linear(6, 2),
    "no bias": lambda: nn.Linear(6, 2, bias=False),
    "dropout": lambda: nn.Dropout(0.3),
}


def cases() -> dict[str, Function]:
    torch.manual_seed(0)
    return IMAGES | {name: make() for name, make in LAYERS.items()}


def check(
    function: Function, x: Tensor, chosen: list[int] | None, block: int | None = None
) -> None:
    """Three vectors, with zeros at the samples that are left out; in blocks of samples."""
    x = x.requires_grad_()
    before = x * 1  # a value inside a graph
    y = function(before)
    edge = get_gradient_edge(before)
    plan = column_plan(get_gradient_edge(y), [(edge.node, edge.output_nr)], SAMPLES)
    assert plan is not None, y.grad_fn
    rows = Rows(SAMPLES, None if chosen is None else torch.tensor(chosen))
    part = torch.randn(3, *y.shape, dtype=y.dtype)
    whole = torch.zeros_like(part)
    at = range(SAMPLES) if chosen is None else chosen
    whole[:, at] = part[:, at]
    expected = [torch.autograd.grad(y, before, v, retain_graph=True)[0] for v in whole]
    parts: dict[int, Tensor] = {}
    given = rows.of(part, 1)
    kept = given.clone()

    def take(v: Tensor, of: Rows) -> None:
        assert of.begin not in parts and v.shape[1] * SAMPLES == of.count * len(before)
        parts[of.begin] = v

    plan.send(given, rows, {(edge.node, edge.output_nr): take}, block)
    found = torch.cat([parts[begin] for begin in sorted(parts)], 1)
    assert_close(found, torch.stack(expected)[:, at], 1e-10 if y.dtype == before.dtype else 1e-5)
    assert torch.equal(given, kept)
    assert len(parts) == (SAMPLES if block == 1 and chosen is None else len(parts))


@pytest.mark.parametrize("chosen", [None, [0, 1], [2], [3, 0]], ids=str)
def test_operations(chosen: list[int] | None) -> None:
    torch.manual_seed(1)
    for function in cases().values():
        check(function, torch.randn(SAMPLES, 3, 6, 6), chosen)


@pytest.mark.parametrize("chosen", [None, [3, 0]], ids=str)
def test_large_vectors_go_a_few_at_a_time(
    chosen: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one vector is large already, and where two are."""
    torch.manual_seed(1)
    for function in cases().values():
        x = torch.randn(SAMPLES, 3, 6, 6)
        for large in (1, 2 * function(x).nbytes):
            monkeypatch.setattr(columns_walk, "LARGE", large)
            check(function, x, chosen)


def test_samples_go_block_by_block() -> None:
    """One by one, and from where a value is large."""
    torch.manual_seed(1)
    for function in cases().values():
        x = torch.randn(SAMPLES, 3, 6, 6)
        for block in (1, x.nbytes // 2, 2 * x.nbytes, 2 * function(x).nbytes):
            check(function, x, None, block)
    assert len(Rows(7).blocks(3)) == 3 and len(Rows(7, range(2, 7)).blocks(9)) == 5


def test_values_between_two_operations_are_taken_as_they_are() -> None:
    """After ReLU vectors are no zeros where all of a window is negative, before it they are."""
    torch.manual_seed(2)
    x = torch.randn(SAMPLES, 3, 6, 6)
    x[:, 0] = -x[:, 0].abs()
    before = x.requires_grad_() * 1
    active = F.relu(before)
    y = F.max_pool2d(active, 3, 2, 1)
    values = active, before
    ends = [(edge.node, edge.output_nr) for edge in map(get_gradient_edge, values)]
    plan = column_plan(get_gradient_edge(y), ends, SAMPLES)
    assert plan is not None
    vectors, found = torch.randn(2, *y.shape), dict[tuple[Node, int], Tensor]()
    plan.send(vectors, Rows(SAMPLES), {end: lambda v, _, end=end: found.update({end: v})
                                       for end in ends})  # fmt: skip
    expected = [torch.autograd.grad(y, values, v, retain_graph=True) for v in vectors]
    for end, each in zip(ends, zip(*expected, strict=True), strict=True):
        assert_close(found[end], torch.stack(each))
    assert found[ends[0]][:, :, 0].any() and not found[ends[1]][:, :, 0].any()


def _keeps_shape(name: str) -> bool:
    return cases()[name](torch.rand(SAMPLES, 3, 6, 6)).shape == (SAMPLES, 3, 6, 6)


CHAINED = [name for name in IMAGES | LAYERS if _keeps_shape(name) and name != "single precision"]


@given(names=st.lists(st.sampled_from(CHAINED), min_size=2, max_size=5),
       chosen=st.lists(st.integers(0, SAMPLES - 1), min_size=1, unique=True) | st.none(),
       skips=st.booleans(), block=st.sampled_from([None, 1, 2000, 10000]))  # fmt: skip
def test_random_graphs(
    names: list[str], chosen: list[int] | None, skips: bool, block: int | None
) -> None:
    """What one rule may change in place, another one still reads."""
    functions = cases()

    def added(x: Tensor) -> Tensor:
        values = [x]
        for name in names:
            values.append(functions[name](values[-1]))
            if skips:
                values[-1] = values[-1] + values[len(values) // 2 - 1]
        return values[-1] + values[-2]

    torch.manual_seed(len(names))
    check(added, torch.randn(SAMPLES, 3, 6, 6), chosen, block)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(0),
        lambda x: x.flip(0),
        lambda x: x.transpose(0, 1).reshape(SAMPLES, -1),
        lambda x: x.softmax(0),
        lambda x: F.conv2d(x.transpose(0, 1).reshape(1, -1, 6, 6), torch.ones(4, 12, 1, 1)),
        lambda x: x.cumsum(0),
        lambda x: torch.cat([x, x]),
        lambda x: x[1:],
    ],
)
def test_no_plan_where_samples_may_move(function: Function) -> None:
    x = torch.rand(SAMPLES, 3, 6, 6).requires_grad_()
    before = x * 1
    edge = get_gradient_edge(before)
    ends = [(edge.node, edge.output_nr)]
    assert column_plan(get_gradient_edge(function(before)), ends, SAMPLES) is None


def test_every_rule_has_an_example() -> None:
    seen = set[str]()
    for function in cases().values():
        x = torch.rand(SAMPLES, 3, 6, 6).requires_grad_()
        waiting = [get_gradient_edge(function(x)).node]
        while waiting:
            node = waiting.pop()
            seen.add(operation(node))
            waiting += [below for below, _ in node.next_functions if below is not None]
    functions = {rule for name, (rule, _) in _RULES.items() if name in seen}
    assert {rule for rule, _ in _RULES.values()} == functions
