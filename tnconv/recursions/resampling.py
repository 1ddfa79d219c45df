"""Averages and interpolations: linear operations whose Jacobian has other entries than 0 and 1."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tnconv.recursions.step import Flow, Flows, Step, node_name, register_rule


@register_rule("Mean")
def mean(step: Step) -> Flows:
    """``1/k²`` for each of k entries."""
    return _averaged(step, lambda s, before: before.numel() // max(1, s.numel()))


@register_rule("AvgPool2D", "AvgPool3D")
def avg_pool(step: Step) -> Flows:
    """The inverse square of each window's divisor: ``1/|K|²``, but at borders and in ceil mode."""
    names = ("kernel_size", "stride", "padding", "count_include_pad", "divisor_override")
    return averages_over_windows(step, *[getattr(step.node, f"_saved_{name}") for name in names])


def averages_over_windows(
    step: Step,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    divisor_override: int | None,
) -> Flows:
    """Averages with torch's settings, of which one stands for all dimensions."""
    if divisor_override is not None:
        return _averaged(step, lambda s, before: divisor_override)
    stride = stride or kernel

    def count(outputs: int, inputs: int, at: int) -> Tensor:
        k, p = (each[at] if len(each) > 1 else each[0] for each in (kernel, padding))
        start = torch.arange(outputs) * (stride[at] if len(stride) > 1 else stride[0]) - p
        end = (start + k).clamp(max=inputs + p)
        if not count_include_pad:
            start, end = start.clamp(min=0), end.clamp(max=inputs)
        return torch.as_tensor(end - start)

    return _averaged(step, lambda s, before: _windows(s, before, len(kernel), count))


@register_rule("AdaptiveAvgPool2D", "AdaptiveAvgPool3D")
def adaptive_avg_pool(step: Step) -> Flows:
    """Windows from ``⌊o I / O⌋`` to ``⌈(o + 1) I / O⌉``."""
    return adaptive_averages(step, 2 if "2D" in node_name(step.node) else 3)


def adaptive_averages(step: Step, dims: int) -> Flows:
    """Windows that cover each dimension evenly."""

    def count(outputs: int, inputs: int, at: int) -> Tensor:
        o = torch.arange(outputs)
        return -((o + 1) * inputs // -outputs) - o * inputs // outputs

    return _averaged(step, lambda s, before: _windows(s, before, dims, count))


def _averaged(step: Step, divisor: Callable[[Tensor, Tensor], Any]) -> Flows:
    """Windows whose entries have one coefficient: the reciprocal of a divisor."""
    g, s = step.flow.gradient, step.flow.diagonal
    (like,) = step.pulled([s])[:1]
    assert like is not None
    parts = divisor(s, like)
    if isinstance(parts, Tensor):
        (diagonal,) = step.pulled([s / parts.to(s)])[:1]
        assert diagonal is not None
    else:
        diagonal = like / parts
    gradient = step.pulled([g])[0] if g is not None and step.wants_gradient[0] else None
    return (Flow(gradient, diagonal),)


def _windows(
    s: Tensor, before: Tensor, dims: int, count: Callable[[int, int, int], Tensor]
) -> Tensor:
    """The product over dimensions of windows' sizes."""
    shapes = zip(s.shape[-dims:], before.shape[-dims:], strict=True)
    product = torch.ones(())
    for at, (outputs, inputs) in enumerate(shapes):
        product = product.unsqueeze(-1) * count(outputs, inputs, at)
    return product


@register_rule("UpsampleLinear1D", "UpsampleBilinear2D", "UpsampleBicubic2D", "UpsampleTrilinear3D")
def upsample(step: Step) -> Flows:
    """Interpolation in one dimension after the other: the square of each one's matrix."""
    g, s, dims = step.flow.gradient, step.flow.diagonal, step.flow.diagonal.dim() - 2
    for at, matrix in enumerate(_interpolations(step.node, dims)):
        square = matrix.to(s).square()
        s = (s.transpose(2 + at, -1) @ square).transpose(2 + at, -1)
    gradient = step.pulled([g])[0] if g is not None and step.wants_gradient[0] else None
    return (Flow(gradient, s.contiguous()),)


def _interpolations(node: Any, dims: int) -> list[Tensor]:
    """``A[o, i]`` of every dimension: what becomes of unit vectors."""
    run = {
        "UpsampleLinear1D": torch.ops.aten.upsample_linear1d,
        "UpsampleBilinear2D": torch.ops.aten.upsample_bilinear2d,
        "UpsampleBicubic2D": torch.ops.aten.upsample_bicubic2d,
        "UpsampleTrilinear3D": torch.ops.aten.upsample_trilinear3d,
    }[node_name(node).removesuffix("Backward0")]
    names: Sequence[str] = ("scales",) if dims == 1 else ("d", "h", "w")[-dims:]
    scales = [getattr(node, "_saved_" + (n if dims == 1 else f"scales_{n}")) for n in names]
    found = []
    for at in range(dims):
        inputs, outputs = node._saved_self_sym_sizes[2 + at], node._saved_output_size[at]
        shape, size = [inputs, 1, *[1] * dims], [1] * dims
        shape[2 + at], size[at] = inputs, outputs
        own = [scale if other == at else None for other, scale in enumerate(scales)]
        eye = torch.eye(inputs, dtype=torch.float64).reshape(shape)
        found.append(run(eye, size, node._saved_align_corners, *own).reshape(inputs, outputs).T)
    return found
