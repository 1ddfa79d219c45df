"""Random networks with random options of their tangent kernels, and what torch.func says."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models.test_geometries import layers
from tests.ntk.oracle import REDUCED, jacobian, kernels, reduced
from tnconv.ntk import parametrization_scales
from tnconv.operators.low_rank.orders import ORDERS

USES = ("once", "repeated", "two sizes", "tied")
"""One call; two calls on equal and on different sizes; another module with the same weight."""


class Network(nn.Module):
    """A layer, used in one of the ways of `USES`, a nonlinearity, and a linear layer."""

    def __init__(self, layer: nn.Module, use: str, x: Tensor, outputs: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.use, self.outputs = layer, use, outputs
        if use == "tied":
            self.twin = type(layer)(*layer.weight.shape[:2], 1, bias=False)
            self.twin.weight = layer.weight
            self.twin.stride, self.twin.groups = layer.stride, layer.groups
        entries = self.features(x).shape[1]
        self.head = nn.Linear(entries, prod(outputs))

    def features(self, x: Tensor) -> Tensor:
        found = [self.layer(x)]
        if self.use == "repeated":
            found.append(self.layer(torch.sin(x)))
        elif self.use == "two sizes":
            found.append(self.layer(torch.cat([x, x.flip(-1)], -1)))
        elif self.use == "tied":
            found.append(self.twin(2 * x))
        return torch.cat([torch.tanh(each).flatten(1) for each in found], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).unflatten(1, self.outputs)


@dataclass
class Case:
    """A model, its inputs, and options; ``expected`` is by parameter name."""

    model: nn.Module
    x1: Tensor
    options: dict[str, Any]
    expected: dict[str, Tensor]


def moved(model: nn.Module) -> dict[str, Tensor]:
    """Another checkpoint."""
    return {name: p.detach() + 0.3 * torch.randn_like(p) for name, p in model.named_parameters()}


@st.composite
def networks(draw: st.DrawFn) -> tuple[Network, Tensor]:
    layer, x = draw(layers())
    outputs = draw(st.sampled_from([(2,), (3,), (2, 2)]))
    try:
        model = Network(layer, draw(st.sampled_from(USES)), x, outputs)
    except RuntimeError:  # torch refuses the geometry
        assume(False)
    return model, x


@st.composite
def functions(draw: st.DrawFn, shape: tuple[int, ...], most: int) -> tuple[Any, Tensor]:
    """Functions of outputs, and their seeds ``(c, *o)`` or ``(n, c, *o)``."""
    count = prod(shape)
    every = torch.eye(count).reshape(count, *shape)
    kind = draw(st.sampled_from(["all", "one", "some", "sum", "seeds", "own"]))
    if kind == "sum":
        return "sum", torch.ones(1, *shape)
    if kind in ("one", "some"):
        chosen = draw(st.lists(st.integers(-count, count - 1), min_size=1, max_size=2))
        return (chosen[0], every[[chosen[0]]]) if kind == "one" else (chosen, every[chosen])
    lead = {"seeds": (3,), "own": (most, 2)}.get(kind)
    return ("all", every) if lead is None else (s := torch.randn(*lead, *shape), s)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Every option by itself and with the others."""
    model, x1 = draw(networks())
    names = [name for name, _ in model.named_parameters()]
    reduce = draw(st.sampled_from([*REDUCED]))
    count = len(x1) if reduce == "sample_diagonal" else draw(st.integers(1, 3))
    x2 = draw(st.sampled_from([None, torch.randn(count, *x1.shape[1:])]))
    most = max(len(x1), count)
    outputs, seeds = draw(functions(model.outputs, most))
    state = draw(st.sampled_from([None, moved(model)]))
    state = state if state is None or draw(st.booleans()) else {names[0]: state[names[0]]}
    some = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    scales = draw(st.sampled_from([None, "ntk", "mean-field", {names[-1]: 0.5, names[0]: 3.0}]))
    options = {
        "x2": x2,
        "outputs": outputs,
        "reduce": reduce,
        "parameters": draw(st.sampled_from([None, some])),
        "per_layer": draw(st.booleans()),
        "other": state,
        "scales": scales,
        "order": draw(orders(names)),
        "memory_limit": draw(st.sampled_from([None, 2**18, 2**24])),
        "chunks": draw(st.sampled_from([None, None, 1, 2, (1, 2)])),
        "dtype": draw(st.sampled_from([None, torch.float64])),
    }
    j, k = jacobian(model, x1, seeds), jacobian(model, x1 if x2 is None else x2, seeds, state)
    factors = scales if isinstance(scales, Mapping) else {}
    if isinstance(scales, str):
        factors = parametrization_scales(model, scales)
    each = {
        name: factors.get(name, 1.0) * reduced(block, reduce)
        for name, block in kernels(j, k).items()
        if name in (options["parameters"] or names)
    }
    return Case(model, x1, options, each)


def orders(names: list[str]) -> st.SearchStrategy[Any]:
    """One order for all, or orders of some parameters."""
    each = st.sampled_from(["auto", *ORDERS])
    return each | st.dictionaries(st.sampled_from(names), each, max_size=2)
