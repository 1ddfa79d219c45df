"""Memory-saving layers in narrow dtypes, under autocast, and on channels-last tensors."""

import pytest
import torch
from torch import nn

from tests.nn.memory_cases import close, each_case, pair, stored


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3), nn.Linear(6, 4)]
)
def test_autocast(layer):
    theirs, saving = pair(layer)
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = theirs(x), saving(x)
    assert z.dtype == y.dtype == torch.bfloat16
    close(z, y, 0)
    z.float().square().sum().backward()
    y.float().square().sum().backward()
    for p, q in zip(theirs.parameters(), saving.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        torch.testing.assert_close(q.grad, p.grad, rtol=2e-2, atol=2e-2 * float(p.grad.abs().max()))


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_of_every_layer(layer, shape, reader, dtype):
    results, x = [], torch.randn(shape).to(dtype)
    for module in pair(layer, reader):
        module.float()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            y, size = stored(lambda m=module: m(x.clone().requires_grad_()), module)
        results.append((y, size))
    (y, most), (z, size) = results
    assert z.dtype == y.dtype and size <= most
    close(z, y, 2e-2 * float(y.abs().max()))


@pytest.mark.parametrize("kind", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(3)])
def test_pooling_keeps_channels_last(kind):
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    v = torch.randn_like(kind(x))
    (dx,), (ex,) = (torch.autograd.grad(m(x), x, v) for m in pair(kind))
    assert ex.stride() == dx.stride()
    close(ex, dx, 0)


def test_evaluated_batch_norm_is_as_precise_as_torch():
    theirs, saving = (m.bfloat16() for m in pair(nn.BatchNorm2d(4).eval()))
    x = torch.randn(3, 4, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    v = torch.randn_like(x)
    (dx, dw, db), found = (
        torch.autograd.grad(m(x), (x, *m.parameters()), v) for m in (theirs, saving)
    )
    for ours, torchs in zip(found, (dx, dw, db), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=2**-7, atol=2**-7)
