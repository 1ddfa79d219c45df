"""What loops, losses, rules and measurements of users do ends no run, and changes no number."""

import math
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.monitor.oracle import chain
from tests.monitor.test_neutrality import same
from tnconv.monitor import (
    Alert,
    CriticalBatchSize,
    GradHist1d,
    GradNorm,
    Loss,
    Measurement,
    Monitor,
    Smoothed,
    UpdateRatio,
    read_run,
)
from tnconv.monitor.published import PUBLISHED
from tnconv.monitor.run_folder import RunWriter
from tnconv.monitor.seen import LARGE, norms

PLAIN = st.one_of(st.floats(width=32), st.integers(-9, 9), st.none(), st.text("ab/#", max_size=3))
NUMBERS = st.sampled_from([np.float32(0.5), np.int64(3), torch.tensor(2), torch.tensor(0.25)])
ARRAYS = st.sampled_from(
    [np.arange(3), torch.ones(2, 2, dtype=torch.bfloat16), torch.zeros(0), np.ones((2, 3))]
)
VALUES = st.recursive(
    PLAIN | NUMBERS | ARRAYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=5,
)


def batch(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, 4, 4, generator=generator)
    return x, torch.randint(3, (samples,), generator=generator)


class Given(Measurement):
    """What a test says."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        object.__setattr__(self, "make", make)

    def value(self, seen: Any) -> Any:
        return self.make()  # type: ignore[attr-defined]


def steps(monitor: Monitor, model: nn.Module, loss_fn: nn.Module, count: int = 2) -> None:
    for step in range(count):
        x, y = batch(4, step)
        with monitor.step():
            model.zero_grad()
            loss_fn(model(x), y).backward()


@settings(max_examples=40)
@given(value=VALUES)
def test_any_value_is_recorded_and_read_back(value: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
    loss_fn, folder = nn.CrossEntropyLoss(), mkdtemp()
    monitor = Monitor(model, loss_fn, [Given(lambda: value), Loss()], folder=folder)
    steps(monitor, model, loss_fn)
    assert [record["step"] for record in monitor.records] == [0, 1]
    assert all(math.isfinite(record["Loss"]) for record in monitor.records)
    found, expected = read_run(folder).records[1], monitor.records[1]
    assert found["Loss"] == expected["Loss"]


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("b"), ZeroDivisionError(), object])
def test_what_raises_is_left_out(error: Any, tmp_path: Path) -> None:
    """A measurement, or what it gives, a rule, and a folder that is gone."""

    def broken() -> Any:
        if isinstance(error, Exception):
            raise error
        return error()

    def rule(history: Any) -> Any:
        return [Alert("critical", "no such level", "at all")] if error is object else [broken()]

    model, loss_fn = chain(), nn.CrossEntropyLoss()
    monitor = Monitor(
        model, loss_fn, [Given(broken), Loss()], alerts=[rule], folder=tmp_path / "run"
    )
    (tmp_path / "run" / "scalars.jsonl").unlink()
    (tmp_path / "run" / "arrays").rmdir()
    (tmp_path / "run").rmdir()
    with pytest.warns(UserWarning) as told:
        steps(monitor, model, loss_fn)
    words = [str(each.message) for each in told]
    for part in ("leaves out Given", "the rule rule raised", "records are not written any more"):
        assert sum(part in each for each in words) == 1
    assert all(record.keys() == {"step", "Loss"} for record in monitor.records)


def test_what_is_needed_is_known() -> None:
    model = chain()
    for needs, match in (
        (("gradient",), "needs 'gradient'; expected some of step, names"),
        (("dead",), r"needs 'dead'; expected Activity\(\)"),
    ):
        kind = type("Own", (Measurement,), {"needs": needs, "value": lambda self, seen: 1.0})
        with pytest.raises(ValueError, match=match):
            Monitor(model, quantities=[kind()])
    with pytest.raises(ValueError, match=r"parameter '0\.weight' is on the device 'meta'"):
        Monitor(chain().to("meta"))
    with pytest.raises(ValueError, match=r"parameter '0\.weight' has no shape yet"):
        Monitor(nn.Sequential(nn.LazyLinear(3)))


def test_what_is_missing_is_said() -> None:
    """Once, and recorded as soon as it is there."""
    model, loss_fn = chain(), nn.functional.cross_entropy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, loss_fn, ["CABS", "Loss"])
    x, y = batch(4)
    with pytest.warns(UserWarning, match="not recorded") as told:
        for step in range(4):
            monitor.optimizer = optimizer if step == 3 else None
            with monitor.step():
                model.zero_grad()
                (monitor.loss if step == 3 else loss_fn)(model(x), y).backward()
    words = " ".join(str(each.message) for each in told if "not recorded" in str(each.message))
    assert words.count("no optimizer is known") == words.count("Loss is not recorded") == 1
    assert [set(record) - {"step"} for record in monitor.records] == [set()] * 3 + [
        {"CABS", "Loss"}
    ]


class Two(nn.Module):
    """A network with two outputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.kind = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)), kind

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return {"tensor": y, "tuple": (y, y.tanh()), "mapping": {"a": y, "b": y.tanh()}}[self.kind]


class Own(nn.Module):
    """A loss of users, of several outputs."""

    def forward(self, output: Any, target: Tensor) -> Tensor:
        parts = [output] if isinstance(output, Tensor) else [*output.values()] \
            if isinstance(output, dict) else output  # fmt: skip
        return sum((k + 1) * (p - target).square().mean() for k, p in enumerate(parts))  # type: ignore[return-value]


class Losses(Measurement):
    needs = ("losses",)

    def value(self, seen: Any) -> Any:
        return seen.losses


@pytest.mark.usefixtures("float64")
@settings(max_examples=15)
@given(
    kind=st.sampled_from(["tensor", "tuple", "mapping"]),
    form=st.sampled_from(["positional", "one named", "named", "other order"]),
    known=st.booleans(),
)
def test_losses_of_samples(kind: str, form: str, known: bool) -> None:
    """Their mean and variance, however the loss is called, and whatever it reads."""
    torch.manual_seed(0)
    model, (x, _), y = Two(kind), batch(5), torch.rand(5, 3)
    loss_fn: nn.Module = nn.BCEWithLogitsLoss() if known and kind == "tensor" else Own()
    name = "input" if isinstance(loss_fn, nn.BCEWithLogitsLoss) else "output"
    calls: dict[str, Callable[[Any], Tensor]] = {
        "positional": lambda out: loss_fn(out, y),
        "one named": lambda out: loss_fn(out, target=y),
        "named": lambda out: loss_fn(**{name: out, "target": y}),
        "other order": lambda out: loss_fn(**{"target": y, name: out}),
    }
    monitor = Monitor(model, loss_fn, [Losses()])
    with monitor.step():
        calls[form](model(x)).backward()
    each = torch.stack([loss_fn(model(x[n : n + 1]), y[n : n + 1]).detach() for n in range(5)])
    assert monitor.records[0]["Losses"] == pytest.approx([float(each.mean()), float(each.var())])


@settings(max_examples=15)
@given(
    scale=st.sampled_from([4.0, 256.0]),
    interval=st.integers(1, 3),
    clip=st.booleans(),
    broken=st.integers(0, 5),
)
def test_the_scale_of_mixed_precision_changes(
    scale: float, interval: int, clip: bool, broken: int
) -> None:
    """Norms are of the gradients as the optimizer gets them, when the scale grows, or shrinks."""
    torch.manual_seed(0)
    model, loss_fn = chain(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)
    monitor = Monitor(model, loss_fn, [GradNorm(), UpdateRatio()], scaler=scaler)
    expected = []
    for step in range(4):
        x, y = batch(4, step)
        x = x * math.inf if step == broken else x
        with monitor.step():
            optimizer.zero_grad()
            scaler.scale(loss_fn(model(x), y)).backward()
            scaler.unscale_(optimizer)
            expected.append([float(p.grad.norm()) for p in model.parameters()])
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
    for record, norm in zip(monitor.records, expected, strict=True):
        if math.isfinite(sum(norm)):
            assert record["GradNorm"] == pytest.approx(norm, rel=1e-5)
    assert broken > 3 or monitor.records[broken]["UpdateRatio"] == [0.0] * len(expected[0])


@pytest.mark.usefixtures("float64")
@settings(max_examples=12)
@given(
    learns=st.lists(st.sets(st.sampled_from([0, 3, 5]), min_size=1), min_size=8, max_size=8),
    optimizer=st.sampled_from([torch.optim.SGD, torch.optim.Adam]),
)
def test_parameters_that_learn_change(learns: list[set[int]], optimizer: Any) -> None:
    """Distances are from where a parameter began; averages begin anew; nothing raises."""
    torch.manual_seed(0)
    model, loss_fn, folder = chain(), nn.CrossEntropyLoss(), mkdtemp()
    for at in (0, 3, 5):
        model[at].requires_grad_(at in learns[0])
    opt = optimizer(model.parameters(), lr=0.05)
    kinds = ["GradNorm", "Distance", "NormTest", "Alpha", Smoothed(GradNorm())]
    monitor = Monitor(model, loss_fn, kinds, folder=folder)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, chosen in enumerate(learns):
        for at in (0, 3, 5):
            model[at].requires_grad_(at in chosen)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        expected = [float((p - start[n]).norm()) for n, p in named]
        x, y = batch(4, step)
        with monitor.step():
            opt.zero_grad()
            loss_fn(model(x), y).backward()
            opt.step()
        record = monitor.records[-1]
        assert record["step"] == step and len(record["GradNorm"]) == len(named)
        assert record["Distance"] == pytest.approx(expected, abs=1e-12)
        if step and chosen != learns[step - 1]:
            assert record["SmoothedGradNorm"] == pytest.approx(record["GradNorm"])
    assert read_run(folder).names == [name for name, _ in named]


@pytest.mark.usefixtures("float64")
@settings(max_examples=8)
@given(changes=st.lists(st.sampled_from(["", "insert", "remove", "swap"]), min_size=5, max_size=5))
def test_layers_come_and_go(changes: list[str]) -> None:
    """A parameter began where it was first seen, whatever it is called by now."""
    torch.manual_seed(0)
    loss_fn = nn.CrossEntropyLoss()
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    monitor = Monitor(model, loss_fn, ["Distance", "Alpha", "GradNorm", "UpdateRatio"])
    start: dict[nn.Parameter, Tensor] = {}
    for step, change in enumerate(changes):
        if change == "insert":
            model.insert(2, nn.Linear(4, 4))
        elif change == "remove" and len(model) > 3:
            del model[2]
        elif change == "swap" and len(model) > 4:
            model[2], model[3] = model[3], model[2]
        for p in model.parameters():
            start.setdefault(p, p.detach().clone())
        expected = [float((p.detach() - start[p]).norm()) for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = batch(4, step)
        with monitor.step():
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        assert monitor.records[-1]["Distance"] == pytest.approx(expected, abs=1e-12)
        assert "UpdateRatio" in monitor.records[-1]


@pytest.mark.usefixtures("float64")
@settings(max_examples=12)
@given(
    kinds=st.lists(st.integers(0, 30), min_size=1, max_size=3, unique=True),
    name=st.sampled_from(["SGD", "Adam"]),
)
def test_alone_is_as_among_others(kinds: list[int], name: str) -> None:
    """A measurement records the same whatever else is measured, with steps that move far."""
    found = []
    own = [CriticalBatchSize, UpdateRatio, GradHist1d(adaptation="absmax", layerwise=True)]
    own = [k for k in (*PUBLISHED, *own) if name == "SGD" or not getattr(k, "plain_sgd", False)]
    every = [k for k in own if k is not GradHist1d and getattr(k, "__name__", "") != "Time"]
    some = [every[at % len(every)] for at in kinds]
    for chosen in (every, list(dict.fromkeys(some))):
        torch.manual_seed(0)
        model, loss_fn = chain(), nn.CrossEntropyLoss()
        optimizer: Any = getattr(torch.optim, name)(model.parameters(), lr=0.5)
        monitor = Monitor(model, loss_fn, chosen, optimizer=optimizer)
        for step in range(2):
            x, y = batch(4, step)
            with monitor.step():
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
        found.append(monitor.records)
    for one, other in zip(*found, strict=True):
        for key, value in other.items():
            if isinstance(value, float):
                assert value == pytest.approx(one[key], rel=1e-9, nan_ok=True), key
            else:
                assert same(value, one[key]), key


@settings(max_examples=25)
@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    size=st.sampled_from([1, 7, 3000, LARGE + 5]),
    scale=st.sampled_from([1e-3, 1.0, 3e3]),
    sparse=st.booleans(),
)
def test_norms_of_sixteen_bits(dtype: torch.dtype, size: int, scale: float, sparse: bool) -> None:
    """As in float64, beside others: a float16 norm would be infinite, a bfloat16 one rounded."""
    generator = torch.Generator().manual_seed(size)
    given = [(scale * torch.randn(n, generator=generator)).to(dtype) for n in (size, 3)]
    given.append(torch.ones(4, dtype=torch.float64))
    found = norms(given)
    for one, other in zip(found, given, strict=True):
        assert float(one) == pytest.approx(float(other.double().norm()), rel=1e-5)
    rows, words = torch.arange(2), nn.Embedding(size if size < 4000 else 9, 4, sparse=sparse)
    model = nn.Sequential(words.to(dtype), nn.Flatten(), nn.Linear(8, 3).to(dtype))
    monitor = Monitor(model, loss_fn := nn.MSELoss(), ["GradNorm", "UpdateSize"])
    with monitor.step():
        loss_fn(
            model((rows[None].repeat(5, 1)) % words.num_embeddings).float(), torch.rand(5, 3)
        ).backward()
    grads = [p.grad.to_dense().double().norm() for p in model.parameters()]
    assert monitor.records[0]["GradNorm"] == pytest.approx([float(g) for g in grads], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*(torn|cannot be read)")
@settings(max_examples=25)
@given(
    cut=st.floats(0, 1), flip=st.integers(0, 10**6), which=st.sampled_from(["npz", "jsonl", "flip"])
)
def test_damaged_files_lose_no_more_than_they_must(cut: float, flip: int, which: str) -> None:
    """Torn anywhere, or with a byte that another one was written over."""
    folder = Path(mkdtemp())
    writer, histogram = RunWriter(folder, {"parameters": ["w"]}), {"hist": np.arange(50)}
    for step in range(3):
        writer.write(step, {"Loss": 1.0 + step, "Hist": {**histogram, "edges": np.arange(51.0)}})
    path = folder / ("scalars.jsonl" if which == "jsonl" else "arrays/step-000000001.npz")
    content = bytearray(path.read_bytes())
    if which == "flip":
        content[flip % len(content)] ^= 0x55
    path.write_bytes(content if which == "flip" else content[: int(cut * len(content))])
    run = read_run(folder)
    assert all(isinstance(each["step"], int) for each in run.records)
    losses = run.series("Loss")[1]
    assert losses == [1.0, 2.0, 3.0][: len(losses)] and (which == "jsonl" or len(losses) == 3)
    assert [0, 2] == [s for s in run.series("Hist")[0] if s != 1]
    again = RunWriter(folder, {"parameters": ["w"]})
    again.write(1, {"Loss": 5.0, "Other": {"hist": np.arange(3), "edges": np.arange(4.0)}})
    assert read_run(folder).records[-1]["step"] == 2
    (record,) = (r for r in read_run(folder).records if r["step"] == 1)
    assert record["Loss"] == 5.0 and record["Other"]["hist"].tolist() == [0, 1, 2]
