"""Who computes what: for each operation, contestants as functions from a case to a call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tnconv
from benchmarks import further
from benchmarks.cases import Layer
from benchmarks.per_sample import PER_SAMPLE, TooLargeError, squared_norms, unfolded_input
from tnconv import diagrams, functional
from tnconv.diagrams import Expression, Hyperparameters
from tnconv.diagrams.layer_networks import layer
from tnconv.functional.lookup import channels_last

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""The largest difference to torch's result, relative to its largest entry, by dtype."""
MOST_WORK = 2 * 10**11  # flops of an einconv expression's path; above, it is not run at all
MOST_ENTRIES = 2**26  # of one of its index patterns
MOST_MEMORY = 2**29  # entries of an einconv expression's largest intermediate tensor
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A layer's random operands, without gradients."""

    layer: Layer
    x: Tensor  # (n, g·c, *i)
    weight: Tensor  # (g·d, c, *k)
    grad_output: Tensor  # (n, g·d, *o)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Torch's keywords."""
        h = self.layer
        extra = {"output_padding": h.output_padding} if h.transposed else {}
        steps = {"stride": h.stride, "padding": h.padding, "dilation": h.dilation}
        return {**steps, "groups": h.groups, **extra}

    @cached_property
    def own_settings(self) -> dict[str, Any]:
        """Those of our functions of convolutions and transposed ones alike."""
        return self.settings | ({"transposed": True} if self.layer.transposed else {})

    @cached_property
    def native(self) -> Callable[..., Tensor]:
        """Torch's layer."""
        function: Callable[..., Tensor] = getattr(
            F, f"conv{'_transpose' * self.layer.transposed}{self.layer.dims}d"
        )
        return function

    def padded(self) -> "Case":
        """The case itself, or that of a padded input where torch's kernels cannot pad by side."""
        if not self.layer.asymmetric:
            return self
        sides = [side for pair in reversed(self.layer.pads) for side in pair]
        return Case(self.layer.unpadded, F.pad(self.x, sides), self.weight, self.grad_output)

    def crop(self, grad_input: Tensor) -> Tensor:
        """The part of a padded input's gradient that is the input's."""
        for dim, (left, _) in enumerate(self.layer.pads, 2):
            if grad_input.shape[dim] != self.x.shape[dim]:
                grad_input = grad_input.narrow(dim, left, self.x.shape[dim])
        return grad_input


def case(
    layer: Layer,
    batch: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Case:
    """Random operands; equal for equal arguments, but rounded to the dtype."""
    n = batch or layer.batch
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((n, *layer.input_shape), layer.weight_shape, (n, *layer.output_shape))
    arrays = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    return Case(layer, *(each.to(dtype=dtype, memory_format=memory_format) for each in arrays))


def network(operation: str, case: Case) -> Expression:
    """The diagram that `tnconv.functional` compiles for an operation."""
    h = case.layer
    if operation in ("kfac_reduce", "kfac_expand"):
        build: Callable[..., Expression] = getattr(diagrams, operation)
        return build(case.x.shape, h.kernel_size, **case.own_settings, scale="kfc")
    net = layer(case.x.shape, case.weight.shape, Hyperparameters(**case.own_settings))
    if operation == "gradient_norms":
        return diagrams.gradient_norms(net)
    if operation == "per_sample_weight_grad":
        return net.vjp("weight", per_sample=True)
    operand = {"weight_vjp": "weight", "input_vjp": "x"}.get(operation)
    return net.vjp(operand) if operand else net


def compiled(operation: str, case: Case, **options: Any) -> tnconv.Program:
    """The program for an operation on operands that lie as the case's do."""
    net = network(operation, case)
    last = [name for name in net.operands if channels_last([getattr(case, name)])]
    return tnconv.compile(net, channels_last=last, **options)


def _tnconv(operation: str, case: Case) -> Call:
    """The user's call, its look-up by shapes included; compiling happens in the first one."""
    x, w, v = case.x, case.weight, case.grad_output
    if operation == "forward":
        conv = functional.conv_transpose if case.layer.transposed else functional.conv
        return partial(conv, x, w, **case.settings)
    arguments: dict[str, tuple[object, ...]] = {
        "weight_vjp": (x, w.shape, v),
        "input_vjp": (x.shape, w, v),
        "per_sample_weight_grad": (x, w.shape, v),
        "gradient_norms": (x, w.shape, v),
        "kfac_reduce": (x, case.layer.kernel_size),
        "kfac_expand": (x, case.layer.kernel_size),
    }
    function: Callable[..., Tensor] = getattr(functional, operation)
    settings = case.own_settings | ({"scale": "kfc"} if operation.startswith("kfac") else {})
    return partial(function, *arguments[operation], **settings)


def tuned(operation: str, case: Case) -> Call:
    """A program that was chosen by measuring the best few."""
    program = compiled(operation, case, tune=True, device=case.x.device)
    return partial(program, **{name: getattr(case, name) for name in program.operands})


def _torch(operation: str, case: Case) -> Call:
    """Native kernels; for Kronecker factors, which torch has not, unfold + matrix product.

    Per-sample gradients are one native kernel for each sample.
    """
    if operation in PER_SAMPLE_OPERATIONS:
        return _per_sample("loop", operation, case)
    if operation == "forward":
        if case.layer.asymmetric:
            return lambda: _forward(case.padded())
        return partial(case.native, case.x, case.weight, **case.settings)
    if operation == "weight_vjp":
        return partial(_backward, case, 1)
    if operation == "input_vjp":
        padded = case.padded()  # of the input only the shape is read
        return lambda: case.crop(_backward(padded, 0))
    return partial({"kfac_reduce": _unfold_reduce, "kfac_expand": _unfold_expand}[operation], case)


def _forward(case: Case) -> Tensor:
    return case.native(case.x, case.weight, **case.settings)


def _per_sample(peer: str, operation: str, case: Case) -> Call:
    """One of the ways of `benchmarks.per_sample`; norms are taken of all gradients at once."""
    gradients = partial(PER_SAMPLE[peer], case)
    return (lambda: squared_norms(gradients())) if operation == "gradient_norms" else gradients


def _backward(case: Case, output: int) -> Tensor:
    case = case.padded()
    h = case.layer
    result: Tensor = torch.ops.aten.convolution_backward(
        *(case.grad_output, case.x, case.weight, None, h.stride, h.padding, h.dilation),
        *(h.transposed, h.output_padding or [0] * h.dims, h.groups),
        [output == 0, output == 1, False],
    )[output]
    return result


def _unfold_expand(case: Case) -> Tensor:
    """``1/N Σ_{n,o} U Uᵀ``."""
    unfolded = unfolded_input(case).permute(1, 2, 0, 3).flatten(2)
    return unfolded @ unfolded.mT / len(case.x)


def _unfold_reduce(case: Case) -> Tensor:
    """``1/N Σ_n Ū Ūᵀ`` with ``Ū`` the mean of ``U`` over output positions."""
    averaged = unfolded_input(case).mean(-1).transpose(0, 1)  # (g, n, ck)
    return averaged.mT @ averaged / len(case.x)


def _einconv(operation: str, case: Case) -> Call:
    """Einconv's simplified einsum expression, built here, so outside what is timed.

    Raises:
        NotImplementedError: it has no transposed convolutions.
        TooLargeError: its patterns or its contraction path need more than the limits.
    """
    if case.layer.transposed:
        raise NotImplementedError("no transposed convolutions")
    given, case = case, case.padded()
    h, x, w, v = case.layer, case.x, case.weight, case.grad_output
    sizes = zip(h.kernel_size, h.output_shape[1:], h.input_shape[1:], strict=True)
    if (entries := max(map(prod, sizes))) > MOST_ENTRIES:
        raise TooLargeError(f"{float(entries):.0e} entries of an index pattern")
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
    call: Call = lambda: torch.einsum(equation, *operands).reshape(shape)  # noqa: E731
    return (lambda: given.crop(call())) if operation == "input_vjp" else call


def _limit(equation: str, shapes: list[torch.Size]) -> None:
    from opt_einsum import contract_path

    _, path = contract_path(equation, *shapes, shapes=True, optimize="auto")
    if path.opt_cost > MOST_WORK or path.largest_intermediate > MOST_MEMORY:
        raise TooLargeError(
            f"{float(path.opt_cost):.0e} flop, {float(path.largest_intermediate):.0e} entries"
        )


PER_SAMPLE_OPERATIONS = ("per_sample_weight_grad", "gradient_norms")
TUNED = (*PER_SAMPLE_OPERATIONS, "kfac_expand")  # where the best few programs are measured, too
OPERATIONS = (
    *("forward", "weight_vjp", "input_vjp", "kfac_reduce", "kfac_expand"),
    *PER_SAMPLE_OPERATIONS,
)
Contestants = Mapping[str, Callable[[str, Case], Call]]


def contestants(operation: str) -> Contestants:
    """Who takes part in an operation, torch's way among them, whether it is installed or not."""
    if operation in further.WAYS:
        return {
            "tnconv": lambda operation, case: further.WAYS[operation](case).ours,
            "torch": lambda operation, case: further.WAYS[operation](case).torch,
        }
    found: dict[str, Callable[[str, Case], Call]] = {"tnconv": _tnconv, "torch": _torch}
    if operation in PER_SAMPLE_OPERATIONS:
        return found | {name: partial(_per_sample, name) for name in PER_SAMPLE if name != "loop"}
    return found | {"einconv": _einconv}


PEERS = tuple(
    dict.fromkeys(n for operation in OPERATIONS for n in contestants(operation) if n != "tnconv")
)


def missing() -> frozenset[str]:
    """The contestants that are packages of their own and not installed here."""
    return frozenset(name for name in ("einconv", "opacus") if find_spec(name) is None)


def error(result: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected entry; infinite for other shapes."""
    if result.shape != expected.shape:
        return float("inf")
    largest = expected.abs().max().item() if prod(expected.shape) else 1.0
    return (result - expected).abs().max().item() / (largest or 1.0)
