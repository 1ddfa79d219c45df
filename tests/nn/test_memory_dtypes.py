"""Memory-saving layers in narrow dtypes, under autocast, and on channels-last tensors."""

import pytest
import torch
from torch import nn

from tests.nn.memory_cases import close, pair


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
