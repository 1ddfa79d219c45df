"""Small networks in which channels of layer 0 are read by layer 2: layers of every kind, drawn."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tnconv.geometry import (
    Landscape,
    Metric,
    Reparametrization,
    Vector,
    model_landscape,
    points_of,
    relu_rescale,
)
from tnconv.geometry.points import basis

LOSS = nn.CrossEntropyLoss()
FEW = settings(max_examples=max(settings.default.max_examples // 10, 1))


@dataclass(frozen=True)
class Layer:
    """A convolution, transposed convolution, or linear layer (no dimensions)."""

    inputs: int
    outputs: int
    dims: int = 2
    kernel: int = 2
    stride: int = 1
    dilation: int = 1
    padding: int = 0
    groups: int = 1
    bias: bool = True
    transposed: bool = False

    def build(self) -> nn.Module:
        if not self.dims:
            return nn.Linear(self.inputs, self.outputs, self.bias)
        kind = getattr(nn, f"Conv{'Transpose' * self.transposed}{self.dims}d")
        how = {"stride": self.stride, "dilation": self.dilation, "padding": self.padding}
        how |= {"groups": self.groups, "bias": self.bias}
        return kind(self.inputs, self.outputs, self.kernel, **how)

    @property
    def reach(self) -> int:
        """How many positions a kernel covers."""
        return self.dilation * (self.kernel - 1) + 1


@dataclass(frozen=True)
class Pair:
    """Layers 0 and 2, an activation after each, and a linear layer."""

    first: Layer
    second: Layer
    size: int = 4
    smooth: bool = False
    seed: int = 0

    def build(self, samples: int = 5) -> tuple[nn.Sequential, Tensor, Tensor]:
        torch.manual_seed(self.seed)
        x = torch.randn(samples, self.first.inputs, *[self.size] * self.first.dims)
        act = nn.Tanh if self.smooth else nn.ReLU
        model = nn.Sequential(
            self.first.build(), act(), self.second.build(), act(), nn.Flatten(), nn.LazyLinear(2)
        )
        model(x)
        if model[2].bias is not None:
            model[2].bias.data.abs_().add_(0.5)  # so that ReLUs let something through
        return model, x, torch.randint(2, (samples,))


KINDS: dict[str, Pair] = {
    "plain": Pair(Layer(1, 2), Layer(2, 2)),
    "groups": Pair(Layer(2, 4, groups=2), Layer(4, 2, groups=2)),
    "strided": Pair(Layer(1, 2, stride=2, bias=False), Layer(2, 2, dilation=2), size=6),
    "transposed": Pair(
        Layer(2, 2, groups=2, transposed=True), Layer(2, 2, stride=2, transposed=True), size=2
    ),
    "transposed groups": Pair(
        Layer(1, 4), Layer(4, 2, kernel=1, groups=2, transposed=True), size=3
    ),
    "depthwise": Pair(Layer(2, 2, groups=2), Layer(2, 2, groups=2)),
    "signal": Pair(Layer(1, 3, dims=1), Layer(3, 2, dims=1, kernel=3), size=6),
    "linear": Pair(Layer(3, 4, dims=0), Layer(4, 3, dims=0)),
}


@st.composite
def layers(draw: st.DrawFn, inputs: int, outputs: int, dims: int) -> Layer:
    """With any groups (depthwise among them), stride, dilation, padding; transposed or not."""
    if not dims:
        return Layer(inputs, outputs, 0, bias=draw(st.booleans()))
    every = [g for g in (1, 2, 4) if inputs % g == 0 and outputs % g == 0]
    kernel = draw(st.integers(1, 3 if dims == 1 else 2))
    found = Layer(
        inputs, outputs, dims, kernel, draw(st.integers(1, 2)), draw(st.integers(1, 2)),
        groups=draw(st.sampled_from(every)), bias=draw(st.booleans()),
        transposed=draw(st.booleans()),
    )  # fmt: skip
    return replace(found, padding=draw(st.integers(0, min(1, found.reach // 2))))


@st.composite
def pairs(draw: st.DrawFn, smooth: bool = False, most: int = 90) -> Pair:
    """Networks of at most so many parameters, with a gradient in both layers."""
    dims = draw(st.sampled_from([1, 2, 2, 0]))
    inputs, between, outputs = (draw(st.sampled_from(some)) for some in ((1, 2), (2, 4), (2,)))
    first = draw(layers(inputs, between, dims))
    second = draw(layers(between, outputs, dims))
    size = first.reach if first.transposed else first.reach + 1
    if not second.transposed:  # it needs positions to read
        size = max(size, first.stride * (second.reach - 1) + first.reach)
        size = size - 2 * min(first.padding, second.padding) if not first.transposed else size
    pair = Pair(first, second, max(size, 2), smooth, draw(st.integers(0, 99)))
    try:
        model, x, y = pair.build()
    except RuntimeError:  # no position is left
        assume(False)
    assume(sum(p.numel() for p in model.parameters()) <= most)
    output = model(x)
    assume(all(bool((part - part[0]).any()) for part in (output[:2], output[2:])))
    LOSS(output, y).backward()
    assume(all(model[at].weight.grad.norm() > 1e-2 for at in (0, 2)))
    return pair


def network(kind: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    """One of `KINDS`."""
    return KINDS[kind].build()


def landscape(pair: Pair) -> tuple[nn.Sequential, Tensor, Landscape]:
    model, x, y = pair.build()
    return model, x, model_landscape(model, LOSS, [(x, y)])


def powers(model: nn.Sequential, x: Tensor) -> Tensor:
    """A power of two for every channel of layer 0."""
    return 2.0 ** torch.arange(model[0](x).shape[1])


def rewritten(
    model: nn.Sequential, x: Tensor, factor: float | Tensor
) -> tuple[nn.Module, Reparametrization]:
    """The model with rescaled channels, and the map."""
    map = relu_rescale(model, "0", "2", factor, x)
    return at_point(model, map(points_of(model))), map


def at_point(model: nn.Module, psi) -> nn.Module:
    """A copy with other values of its parameters."""
    twin = deepcopy(model)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(psi[name])
    return twin


def smooth() -> Landscape:
    """Without kinks, at a point that is not critical."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2))
    found = model_landscape(model, LOSS, [(torch.randn(5, 1, 4), torch.randint(2, (5,)))])
    assert found.gradient.flat().norm() > 0.1
    return found


def jacobian(map: Reparametrization, theta) -> Tensor:
    """``∂ψ/∂θ``, densely, by reverse mode."""
    flat = torch.cat([part.reshape(-1) for part in theta.values()])

    def run(given: Tensor) -> Tensor:
        parts = given.split([part.numel() for part in theta.values()])
        named = {k: p.reshape(theta[k].shape) for k, p in zip(theta, parts, strict=True)}
        return torch.cat([part.reshape(-1) for part in map.forward(named).values()])

    return torch.func.jacrev(run)(flat)


def roots(metric: Metric) -> Tensor:
    """R, column by column."""
    return torch.stack([metric.root(row).flat() for row in torch.eye(metric.size)], 1)


def unit_vectors(theta) -> Iterator[Vector]:
    return map(Vector, basis(theta))
