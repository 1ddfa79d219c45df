"""Per-sample gradients of a weight, and their squared norms, by the ways others know."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.contestants import Case

MOST_ENTRIES = 2**29  # of opacus' products over all pairs of groups
Gradients = Callable[["Case"], Tensor]


class TooLargeError(Exception):
    """A contestant would need so much work or memory that it is not run."""


def loop(case: "Case") -> Tensor:
    """Torch's own weight-gradient kernel, once for each sample."""
    pairs = zip(case.x.split(1), case.grad_output.split(1), strict=True)
    return torch.stack([weight_gradient(case, x, v, case.weight) for x, v in pairs])


def grouped(case: "Case") -> Tensor:
    """Torch's weight-gradient kernel with samples as groups."""
    x, v = (array.reshape(1, -1, *array.shape[2:]) for array in (case.x, case.grad_output))
    samples = len(case.x)
    weights = case.weight.expand(samples, *case.weight.shape).flatten(0, 1)
    return weight_gradient(case, x, v, weights, samples).reshape(samples, *case.weight.shape)


def weight_gradient(case: "Case", x: Tensor, v: Tensor, weight: Tensor, samples: int = 1) -> Tensor:
    h, zeros = case.layer, [0] * len(case.layer.stride)
    result: Tensor = torch.ops.aten.convolution_backward(
        *(v, x, weight, None, h.stride, h.padding, h.dilation, False, zeros, samples * h.groups),
        [False, True, False],
    )[1]
    return result


def unfold(case: "Case") -> Tensor:
    """Unfolded input times output gradient, a batched matrix product."""
    h, samples = case.layer, len(case.x)
    patches = F.unfold(case.x, h.kernel_size, h.dilation, h.padding, h.stride)
    patches = patches.reshape(samples * h.groups, -1, patches.shape[-1])
    given = case.grad_output.reshape(samples * h.groups, -1, patches.shape[-1])
    return torch.bmm(given, patches.mT).reshape(samples, *case.weight.shape)


def vmap(case: "Case") -> Tensor:
    """``vmap(grad)`` of the layer, as torch's own tutorial on per-sample gradients does."""

    def inner(weight: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return (F.conv2d(x.unsqueeze(0), weight, **case.settings)[0] * v).sum()

    gradients = torch.func.vmap(torch.func.grad(inner), (None, 0, 0))
    result: Tensor = gradients(case.weight, case.x, case.grad_output)
    return result


def opacus(case: "Case") -> Tensor:
    """Opacus' grad sampler for convolutions.

    Raises:
        TooLargeError: its products over all pairs of groups need more entries than the limit.
    """
    h, samples = case.layer, len(case.x)
    entries = samples * h.groups * case.weight.numel()
    if entries > MOST_ENTRIES:
        raise TooLargeError(f"{float(entries):.0e} entries")
    layer = torch.nn.Conv2d(
        h.in_channels, h.out_channels, h.kernel_size, bias=False, device="meta", **case.settings
    )
    sample = import_module("opacus.grad_sample.conv").compute_conv_grad_sample
    result: Tensor = sample(layer, [case.x], case.grad_output)[layer.weight]
    return result


def squared_norms(gradients: Tensor) -> Tensor:
    return gradients.flatten(1).square().sum(1)


PER_SAMPLE: Mapping[str, Gradients] = {
    "loop": loop,
    "grouped": grouped,
    "unfold": unfold,
    "vmap": vmap,
    **({"opacus": opacus} if find_spec("opacus") else {}),
}
