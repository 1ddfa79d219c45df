"""Per-sample gradients of a weight, and their squared norms, by the ways others know."""

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Layer

if TYPE_CHECKING:
    from benchmarks.contestants import Case

MOST_ENTRIES = 2**29  # of opacus' products over all pairs of groups
Gradients = Callable[["Case"], Tensor]


class TooLargeError(Exception):
    """A contestant would need so much work or memory that it is not run."""


def loop(case: "Case") -> Tensor:
    """Torch's own weight-gradient kernel, once for each sample."""
    case = case.padded()
    pairs = zip(case.x.split(1), case.grad_output.split(1), strict=True)
    return torch.stack([weight_gradient(case.layer, x, v, case.weight) for x, v in pairs])


def grouped(case: "Case") -> Tensor:
    """Torch's weight-gradient kernel with samples as groups."""
    case = case.padded()
    x, v = (array.reshape(1, -1, *array.shape[2:]) for array in (case.x, case.grad_output))
    samples = len(case.x)
    weights = case.weight.expand(samples, *case.weight.shape).flatten(0, 1)
    gradients = weight_gradient(case.layer, x, v, weights, samples)
    return gradients.reshape(samples, *case.weight.shape)


def weight_gradient(h: Layer, x: Tensor, v: Tensor, weight: Tensor, samples: int = 1) -> Tensor:
    result: Tensor = torch.ops.aten.convolution_backward(
        *(v, x, weight, None, h.stride, h.padding, h.dilation),
        *(h.transposed, h.output_padding or [0] * h.dims, samples * h.groups),
        [False, True, False],
    )[1]
    return result


def unfold(case: "Case") -> Tensor:
    """Unfolded input times output gradient, a batched matrix product."""
    h, samples = case.layer, len(case.x)
    patches = unfolded_input(case).flatten(0, 1)
    given = case.grad_output.reshape(samples * h.groups, -1, patches.shape[-1])
    gradients = torch.bmm(given, patches.mT)
    if h.transposed:  # whose weights have in-channels first
        taps = gradients.shape[1], h.in_channels // h.groups, *h.kernel_size
        gradients = gradients.reshape(-1, *taps).transpose(1, 2)
    return gradients.reshape(samples, *case.weight.shape)


def unfolded_input(case: "Case") -> Tensor:
    """``U[n, g, ck, o]`` by torch, in other than two dimensions and if transposed by unfoldNd."""
    case = case.padded()
    h = case.layer
    if h.transposed:
        patches = import_module("unfoldNd").unfold_transposeNd(
            case.x, h.kernel_size, h.stride, h.padding, h.output_padding, h.dilation
        )
    else:
        unfold = F.unfold if h.dims == 2 else import_module("unfoldNd").unfoldNd
        patches = unfold(case.x, h.kernel_size, h.dilation, h.padding, h.stride)
    result: Tensor = patches.reshape(len(case.x), h.groups, -1, patches.shape[-1])
    return result


def vmap(case: "Case") -> Tensor:
    """``vmap(grad)`` of the layer, as torch's own tutorial on per-sample gradients does."""
    case = case.padded()

    def inner(weight: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return (case.native(x.unsqueeze(0), weight, **case.settings)[0] * v).sum()

    gradients = torch.func.vmap(torch.func.grad(inner), (None, 0, 0))
    result: Tensor = gradients(case.weight, case.x, case.grad_output)
    return result


def opacus(case: "Case") -> Tensor:
    """Opacus' grad sampler for convolutions.

    Raises:
        NotImplementedError: it has none for transposed convolutions.
        TooLargeError: its products over all pairs of groups need more entries than the limit.
    """
    case = case.padded()
    h, samples = case.layer, len(case.x)
    if h.transposed:
        raise NotImplementedError("no grad sampler for transposed convolutions")
    entries = samples * h.groups * case.weight.numel()
    if entries > MOST_ENTRIES:
        raise TooLargeError(f"{float(entries):.0e} entries")
    layer = _module(h)
    sample = import_module("opacus.grad_sample.conv").compute_conv_grad_sample
    result: Tensor = sample(layer, [case.x], case.grad_output)[layer.weight]
    return result


@cache
def _module(h: Layer) -> torch.nn.Module:
    """The layer without values, of which opacus reads the settings."""
    return (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[h.dims - 1](
        *(h.in_channels, h.out_channels, h.kernel_size, h.stride, h.padding, h.dilation),
        **{"groups": h.groups, "bias": False, "device": "meta"},
    )


def squared_norms(gradients: Tensor) -> Tensor:
    return gradients.flatten(1).square().sum(1)


PER_SAMPLE: Mapping[str, Gradients] = {
    "loop": loop,
    "grouped": grouped,
    "unfold": unfold,
    "vmap": vmap,
    "opacus": opacus,
}
