"""Every layer type and every first-order quantity, against one autograd pass per sample."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnconv
from tests.loops import first_order, per_sample_gradients
from tests.strategies import assert_close
from tnconv import quantities
from tnconv.models.layers import describes

QUANTITIES = [getattr(quantities, name)() for name in first_order(torch.zeros(1, 1))]

LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "linear, 3-d": (lambda: nn.Linear(5, 3), (4, 6, 5)),
    "linear, 4-d": (lambda: nn.Linear(5, 3, bias=False), (4, 2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (4, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (2, 3), stride=(1, 2), padding=(0, 2)), (4, 3, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (2, 2, 5, 4, 3)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(3, 6, 2, groups=3, dilation=2), (4, 3, 6)),
    "strided, dilated": (lambda: nn.Conv2d(2, 3, 3, 2, 2, 2, bias=False), (3, 2, 7, 8)),
    "same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same"), (4, 2, 6, 5)),
    "valid": (lambda: nn.Conv2d(2, 3, (4, 3), padding="valid"), (4, 2, 6, 5)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, 2, (1, 2), padding_mode="circular"), (4, 2, 5, 6)),
    "reflect": (lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="reflect"), (4, 2, 6)),
    "replicate": (lambda: nn.Conv3d(1, 2, 2, padding=1, padding_mode="replicate"), (2, 1, 3, 2, 4)),
    "transposed, 1-d": (
        lambda: nn.ConvTranspose1d(4, 6, 3, 3, 1, output_padding=2, groups=2),
        (3, 4, 5),
    ),
    "transposed, 2-d": (lambda: nn.ConvTranspose2d(2, 3, (3, 2), 2, 1, dilation=2), (3, 2, 4, 5)),
    "transposed, 3-d": (lambda: nn.ConvTranspose3d(2, 2, 2, 2, bias=False), (2, 2, 2, 3, 2)),
    "our conv2d": (
        lambda: tnconv.nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        (3, 2, 5, 4),
    ),
    "our 4-d": (lambda: tnconv.nn.ConvNd(4, 2, 3, 2), (2, 2, 3, 2, 3, 2)),
    "our transposed": (lambda: tnconv.nn.ConvTranspose2d(2, 3, 3, 2, 1), (2, 2, 3, 4)),
    "our transposed, 4-d": (lambda: tnconv.nn.ConvTransposeNd(4, 1, 2, 2), (2, 1, 2, 2, 2, 2)),
    "batch norm": (lambda: nn.BatchNorm2d(3).eval(), (4, 3, 2, 2)),
    "batch norm, 2-d": (lambda: nn.BatchNorm1d(3).eval(), (4, 3)),
    "layer norm": (lambda: nn.LayerNorm(5), (4, 3, 5)),
    "layer norm, 2-d": (lambda: nn.LayerNorm((3, 5)), (4, 2, 3, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), (2, 3, 4, 4)),
    "instance norm, running": (
        lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True).eval(),
        (2, 3, 4),
    ),
    "rms norm": (lambda: nn.RMSNorm(5), (4, 3, 5)),
}


pytestmark = pytest.mark.usefixtures("float64")


def weighted(layer: nn.Module, x: Tensor):
    """A loss that is no layer's special case: every output entry has another weight."""
    weights = torch.randn_like(layer(x)[:1])

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return (weights * (output.square() + targets * output)).sum()

    return loss_fn, torch.randn_like(layer(x))


def check(model, loss_fn, inputs, targets, factor: float = 1.0):
    result = tnconv.compute(model, loss_fn, inputs, targets, QUANTITIES)
    each = per_sample_gradients(model, loss_fn, inputs, targets, factor)
    for quantity in QUANTITIES:
        assert result[quantity].keys() == each.keys()
    for name, gradients in each.items():
        for kind, expected in first_order(gradients).items():
            assert_close(result[getattr(quantities, kind)][name], expected, 1e-10)
    return result


@pytest.mark.parametrize("case", LAYERS)
def test_layer(case):
    make, shape = LAYERS[case]
    layer, x = make(), torch.randn(shape)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    assert describes(layer)
    check(layer, *weighted(layer, x)[:1], x, weighted(layer, x)[1])


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding(padding_idx):
    layer, words = nn.Embedding(7, 3, padding_idx=padding_idx), torch.randint(7, (4, 5))
    loss_fn, targets = weighted(layer, words)
    check(layer, loss_fn, words, targets)


def test_batch_of_one():
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(1, 2, 5, 5)
    check(layer, *weighted(layer, x)[:1], x, weighted(layer, x)[1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction_factor(reduction):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4))
    x, y = torch.randn(5, 2, 5, 5), torch.randint(4, (5,))
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    result = check(model, loss_fn, x, y, factor=1 / 5 if reduction == "mean" else 1)
    F.cross_entropy(model(x), y, reduction=reduction).backward()
    for name, parameter in model.named_parameters():
        assert_close(result[quantities.Gradient][name], parameter.grad, 1e-10)
