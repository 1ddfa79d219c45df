"""Traces for every size: `torch.compile(dynamic=True)` and `torch.export` with symbolic sizes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tnconv.nn import UnfoldNd, convert, save_memory, tensor_dropout

pytestmark = pytest.mark.usefixtures("float64")


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "converted": convert,
    "memory": save_memory,
    "dropout": lambda model: tensor_dropout(model, 1.0, "fixed"),
}


def parts() -> dict[str, nn.Module]:
    """Layers of every kind that is converted, stores less, or is sampled, one after the other."""
    return {
        "converted": nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1),
            nn.Conv2d(2, 2, 3, padding="same", padding_mode="circular"),
        ),
        "memory": nn.Sequential(
            nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.LeakyReLU(), nn.MaxPool2d(2)
        ),
        "dropout": nn.Sequential(
            nn.Conv2d(2, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)
        ),
    }


def models() -> tuple[nn.Module, nn.Module]:
    """The plain layers, and each part of them in its way, with the same parameters."""
    plain = parts()
    return nn.Sequential(*plain.values()), nn.Sequential(*(WAYS[n](m) for n, m in plain.items()))


def test_one_graph_serves_every_size() -> None:
    plain, own = models()
    torch._dynamo.reset()
    compiled = torch.compile(own, backend="aot_eager", fullgraph=True, dynamic=True)
    graphs = []
    for samples, size in ((2, 12), (3, 14), (5, 13)):
        x = torch.randn(samples, 2, size, 16)
        gradients = []
        for each in (compiled, plain):
            leaf = x.clone().requires_grad_()
            y = each(leaf)
            y.square().sum().backward()
            assert leaf.grad is not None
            gradients.append((y.detach(), leaf.grad, *(p.grad for p in plain.parameters())))
            plain.zero_grad()
        for actual, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2]


def test_exported_with_a_symbolic_batch() -> None:
    plain, own = (model.eval() for model in models())
    batch = {0: torch.export.Dim("batch", min=2)}
    x = torch.randn(4, 2, 12, 16)
    program = torch.export.export(own, (x,), dynamic_shapes=(batch,)).module()
    for samples in (2, 4, 7):
        other = torch.randn(samples, 2, 12, 16)
        torch.testing.assert_close(program(other), plain(other))


@pytest.mark.parametrize("keep", [{"batch": 0.5}, {"in_channels": 0.3}, {"rows": 0.7}])
def test_samples_follow_symbolic_sizes(keep: dict[str, float]) -> None:
    """Fixed samples of a layer that is one tap: the gradient is a sum over what was kept."""
    layer = tensor_dropout(nn.Conv2d(10, 1, 1, bias=False), keep, "fixed")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    ((name, share),) = keep.items()
    for samples, size in ((4, 6), (7, 10)):
        layer.zero_grad()
        x = torch.ones(samples, 10, size, size)
        compiled(x).sum().backward()
        sizes = {"batch": samples, "in_channels": 10, "rows": size}[name]
        kept = max(1, int(share * sizes))
        (gradient,) = (p.grad for p in layer.parameters())
        assert gradient is not None
        total = 10.0 * samples * size * size
        torch.testing.assert_close(gradient.sum(), torch.tensor(total))
        if name == "in_channels":
            assert int((gradient != 0).sum()) == kept


def test_backward_reads_the_samples_of_the_forward_pass() -> None:
    """Were they drawn again, gradients would land in other channels."""
    plain = nn.Conv2d(8, 2, 1, bias=False)
    layer = tensor_dropout(plain, 1.0, "fixed")
    x = torch.randn(2, 8, 3, 3)
    (expected,) = torch.autograd.grad(plain(x).sum(), plain.weight)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        (gradient,) = torch.autograd.grad(compiled(x).sum(), plain.weight)
        torch.testing.assert_close(gradient, expected)


def test_windows_of_symbolic_sizes() -> None:
    own = convert(unfold := nn.Unfold(3, padding=1))
    assert isinstance(own, UnfoldNd)
    compiled = torch.compile(own, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (6, 7, 9):
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(compiled(x), unfold(x))


def test_static_sizes_are_programs() -> None:
    recorded: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        recorded.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    own = convert(nn.Conv2d(2, 4, 3))
    torch._dynamo.reset()
    torch.compile(own, backend=backend, fullgraph=True, dynamic=False)(torch.randn(2, 2, 6, 6))
    assert not any("conv2d" in target for target in recorded)
    torch._dynamo.reset()
    torch.compile(own, backend=backend, fullgraph=True, dynamic=True)(torch.randn(2, 2, 6, 6))
    assert any("conv2d" in target for target in recorded)
