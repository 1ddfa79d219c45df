"""Operations: functions that build diagrams of shapes and settings become functions of tensors."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TypeVarTuple

import torch
from torch import Tensor

from tnconv.codegen import Program
from tnconv.codegen.lowering import layouts
from tnconv.codegen.tiers import Build, FirstLookup, device_of, looked_up, searched
from tnconv.diagrams import Expression, Hyperparameters, TensorNetwork
from tnconv.diagrams.hyperparameters import Values
from tnconv.diagrams.layer_networks import layer
from tnconv.functional.dynamo import allow_in_graph

Settings = TypeVarTuple("Settings")
Shape = Sequence[int]
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def program(
    compiled: Build,
    device: str,
    channels_last: tuple[int, ...],
    build: Callable[[*Settings], Expression],
    *settings: *Settings,
) -> Program:
    """The diagram that ``build`` makes of the settings, compiled by one of the compilers.

    Args:
        compiled: the compiler of a tier.
        device: for whose prices the program is chosen.
        channels_last: the positions of operands that lie so.
        build: a function to a diagram.
        settings: its arguments.
    """
    network = build(*settings)
    operands = list(network.operands)
    return compiled(network, device=device, channels_last=[operands[at] for at in channels_last])


def channels_last(operands: Sequence[Tensor]) -> tuple[int, ...]:
    """The positions of images and volumes that lie with their channels last.

    >>> channels_last((torch.rand(2, 3, 4, 5), torch.rand(2, 4, 5, 3).movedim(3, 1)))
    (1,)
    """
    found: tuple[int, ...] = ()
    for at, array in enumerate(operands):
        if not isinstance(array, Tensor) or array.is_contiguous():
            continue  # what is no tensor is refused later
        try:  # by one call: kernels drive Python's own code and data out of the caches
            last = array.is_contiguous(memory_format=_LAST[array.ndim])
            if last and 1 in array.shape:  # there it takes any stride
                last = _channels_lie_last(array)
        except KeyError:
            continue  # neither an image nor a volume
        except RuntimeError:  # it is not told where torch maps functions
            last = _channels_lie_last(array)
        if last:
            found += (at,)
    return found


def _channels_lie_last(array: Tensor) -> bool:
    return array.stride() == layouts.channels_last(array.shape)


def operation(
    build: Callable[[*Settings], Expression],
) -> Callable[[tuple[Tensor, ...], *Settings], Tensor]:
    """The operation ``(operands, *settings)`` whose diagram is ``build(*settings)``: a decorator.

    Operands come in the order in which the diagram holds them. Programs are looked up by ``build``
    and the settings, so that nothing is built at a later call with equal ones.

    >>> from tnconv import diagrams
    >>> @operation
    ... def doubled(shape: Shape) -> Expression:
    ...     return diagrams.bias((2, *shape), shape).vjp("bias")
    >>> doubled((torch.ones(2, 3),), (3,))
    tensor([2., 2., 2.])
    """

    @wraps(build)
    def run(operands: tuple[Tensor, ...], *settings: *Settings) -> Tensor:
        first = operands[0]  # most often a plain tensor of the CPU: asked for without a call
        device = "cpu" if type(first) is Tensor and first.is_cpu else device_of(first)
        found: Program
        last: tuple[int, ...] = ()
        for array in operands:  # most often all are contiguous, which takes no call, either
            if not (isinstance(array, Tensor) and array.is_contiguous()):
                last = channels_last(operands)
                break
        try:
            found = searched(program, device, last, build, *settings)
        except FirstLookup as first:
            found = first.program
        except TypeError:  # sizes can be symbols or in lists, which do not hash
            found = looked_up(program, device, last, build, *map(_hashable, settings))
        return found.on(*operands)

    # For torch.compile an operation is one call: it runs our compiler, but never traces it.
    return allow_in_graph(run)


def of_layer(
    build: Callable[[TensorNetwork, *Settings], Expression],
) -> Callable[[tuple[Tensor, ...], Shape, Shape, Values, *Settings], Tensor]:
    """The operation whose diagram is ``build(layer, *settings)`` for a layer of these shapes.

    It is a convolution, a transposed one, or a linear layer: see `layer_networks.layer`.
    """

    @wraps(build)
    def of_shapes(
        x_shape: Shape, weight_shape: Shape, h: Values, *settings: *Settings
    ) -> Expression:
        return build(layer(x_shape, weight_shape, Hyperparameters(*h)), *settings)

    return operation(of_shapes)


def several(vectors: Tensor, dims: int) -> int | None:
    """How many cotangents or tangents: the first dimension, where there is one more than usual."""
    return vectors.shape[0] if vectors.dim() == dims + 1 else None


def legs(vectors: int | None) -> dict[str, int]:
    """The leg of several cotangents or tangents, for the calculus on diagrams."""
    return {} if vectors is None else {"m": vectors}


def _hashable(setting: object) -> object:
    """Sizes as ints (under ``torch.compile`` they can be symbols) and sequences as tuples."""
    if isinstance(setting, Sequence) and not isinstance(setting, str):
        return tuple(map(_hashable, setting))
    return int(setting) if isinstance(setting, torch.SymInt) else setting
