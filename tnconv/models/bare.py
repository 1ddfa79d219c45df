"""Parameters that a model multiplies with or adds by itself, where no module does it for them.

Layer scales and positional embeddings are such. While the model runs, products and sums with them
are seen as calls of layers, with diagrams of their own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from tnconv.diagrams import Tensor as Operand
from tnconv.diagrams import TensorNetwork, View
from tnconv.models.calls import Call, Pass
from tnconv.models.capture import Inert, Watch
from tnconv.models.graph import reaching, unexplained
from tnconv.models.layers import Networks, Operation, Shape, describes, register_layer
from tnconv.models.modules import own_parameters

OPERANDS = {"mul": "weight", "add": "bias"}


class Bare(nn.Module):
    """A product with a parameter, or a sum: a layer without a module."""

    def __init__(self, operand: str, shape: Shape) -> None:
        super().__init__()
        self.operand, self.shape = operand, shape


def broadcast(operand: str, x_shape: Shape, shape: Shape, output_shape: Shape) -> Networks:
    """``y[n, o] = x[n, o] w[o]`` or ``b[o]``, where x and the parameter can lack dimensions."""
    legs = ("n", *(f"o{at}" for at in range(1, len(output_shape))))
    sizes = dict(zip(legs, output_shape, strict=True))

    def view(given: Shape) -> View:
        aligned = zip(given, legs[len(legs) - len(given) :], strict=True)
        return View.of(sizes, *(leg if size == sizes[leg] else () for size, leg in aligned))

    parameter = view(shape) if len(shape) < len(legs) else view((0, *shape[1:]))
    nodes = (Operand("x", view(x_shape)), Operand(operand, parameter))
    used = nodes if operand == "weight" else nodes[1:]
    return {operand: TensorNetwork(used, View.of(sizes, *legs), sizes)}


@register_layer(Bare)
def _bare(layer: Bare, x: Tensor, output_shape: Shape) -> tuple[Operation, Tensor]:
    return Operation(broadcast, (layer.operand, tuple(x.shape), layer.shape, output_shape)), x


@contextmanager
def noticing(watch: Watch) -> Iterator[None]:
    """See products and sums with bare parameters as calls, as long as the context is open."""
    found = _candidates(watch.model) if watch.per_sample else {}
    if not found:
        yield
        return
    modes: list[_Functions] = []
    begin = Inert(lambda *_: _enter(modes, _Functions(watch, found)))
    end = Inert(lambda *_: _leave(modes))
    handles = (
        watch.model.register_forward_pre_hook(begin),
        watch.model.register_forward_hook(end, prepend=True, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _leave(modes)


def choose(here: Pass, roots: Sequence[Tensor]) -> None:
    """Leave calls without a diagram no more parameters than they are needed for.

    Where bare parameters have diagrams for all their uses, those are taken; otherwise none of them.
    """
    unknown = [call for call in here.calls if not call.described]
    if not unknown:
        return
    bare = [call for call in here.calls if isinstance(call.module, Bare)]
    parameters = {p for call in bare for _, p in call.parameters}
    known = [call for call in here.calls if call.described]
    explained = parameters - {*unexplained(roots, known, parameters)}
    for call in bare:
        here.keep(call, explained)
    used = {*reaching(roots, [p for call in unknown for _, p in call.parameters])}
    for call in unknown:
        here.keep(call, used - explained)


def _candidates(model: nn.Module) -> Mapping[nn.Parameter, str]:
    """The parameters of modules without diagrams, and of no others, with their names."""
    described = {
        parameter
        for module in model.modules()
        if describes(module)
        for _, parameter in own_parameters(module)
    }
    return {p: name for name, p in model.named_parameters() if p not in described}


def _enter(modes: list["_Functions"], mode: "_Functions") -> None:
    mode.__enter__()  # type: ignore[no-untyped-call]
    modes.append(mode)


def _leave(modes: list["_Functions"]) -> None:
    while modes:
        modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Functions(TorchFunctionMode):
    """Runs functions as they are, and looks at those of parameters with names."""

    def __init__(self, watch: Watch, names: Mapping[nn.Parameter, str]) -> None:
        super().__init__()
        self.watch, self.names = watch, names

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        operand = OPERANDS.get(func.__name__)
        if operand is not None and len(args) == 2 and not kwargs:
            for x, parameter in (args, args[::-1]):
                if isinstance(parameter, nn.Parameter) and parameter in self.names:
                    self._see(operand, x, parameter, output)
        return output

    def _see(self, operand: str, x: Any, parameter: nn.Parameter, output: Tensor) -> None:
        """Note a product or sum of what samples have of their own with what they have in common."""
        layer, passes = Bare(operand, tuple(parameter.shape)), self.watch.passes
        if not isinstance(x, Tensor) or isinstance(x, nn.Parameter) or not passes:
            return
        learns = parameter.requires_grad and self.watch.wanted(layer, parameter)
        if not learns or not _is_live(output) or self.watch.silent or output.is_complex():
            return
        along_batch = len(layer.shape) == output.dim() and layer.shape[0] != 1
        if output.shape[:1] != (passes[-1].samples,) or along_batch:
            return
        name, shape, edge = self.names[parameter], tuple(output.shape), get_gradient_edge(output)
        call = Call(name, layer, (x,), {}, shape, edge, True, ((operand, parameter),))
        self.watch.follow(passes[-1], call, output)


def _is_live(output: Tensor) -> bool:
    """Whether autograd itself, and no transform, records what a function gave."""
    return output.requires_grad and not is_functorch_wrapped_tensor(output)
