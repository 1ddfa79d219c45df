"""Everything of the library that keeps something between two calls, and what can happen to it.

A `Part` is made for a `Setting` (a model, a loss, a batch) and used on it. A `Change` happens
between two uses, or inside of one. Whatever a part has kept must then be noticed: see
`tests.test_stateful`.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tnconv
from tnconv import geometry, ntk, optim
from tnconv import quantities as q
from tnconv.monitor import Monitor
from tnconv.nn import convert, revert, save_memory, tensor_dropout

Found = dict[str, Tensor]


class Moody(nn.Module):
    """Computes something else in training mode, and reads a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 2), nn.Linear(12, 3)
        self.register_buffer("shift", torch.zeros(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = (self.conv(x) + self.shift).tanh()
        return self.head((3 * h if self.training else h).flatten(1))


@dataclass
class Setting:
    """What parts are made for: ``stages`` are what happens inside of a training step."""

    model: nn.Module
    loss_fn: nn.Module
    x: Tensor
    y: Tensor
    stages: dict[str, Callable[["Setting"], object]] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    backwards: int = 1

    @classmethod
    def new(cls) -> "Setting":
        torch.manual_seed(0)
        x, y = torch.randn(5, 2, 3, 3), torch.tensor([0, 1, 2, 1, 0])
        return cls(Moody(), nn.CrossEntropyLoss(), x, y)

    def twin(self) -> "Setting":
        """As things are now, without anybody who watches."""
        with torch.no_grad():
            return Setting(*copy.deepcopy((self.model, self.loss_fn, self.x, self.y)))

    def at(self, stage: str) -> None:
        """A place in a step where something may happen."""
        self.reached.add(stage)
        if (event := self.stages.get(stage)) is not None:
            event(self)

    def values(self) -> Found:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


@dataclass(frozen=True)
class Part:
    """``covers`` are the public names; a ``snapshot`` stays what it was when it was made.

    ``resumes`` says that a new one has to take over the old one's ``state_dict``: all else that was
    kept must not matter. It is ``unconcerned`` by changes of what it was given once.
    """

    covers: tuple[str, ...]
    make: Callable[[Setting], Any]
    use: Callable[[Any, Setting], Found]
    resumes: bool = False
    snapshot: bool = False
    unconcerned: tuple[str, ...] = ()


PARTS: dict[str, Part] = {}
ONCE = "another batch size", "a frozen layer"
"""Operators are of the batches and the parameters that they were made for."""


def part(
    name: str, *covers: str, snapshot: bool = False, make: Callable[[Setting], Any]
) -> Callable[[Callable[[Any, Setting], Found]], Callable[[Any, Setting], Found]]:
    """List a part, whose use is the function below."""

    def listed(use: Callable[[Any, Setting], Found]) -> Callable[[Any, Setting], Found]:
        PARTS[name] = Part(covers, make, use, snapshot=snapshot)
        return use

    return listed


def trained(optimizer: Any, setting: Setting) -> Found:
    """One step of a training loop; what it made of parameters and state."""
    torch.manual_seed(1)
    optimizer.zero_grad()
    output = setting.model(setting.x)
    setting.at("after the forward pass")
    loss = setting.loss_fn(output, setting.y)
    for left in reversed(range(setting.backwards)):
        loss.backward(retain_graph=left > 0)
    setting.at("after the backward pass")
    optimizer.step()
    found = setting.values()
    for at, state in enumerate(optimizer.state.values()):
        found |= {f"{at} {k}": v.clone() for k, v in state.items() if isinstance(v, Tensor)}
    return found


def scaled(setting: Setting) -> Any:
    inner = torch.optim.SGD(setting.model.parameters(), 0.1, momentum=0.9)
    return optim.StepSizeScaler(inner, setting.model, setting.loss_fn, delta=1e-3)


OPTIMIZERS: dict[str, Callable[[Setting], Any]] = {
    "KFAC": lambda s: optim.KFAC(s.model, loss_fn=s.loss_fn, fisher="type-2"),
    "KFAC, sampled": lambda s: optim.KFAC(s.model, loss_fn=s.loss_fn, fisher="mc"),
    "KFAC, empirical": lambda s: optim.KFAC(s.model, flavour="expand", loss_fn=s.loss_fn),
    "KFAC, in eigenbases": lambda s: optim.KFAC(s.model, inverse="eigen", loss_fn=s.loss_fn),
    "KFAC, corrected": lambda s: optim.KFAC(
        s.model, inverse="ekfac", loss_fn=s.loss_fn, update_inverses_every=1
    ),
    "SINGD": lambda s: optim.SINGD(s.model, loss_fn=s.loss_fn, update_factors_every=1),
    "RFShampoo": lambda s: optim.RFShampoo(s.model, damping=0.1),
    "RFRMSProp": lambda s: optim.RFRMSProp(s.model.parameters(), batch_size=s.model),
    "RFAdamW": lambda s: optim.RFAdamW(s.model.parameters(), batch_size=s.model),
    "AdaHesScale": lambda s: optim.AdaHesScale(s.model, s.loss_fn),
    "StepSizeScaler": scaled,
    "LowRankNewton": lambda s: optim.LowRankNewton(s.model, s.loss_fn, directions=3),
}
for _name, _make in OPTIMIZERS.items():
    PARTS[_name] = Part((_name.partition(",")[0],), _make, trained, resumes=True)


def flat(found: Mapping[str, Any]) -> Found:
    """Quantities by name, pairs of factors one by one."""
    pairs = {f"{n} {at}": f for n, v in found.items() for at, f in enumerate(v)
             if isinstance(v, tuple)}  # fmt: skip
    return pairs | {n: v for n, v in found.items() if not isinstance(v, tuple)}


QUANTITIES = (q.SquaredNorms(), q.GGNDiagonal(per_sample=True), q.KFAC("reduce", "type-2"))


@part("compute", "compute", make=lambda s: None)
def _(_: None, s: Setting) -> Found:
    result = tnconv.compute(s.model, s.loss_fn, s.x, s.y, QUANTITIES)
    return {f"{i} {n}": v for i, e in enumerate(QUANTITIES) for n, v in flat(result[e]).items()}


@part("observe", "observe", "Observation", make=lambda s: None)
def _(_: None, s: Setting) -> Found:
    with tnconv.observe(s.model, QUANTITIES) as observation:
        output = s.model(s.x)
        s.at("after the forward pass")
        observation.propagate(s.loss_fn, output, s.y)
        loss = s.loss_fn(output, s.y)
        for left in reversed(range(s.backwards)):
            loss.backward(retain_graph=left > 0)
        s.at("after the backward pass")
        result = observation.result()
    return {f"{i} {n}": v for i, e in enumerate(QUANTITIES) for n, v in flat(result[e]).items()}


@part("observe_low_rank", "observe_low_rank", make=lambda s: None)
def _(_: None, s: Setting) -> Found:
    with tnconv.observe_low_rank(s.model) as observation:
        output = s.model(s.x)
        s.at("after the forward pass")
        ggn = observation.ggn(s.loss_fn, output, s.y)
        s.loss_fn(output, s.y).backward()
        s.at("after the backward pass")
    return {"gram": ggn.gram, **{f"step {n}": v for n, v in ggn.newton_step(0.1).items()}}


@part("low_rank_ggn", "low_rank_ggn", "LowRankGGN", snapshot=True,
      make=lambda s: tnconv.low_rank_ggn(s.model, s.loss_fn, s.x, s.y, groups="layer"))  # fmt: skip
def _(ggn: Any, s: Setting) -> Found:
    ones = {name: torch.ones_like(p) for name, p in ggn.like.items()}
    found = {f"product {n}": v for n, v in (ggn @ ones).items()}
    return found | {f"diagonal {n}": v for n, v in ggn.diagonal().items()}


def multiplied(operator: Any, s: Setting) -> Found:
    v = torch.linspace(-1, 1, operator.shape[0]).to(s.x)
    return {"product": operator @ v}


for _kind, _how in (
    (tnconv.GGNOperator, {}),
    (tnconv.HessianOperator, {}),
    (tnconv.FisherOperator, {"fisher": "empirical"}),
    (tnconv.FisherOperator, {"fisher": "mc"}),
):
    _name = " ".join((_kind.__name__, *_how.values()))

    def _made(s: Setting, kind: Any = _kind, how: Any = _how) -> Any:
        torch.manual_seed(3)
        return kind(s.model, s.loss_fn, [(s.x, s.y), (s.x, s.y)], retain_graph=True, **how)

    PARTS[_name] = Part((_kind.__name__, "CurvatureOperator"), _made, multiplied, unconcerned=ONCE)


@part("hesscale", "hesscale", make=lambda s: None)
def _(_: None, s: Setting) -> Found:
    return tnconv.hesscale(s.model, s.loss_fn, s.x, s.y, per_sample=True)


@part("hessian_diagonal", "hessian_diagonal", make=lambda s: None)
def _(_: None, s: Setting) -> Found:
    return tnconv.hessian_diagonal(s.model, s.loss_fn, s.x, s.y)


@part("empirical_ntk", "empirical_ntk", "ntk_predict", make=lambda s: None)
def _(_: None, s: Setting) -> Found:
    return {"kernel": ntk.empirical_ntk(s.model, s.x)}


PARTS["NTKOperator"] = Part(
    ("NTKOperator",), lambda s: ntk.NTKOperator(s.model, [s.x[:3], s.x[3:]]), multiplied,
    unconcerned=ONCE,
)  # fmt: skip


@part("linearize", "linearize", "LinearizedModel", snapshot=True,
      make=lambda s: ntk.linearize(s.model))  # fmt: skip
def _(linear: Any, s: Setting) -> Found:
    x = torch.linspace(-1, 1, 5 * 18).reshape(5, 2, 3, 3).to(next(linear.parameters()))
    return {"outputs": linear(x).detach()}


def kernel(s: Setting) -> Any:
    theta = partial(ntk.empirical_ntk, s.model, outputs="sum", reduce="trace")
    found = ntk.IncrementalNTK(lambda x, y=None: theta(x, y), damping=0.5)
    found.append(s.x[:2], torch.ones(2))
    return found


@part("IncrementalNTK", "IncrementalNTK", snapshot=True, make=kernel)
def _(held: Any, s: Setting) -> Found:
    x = torch.linspace(-1, 1, 5 * 18).reshape(5, 2, 3, 3).to(s.x)
    return {"bound": held.ucb(x)}


def landscape(s: Setting) -> Any:
    batches = [(s.x, s.y)]
    damping = 0.5 * geometry.Euclidean(geometry.points_of(s.model))
    field = geometry.GaussNewtonField(s.model, s.loss_fn, batches, geometry.Constant(damping))
    return geometry.model_landscape(s.model, s.loss_fn, batches, field)


@part("Landscape", "Landscape", "model_landscape", "GaussNewtonField", snapshot=True,
      make=landscape)  # fmt: skip
def _(found: Any, s: Setting) -> Found:
    return dict(found.natural_gradient().parts)


METRICS: dict[str, Callable[..., Any]] = {
    "ggn_metric": geometry.ggn_metric,
    "fisher_metric": geometry.fisher_metric,
    "kfac_metric": geometry.kfac_metric,
    "ekfac_metric": geometry.ekfac_metric,
    "low_rank_metric": geometry.low_rank_metric,
    "ggn_diagonal_metric": geometry.ggn_diagonal_metric,
}


def metric(name: str, s: Setting) -> Any:
    damping = 0.5 * geometry.Euclidean(geometry.points_of(s.model))
    return METRICS[name](s.model, s.loss_fn, [(s.x, s.y)], damping)


def measured(found: Any, s: Setting) -> Found:
    ones = geometry.Covector({n: torch.ones_like(p) for n, p in found.space.items()})
    inverse = found.inverse_product(ones).parts
    return {"logdet": found.logdet()} | {f"inverse {n}": v for n, v in inverse.items()}


for _name in METRICS:
    _covers = _name, "Metric", "Implicit"
    PARTS[_name] = Part(_covers, partial(metric, _name), measured, snapshot=True)


OF_STEPS_BEFORE = (
    *("Time", "Distance", "UpdateCosine", "GradientCosine", "Alpha", "CABS"),
    "HessMaxEV",  # starts from the vector of the step before
)


@part("Monitor", "Monitor", make=lambda s: Monitor(s.model, s.loss_fn, "full", products=3))
def _(monitor: Any, s: Setting) -> Found:
    optimizer = torch.optim.SGD(s.model.parameters(), 0.01)
    with monitor.step():
        trained(optimizer, s)
    found = {k: v for k, v in monitor.records[-1].items() if k not in OF_STEPS_BEFORE}
    return {k: torch.tensor(v) for k, v in found.items() if isinstance(v, float)}


SWAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "convert": convert,
    "save_memory": save_memory,
    "tensor_dropout": lambda model: tensor_dropout(model, 0.5),
}


def swapped(name: str, s: Setting) -> Any:
    s.model = SWAPS[name](revert(s.model))
    return torch.optim.SGD(s.model.parameters(), 0.1)


for _name in SWAPS:
    _covers = (_name, *(f"TensorDropout{k}" for k in ("Linear", "Conv1d", "Conv2d", "Conv3d")))
    PARTS[_name] = Part(_covers, partial(swapped, _name), trained)


TOGETHER = {"mean": [*OPTIMIZERS, "Monitor"], "sum": ["KFAC", "RFShampoo", "RFRMSProp", "RFAdamW"]}
TOGETHER["sum"] += ["AdaHesScale", "StepSizeScaler", "LowRankNewton"]
"""What several workers use, by the loss's reduction.

Not those that draw: workers draw differently; nor the monitor of a sum, which says what the mean
over samples is of the loss as it was given. The empirical Fisher of half a loss is no half of the
Fisher (`tests.optim.test_workers.summed`), and corrections in a basis that is not unique differ.
"""
for _name in ("KFAC, sampled", "KFAC, corrected"):
    TOGETHER["mean"].remove(_name)


def shared(name: str, reduction: str, rank: int = 0, workers: int = 1) -> Found | str:
    """What a part gives on a worker's share of a batch after two steps, or why it does not.

    Gradients are averaged over two workers: the loss of a sum is half of it, as with weights 1/2.
    """
    setting = Setting.new()
    halved = torch.full((3,), 0.5) if reduction == "sum" and workers == 1 else None
    setting.loss_fn = nn.CrossEntropyLoss(halved, reduction=reduction)
    own = slice(rank, None, workers)
    setting.x, setting.y = torch.randn(6, 2, 3, 3)[own], torch.arange(6)[own] % 3
    if workers > 1:
        setting.model = nn.parallel.DistributedDataParallel(setting.model)
    made = PARTS[name].make(setting)
    try:
        PARTS[name].use(made, setting)
        found = PARTS[name].use(made, setting)
    except NotImplementedError as error:
        return str(error)
    return {
        key.removeprefix("module."): value
        for key, value in found.items()
        if not key.endswith("_vectors")  # with either sign
    }
