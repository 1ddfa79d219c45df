"""What only a CUDA device shows; skipped elsewhere. ``python -m benchmarks.device`` tells more."""

import pytest
import torch
from torch import nn

import tnconv
from tnconv import functional
from tnconv import quantities as q

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_generators_of_the_host_serve_models_on_the_device() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3)).cuda()
    x, y = torch.rand(4, 1, 8, 8).cuda(), torch.randint(3, (4,)).cuda()
    quantity = q.KFAC("expand", "mc", generator=torch.Generator())
    factors = tnconv.compute(model, nn.CrossEntropyLoss(), x, y, [quantity])[quantity]
    assert all(each.B.is_cuda for each in factors.values())


def test_constants_of_a_capture_are_not_kept() -> None:
    x = torch.randn(8, 3, 64, 64, device="cuda")
    functional.kfac_reduce(x[:1], 7, stride=2, padding=3)  # prices and cuBLAS are ready
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = functional.kfac_reduce(x, 7, stride=2, padding=3)
    eager = functional.kfac_reduce(x, 7, stride=2, padding=3)
    expected = functional.kfac_reduce(x.cpu().double(), 7, stride=2, padding=3)
    torch.testing.assert_close(eager.cpu().double(), expected, rtol=1e-3, atol=1e-3)
    graph.replay()
    torch.testing.assert_close(recorded.cpu().double(), expected, rtol=1e-3, atol=1e-3)
