"""Whatever losses and backward passes a step has, its numbers are of the gradient at its end."""

import copy
from contextlib import ExitStack, nullcontext, suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.monitor.oracle import Oracle, chain
from tnconv.monitor import HessTrace, Monitor

pytestmark = pytest.mark.usefixtures("float64")
KINDS = ["Loss", "NormTest", "InnerTest", "OrthoTest", "MeanGSNR", "EarlyStopping"]


def batch(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, 4, 4, generator=generator)
    return x, torch.randint(3, (samples,), generator=generator)


def expect(record: dict[str, Any], oracle: Oracle) -> None:
    values = oracle.values()
    for name in KINDS:
        assert record[name] == pytest.approx(float(values[name]), rel=1e-8, abs=1e-9), name
    if "HessTrace" in record:
        trace = float(oracle.ggn(oracle.loss_fn).trace())
        assert sum(record["HessTrace"]) == pytest.approx(trace)


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda s: sum(s) > 1),
    mean=st.booleans(),
    attached=st.booleans(),
    scale=st.sampled_from([1.0, 64.0]),
    left=st.booleans(),
    unused=st.booleans(),
    dropped=st.sampled_from(["no", "to none", "to zero", "in forward", "in backward"]),
    together=st.booleans(),
    again=st.booleans(),
    alone=st.booleans(),
)
def test_what_counts(
    sizes: list[int],
    mean: bool,
    attached: bool,
    scale: float,
    left: bool,
    unused: bool,
    dropped: str,
    together: bool,
    again: bool,
    alone: bool,
) -> None:
    """Gradients that were there before, zeroed ones, losses that nothing goes back from.

    Args:
        sizes: of micro-batches.
        mean: whether the loss is one, or a sum.
        attached: to the optimizer, or around the step.
        scale: of mixed precision.
        left: gradients are there before.
        unused: a loss is only looked at.
        dropped: how a batch before is dropped.
        together: one backward pass for all micro-batches.
        again: a second step follows.
        alone: only the loss is measured.
    """
    torch.manual_seed(len(sizes))
    model, other = chain(), nn.CrossEntropyLoss()
    loss_fn = nn.CrossEntropyLoss(reduction="mean" if mean else "sum")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trace = [HessTrace("diag_ggn_exact")] if dropped == "no" and not unused else []
    names: list[Any] = ["Loss"] if alone else [*KINDS, *trace]
    monitor = Monitor(model, loss_fn, names, scaler=scaler)
    if left and not attached:
        other(model(batch(3, 9)[0]), batch(3, 9)[1]).backward()
    if attached:
        monitor.attach(optimizer)
    oracles = []
    for step in range(1 + again):
        with nullcontext() if attached else monitor.step():
            if not left or step or attached:
                optimizer.zero_grad()
            if dropped != "no":
                drop(model, loss_fn, optimizer, dropped, scaler)
            x, y = batch(sum(sizes), step)
            oracles.append(Oracle(copy.deepcopy(model), other, x, y))
            losses = []
            for at in torch.arange(len(x)).split(sizes):
                if unused:
                    loss_fn(model(x[:2]), y[:2])
                loss = loss_fn(model(x[at]), y[at])
                losses.append(scaler.scale(loss * len(at) / len(x) if mean else loss))
                if not together:
                    losses[-1].backward()
            if together:
                sum(losses[1:], losses[0]).backward()
            optimizer.step()
            if not attached and again:
                optimizer.zero_grad(set_to_none=mean)
    assert [record["step"] for record in monitor.records] == [*range(1 + again)]
    for record, oracle in zip(monitor.records, oracles, strict=True):
        assert record["Loss"] == pytest.approx(float(oracle.losses().mean()))
        assert (bool(trace) and not alone) == ("HessTrace" in record)
        assert (
            "NormTest" in record or alone or dropped == "in backward"
        )  # it is not known how far it came
        if "NormTest" in record:
            expect(record, oracle)


def drop(model: nn.Module, loss_fn: nn.Module, optimizer: Any, how: str, scaler: Any) -> None:
    """A batch that does not count in the end."""

    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise FloatingPointError

    x, y = batch(3, 7)
    layer: Any = model[0]
    with suppress(FloatingPointError), ExitStack() as stack:
        if how == "in backward":
            hook = layer.register_forward_hook(lambda module, args, out: Raises.apply(out))
            stack.callback(hook.remove)
        out = model(x)
        if how == "in forward":
            loss_fn(out, y)
            raise FloatingPointError
        scaler.scale(loss_fn(out, y)).backward()
    optimizer.zero_grad(set_to_none=how != "to zero")


class Heads(nn.Module):
    """A network with an output of each of several depths."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.body, self.heads = chain(), nn.ModuleList(nn.Linear(3, 3) for _ in range(count))

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.body(x)
        return [head(y) for head in self.heads]


@settings(max_examples=15)
@given(
    weights=st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=2, max_size=3),
    micro=st.sampled_from([1, 2]),
    mean=st.booleans(),
    alone=st.booleans(),
)
def test_terms_of_a_loss(weights: list[float], micro: int, mean: bool, alone: bool) -> None:
    """Several calls of one loss for each pass: their weighted sum, whatever else is measured."""
    torch.manual_seed(0)
    model, (x, y) = Heads(len(weights)), batch(4)
    loss_fn = nn.CrossEntropyLoss(reduction="mean" if mean else "sum")
    monitor = Monitor(model, loss_fn, ["Loss"] if alone else [*KINDS, "TICDiag"])
    shares = [w / sum(weights) for w in weights] if sum(weights) <= 1 else \
        [w / max(1.0, max(weights)) for w in weights]  # fmt: skip

    def own(outputs: list[Tensor], target: Tensor) -> Tensor:
        pairs = zip(shares, outputs, strict=True)
        return sum(w * nn.functional.cross_entropy(o, target) for w, o in pairs)  # type: ignore[return-value]

    oracle = Oracle(copy.deepcopy(model), own, x, y)
    with monitor.step():
        for at in torch.arange(4).chunk(micro):
            outputs = model(x[at])
            terms = [w * loss_fn(o, y[at]) for w, o in zip(weights, outputs, strict=True)]
            total = sum(terms[1:], terms[0])
            (total / micro if mean else total).backward()
    (record,) = monitor.records
    if alone:
        assert record["Loss"] == pytest.approx(float(oracle.values()["Loss"]), rel=1e-9)
    else:
        expect(record, oracle)


@settings(max_examples=20)
@given(
    kind=st.sampled_from(["plain", "penalty", "hook", "twice", "left over", "two passes"]),
    samples=st.integers(2, 6),
    only=st.booleans(),
)
def test_gradients_that_are_not_those_of_the_samples(kind: str, samples: int, only: bool) -> None:
    """What compares both is left out, with a reason; other values stay."""
    torch.manual_seed(samples)
    model, loss_fn, (x, y) = chain(), nn.CrossEntropyLoss(), batch(samples)
    if kind == "hook":
        model[3].weight.register_hook(lambda g: 3 * g)
    names = ["Loss", "GradNorm", "NormTest"] if only else [*KINDS, "GradNorm", "GradHist1d"]
    monitor = Monitor(model, loss_fn, names)
    with pytest.warns(UserWarning) if kind not in ("plain", "left over") else nullcontext():
        for _ in range(2):
            model.zero_grad()
            if kind == "left over":
                (2 * model[3].weight.square().sum()).backward()
            with monitor.step():
                if kind == "two passes":
                    loss_fn((model(x) + model(x.flip(0))), y).backward()
                    continue
                loss = loss_fn(model(x), y)
                if kind == "penalty":
                    loss = loss + sum(p.square().sum() for p in model.parameters())
                loss.backward(retain_graph=kind == "twice")
                if kind == "twice":
                    loss.backward()
    norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    for record in monitor.records:
        assert ("NormTest" in record) == (kind in ("plain", "left over"))
        assert record["Loss"] > 0 and record["GradNorm"] == pytest.approx(norms)
    if kind in ("plain", "left over"):
        norm_test = Oracle(copy.deepcopy(model), loss_fn, x, y).values()["NormTest"]
        assert monitor.records[0]["NormTest"] == pytest.approx(float(norm_test))


class Own(nn.Module):
    """A loss of a user's that says nothing of itself, and remembers what it saw."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(output.detach().mean(0))
        self.mean = self.mean.clone()
        each = nn.functional.cross_entropy(output, target, reduction="none")
        return {"mean": each.mean(), "sum": each.sum(), "root": each.sum().sqrt()}[self.kind]


@settings(max_examples=12)
@given(kind=st.sampled_from(["mean", "sum", "root"]), first=st.sampled_from([1, 4]))
def test_reductions_are_found(kind: str, first: int) -> None:
    """By its values on single samples; the loss itself is as if it had been called once a step."""
    torch.manual_seed(0)
    model, loss_fn, plain = chain(), Own(kind), Own(kind)
    monitor = Monitor(model, loss_fn, [*KINDS, "Alpha"])
    warns = pytest.warns(UserWarning, match="neither the mean nor the sum")
    with warns if kind == "root" else nullcontext():
        for samples in (first, 4):
            x, y = batch(samples)
            with monitor.step():
                model.zero_grad()
                loss_fn(model(x), y).backward()
            plain(model(x), y)
    assert loss_fn.calls == plain.calls == 2 and torch.equal(loss_fn.mean, plain.mean)
    if kind != "root":
        expect(monitor.records[1], Oracle(model, nn.CrossEntropyLoss(), x, y))
