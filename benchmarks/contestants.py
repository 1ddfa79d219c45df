"""Who computes what: for each operation, contestants as functions from a case to a call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tnconv
from benchmarks.cases import Layer
from benchmarks.per_sample import PER_SAMPLE, TooLargeError, squared_norms
from tnconv import diagrams, functional
from tnconv.diagrams import Sum, TensorNetwork

TOLERANCE = 1e-4  # largest difference to torch's result, relative to its largest entry, in float32
MOST_WORK = 2 * 10**11  # flops of an einconv expression's path; above, it is not run at all
MOST_MEMORY = 2**29  # entries of an einconv expression's largest intermediate tensor
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A layer's random operands, float32, without gradients."""

    layer: Layer
    x: Tensor  # (n, g·c, *i)
    weight: Tensor  # (g·d, c, *k)
    grad_output: Tensor  # (n, g·d, *o)

    @property
    def settings(self) -> dict[str, Any]:
        """Torch's keywords."""
        h = self.layer
        return {
            "stride": h.stride,
            "padding": h.padding,
            "dilation": h.dilation,
            "groups": h.groups,
        }


def case(layer: Layer, batch: int | None = None, device: str = "cpu") -> Case:
    """Random operands; equal for equal arguments."""
    n = batch or layer.batch
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((n, *layer.input_shape), layer.weight_shape, (n, *layer.output_shape))
    arrays = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    return Case(layer, *arrays)


def network(operation: str, case: Case) -> TensorNetwork | Sum:
    """The diagram that `tnconv.functional` compiles for an operation."""
    if operation in ("kfac_reduce", "kfac_expand"):
        build = getattr(diagrams, operation)
        factor: TensorNetwork = build(case.x.shape, case.layer.kernel_size, **case.settings)
        return factor
    net = diagrams.conv(case.x.shape, case.weight.shape, **case.settings)
    if operation == "gradient_norms":
        return diagrams.gradient_norms(net)
    if operation == "per_sample_weight_grad":
        return net.vjp("weight", per_sample=True)
    operand = {"weight_vjp": "weight", "input_vjp": "x"}.get(operation)
    return net.vjp(operand) if operand else net


def _tnconv(operation: str, case: Case) -> Call:
    """The user's call, its look-up by shapes included; compiling happens in the first one."""
    x, w, v = case.x, case.weight, case.grad_output
    if operation == "gradient_norms":
        return partial(tnconv.compile(network(operation, case)), x=x, grad_output=v)
    arguments: dict[str, tuple[object, ...]] = {
        "forward": (x, w),
        "weight_vjp": (x, w.shape, v),
        "input_vjp": (x.shape, w, v),
        "per_sample_weight_grad": (x, w.shape, v),
        "kfac_reduce": (x, case.layer.kernel_size),
        "kfac_expand": (x, case.layer.kernel_size),
    }
    function: Callable[..., Tensor] = getattr(
        functional, "conv" if operation == "forward" else operation
    )
    return partial(function, *arguments[operation], **case.settings)


def _torch(operation: str, case: Case) -> Call:
    """Native kernels; for Kronecker factors, which torch has not, unfold + matrix product.

    Per-sample gradients are one native kernel for each sample.
    """
    if operation in PER_SAMPLE_OPERATIONS:
        return _per_sample("loop", operation, case)
    if operation == "forward":
        return partial(F.conv2d, case.x, case.weight, **case.settings)
    if operation == "weight_vjp":
        return partial(_backward, case, 1)
    if operation == "input_vjp":
        return partial(_backward, case, 0)
    return partial({"kfac_reduce": _unfold_reduce, "kfac_expand": _unfold_expand}[operation], case)


def _per_sample(peer: str, operation: str, case: Case) -> Call:
    """One of the ways of `benchmarks.per_sample`; norms are taken of all gradients at once."""
    gradients = partial(PER_SAMPLE[peer], case)
    return (lambda: squared_norms(gradients())) if operation == "gradient_norms" else gradients


def _backward(case: Case, output: int) -> Tensor:
    h, zeros = case.layer, [0] * len(case.layer.stride)
    result: Tensor = torch.ops.aten.convolution_backward(
        *(case.grad_output, case.x, case.weight, None),
        *(h.stride, h.padding, h.dilation, False, zeros, h.groups),
        [output == 0, output == 1, False],
    )[output]
    return result


def _unfolded(case: Case) -> Tensor:
    h = case.layer
    unfolded = F.unfold(case.x, h.kernel_size, h.dilation, h.padding, h.stride)
    return unfolded.reshape(len(case.x), h.groups, -1, unfolded.shape[-1])  # (n, g, ck, o)


def _unfold_expand(case: Case) -> Tensor:
    """``1/N Σ_{n,o} U Uᵀ``."""
    unfolded = _unfolded(case).permute(1, 2, 0, 3).flatten(2)
    return unfolded @ unfolded.mT / len(case.x)


def _unfold_reduce(case: Case) -> Tensor:
    """``1/N Σ_n Ū Ūᵀ`` with ``Ū`` the mean of ``U`` over output positions."""
    averaged = _unfolded(case).mean(-1).transpose(0, 1)  # (g, n, ck)
    return averaged.mT @ averaged / len(case.x)


def _einconv(operation: str, case: Case) -> Call:
    """Einconv's simplified einsum expression, built here, so outside what is timed.

    Raises:
        TooLargeError: its contraction path needs more work or memory than the limits.
    """
    h, x, w, v = case.layer, case.x, case.weight, case.grad_output
    module, arguments = {
        "forward": ("convNd_forward", (x, w)),
        "weight_vjp": ("convNd_weight_vjp", (x, v, h.kernel_size)),
        "input_vjp": ("convNd_input_vjp", (w, v, h.input_shape[1:])),
        "kfac_reduce": ("convNd_kfac_reduce", (x, h.kernel_size)),
        "kfac_expand": ("convNd_kfc", (x, h.kernel_size)),
    }[operation]
    build = import_module(f"einconv.expressions.{module}").einsum_expression
    equation, operands, shape = build(*arguments, **case.settings, simplify=True)
    _limit(equation, [operand.shape for operand in operands])
    return lambda: torch.einsum(equation, *operands).reshape(shape)


def _limit(equation: str, shapes: list[torch.Size]) -> None:
    from opt_einsum import contract_path

    _, path = contract_path(equation, *shapes, shapes=True, optimize="auto")
    if path.opt_cost > MOST_WORK or path.largest_intermediate > MOST_MEMORY:
        raise TooLargeError(
            f"{float(path.opt_cost):.0e} flop, {float(path.largest_intermediate):.0e} entries"
        )


PER_SAMPLE_OPERATIONS = ("per_sample_weight_grad", "gradient_norms")
OPERATIONS = (
    *("forward", "weight_vjp", "input_vjp", "kfac_reduce", "kfac_expand"),
    *PER_SAMPLE_OPERATIONS,
)
Contestants = Mapping[str, Callable[[str, Case], Call]]


def contestants(operation: str) -> Contestants:
    """Who takes part in an operation, torch's way among them."""
    found: dict[str, Callable[[str, Case], Call]] = {"tnconv": _tnconv, "torch": _torch}
    if operation in PER_SAMPLE_OPERATIONS:
        return found | {name: partial(_per_sample, name) for name in PER_SAMPLE if name != "loop"}
    return found | ({"einconv": _einconv} if find_spec("einconv") else {})


PEERS = tuple(
    dict.fromkeys(n for operation in OPERATIONS for n in contestants(operation) if n != "tnconv")
)


def error(result: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected entry; infinite for other shapes."""
    if result.shape != expected.shape:
        return float("inf")
    largest = expected.abs().max().item() if prod(expected.shape) else 1.0
    return (result - expected).abs().max().item() / (largest or 1.0)
