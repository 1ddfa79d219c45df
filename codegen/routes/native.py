"""Torch's native convolution kernels, recognised as two tensors that index patterns join."""

from collections.abc import Iterator, Sequence
from itertools import permutations
from math import inf, prod
from typing import Any

from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.operations import Operation
from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.lowering.writer import Writer
from tnconv.codegen.prices import cost
from tnconv.codegen.prices.onednn import MARGIN, NARROWEST
from tnconv.codegen.routes.matches import Match, Roles, matched
from tnconv.codegen.routes.native_prices import price, strides
from tnconv.diagrams.affine import Leg, Tensor

MOST_REPEATED = 4  # channels that read the same one; each has a copy of it (0006)


def _convolution(image: str, kernel: str, *rest: Any) -> str:
    """With the keyword arguments that differ from torch's defaults, and a bias, if there is one."""
    *bias, stride, padding, dilation, groups = rest
    parts = (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    texts = [
        f"{name}={values[0] if len(set(values)) == 1 else values}"
        for name, values, default in parts
        if set(values) != {default}
    ]
    texts += [f"groups={groups}"] if groups > 1 else []
    texts += [f"bias={text}" for text in bias]
    return f"F.conv{len(stride)}d({', '.join([image, kernel, *texts])})"


def _settings(
    output: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> str:
    """The last arguments of torch's gradient kernel; its mask asks for one output alone."""
    mask = [output == 0, output == 1, False]
    zeros = [0 for _ in stride]
    return f"{[*stride]}, {[*padding]}, {[*dilation]}, False, {zeros}, {groups}, {mask}"


def _weight_gradient_call(given: str, image: str, shape: tuple[int, ...], *numbers: Any) -> str:
    """Of the kernel only the shape is read."""
    like = f"{given}.new_empty({', '.join(map(str, shape))})"
    settings = _settings(1, *numbers)
    return f"torch.ops.aten.convolution_backward({given}, {image}, {like}, None, {settings})[1]"


def _input_gradient_call(given: str, kernel: str, shape: tuple[int, ...], *numbers: Any) -> str:
    return f"input_gradient({given}, {kernel}, {shape}, {_settings(0, *numbers)})"


INPUT_GRADIENT_SOURCE = '''def input_gradient(grad_output, weight, shape, *settings):
    """Torch's kernel. Of the image it reads the shape and the layout, which is grad_output's."""
    image = grad_output.new_empty(shape)
    channels_last = grad_output.stride(1) == 1 and grad_output.stride(-1) == grad_output.shape[1]
    if channels_last and len(shape) > 3:
        image = grad_output.new_empty(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return torch.ops.aten.convolution_backward(grad_output, image, weight, None, *settings)[0]
'''


CONVOLUTION = Operation("convolution", _convolution, native=True, imports=("F",))
"""Of an image, a kernel and perhaps a bias: stride, padding, dilation, groups."""
INPUT_GRADIENT = Operation(
    "input_gradient",
    _input_gradient_call,
    native=True,
    imports=("torch",),
    helper=INPUT_GRADIENT_SOURCE,
)
"""Of an output's gradient and a kernel: the shape of the image, and as above."""
WEIGHT_GRADIENT = Operation(
    "weight gradient", _weight_gradient_call, native=True, imports=("torch",)
)
"""Of an output's gradient and an image: the shape of the kernel, and as above."""


def native(cover: Cover) -> Iterator[Cover]:
    """Forward convolution, weight gradient, or input gradient, for every pair that matches."""
    network, first = cover.network, cover.pattern
    assert first is not None
    joined = {at for leg in network.nodes[first].legs for at in network.holders[leg]}
    tensors = [at for at in sorted(joined) if isinstance(network.nodes[at], Tensor)]
    for a, b in permutations(tensors, 2):
        if match := matched(cover, a, b, "i of a"):
            yield _forward(match)
            yield from _depthwise(match)
            yield _weight_gradient(match.swapped)
        if match := matched(cover, a, b, "i open"):
            if prod(match.sizes("k")) <= prod(match.sizes("o")):
                yield _input_gradient(match)
                yield from _mirrored(match)


def _depthwise(match: Match) -> Iterator[Cover]:
    """Few channels as depthwise kernels, one for each pair of them, whose results are added.

    Torch has no vectors for few channels, nor for depthwise weight gradients of more than 3x3 taps,
    where samples are what is summed.
    """
    *_, roles = match.values()
    if _few(match, summed=roles.summed, repeated=roles.b):
        yield _forward(match, apart=True)


def _few(match: Match, summed: tuple[Leg, ...], repeated: tuple[Leg, ...]) -> bool:
    """Whether there are several pairs of channels, but no whole vectors, nor many to repeat."""
    sizes = match.size(*summed), match.size(*repeated)
    vectors = all(size % NARROWEST == 0 for size in sizes)
    return prod(sizes) > 1 and not vectors and sizes[1] <= MOST_REPEATED


def _mirrored(match: Match) -> Iterator[Cover]:
    """An input gradient as a convolution with the mirrored kernel, where torch does that faster.

    With unit strides ``o = i + d·(K-1-k) - (d·(K-1) - p)``. Kernels for input gradients sum whole
    vectors of channels, and take longer if depthwise; but not with channels last.
    """
    *_, roles = match.values()
    if match.cover.value(match.b)[1].array.is_channels_last or any(
        joint.stride > 1 for joint in match.joints
    ):
        return
    summed, kept = match.size(*roles.summed), match.size(*roles.a)
    joints = (joint.mirrored(match.size(joint.k)) for joint in match.joints)
    convolution = Match(match.cover, match.b, match.a, tuple(joints))
    if summed == kept == 1 if roles.group else summed < cost.in_use().machine.lanes:
        yield _forward(convolution, mirrored=True)
    if _few(match, summed=roles.summed, repeated=roles.a):
        yield _forward(convolution, apart=True, mirrored=True)


def _forward(match: Match, apart: bool = False, mirrored: bool = False) -> Cover:
    """``y[a, group·b, o] = Σ_{summed,k} x[a, group·summed, i(o,k)] w[group·b, summed, k]``.

    If ``apart``, ``summed`` and ``b`` are groups, too.
    """
    cover, x, w, roles = match.values(apart)
    if apart:
        x, roles = _repeated(match, x, roles.b), Roles(roles.group + roles.b, (), roles.a, ())
    i, o, k = (tuple(getattr(joint, name) for joint in match.joints) for name in "iok")
    writer, image = _arrange(cover.writer, x, roles.a, roles.group + roles.summed, *_each(i))
    depthwise = roles.group and match.size(*roles.summed, *roles.b) == 1 and len(k) < 3
    writer, image, padding = _padded(writer, image, match, MARGIN if depthwise else inf)
    writer, kernel = _arrange(writer, w, roles.group + roles.b, roles.summed, *_each(k))
    writer, kernel = writer.flip(kernel, range(2, 2 + len(k)) if mirrored else ())
    shape = (image.shape[0], kernel.shape[0], *match.sizes("o"))
    work = price(match, roles, "convolution", image, kernel, shape, padding)
    call = CONVOLUTION, [image, kernel], shape, work, f"convolution over {', '.join(i)}"
    lies = strides("convolution", image, kernel, shape)
    writer, array = writer.run(*call, _numbers(match, padding, roles), lies)
    return _put(match, cover, writer, array, (*roles.a, *roles.group, *roles.b, *o))


def _repeated(match: Match, value: Value, legs: tuple[Leg, ...]) -> Value:
    """The value at every position of legs that it has not."""
    array = value.array
    for leg in legs:
        array = array.unsqueeze(len(array.shape))
        array = array.expand((*array.shape[:-1], match.size(leg)))
    return Value(array, (*value.legs, *legs))


def _weight_gradient(match: Match) -> Cover:
    """``dw[group·b, a, k] = Σ_{summed,o} x[summed, group·a, i(o,k)] v[summed, group·b, o]``."""
    cover, x, v, roles = match.values()
    i, o, k = (tuple(getattr(joint, name) for joint in match.joints) for name in "iok")
    writer, image = _arrange(cover.writer, x, roles.summed, roles.group + roles.a, *_each(i))
    writer, image, padding = _padded(writer, image, match)
    writer, given = _arrange(writer, v, roles.summed, roles.group + roles.b, *_each(o))
    shape = (given.shape[1], match.size(*roles.a), *match.sizes("k"))
    work = price(match, roles, "weight gradient", image, given, shape, padding)
    call = WEIGHT_GRADIENT, [given, image], shape, work, f"weight gradient over {', '.join(i)}"
    lies = strides("weight gradient", given, image, shape)
    writer, array = writer.run(*call, (shape, *_numbers(match, padding, roles)), lies)
    return _put(match, cover, writer, array, (*roles.group, *roles.b, *roles.a, *k))


def _input_gradient(match: Match) -> Cover:
    """``dx[b, group·a, i] = Σ_{summed,o,k} w[group·summed, a, k] v[b, group·summed, o]``."""
    cover, w, v, roles = match.values()
    i, o, k = (tuple(getattr(joint, name) for joint in match.joints) for name in "iok")
    writer, kernel = _arrange(cover.writer, w, roles.group + roles.summed, roles.a, *_each(k))
    writer, given = _arrange(writer, v, roles.b, roles.group + roles.summed, *_each(o))
    whole = match.native_padding
    padding = whole or [0] * len(i)
    sizes = match.sizes("i") if whole is not None else match.full
    shape = (given.shape[0], match.size(*roles.group, *roles.a), *sizes)
    work = price(match, roles, "input gradient", given, kernel, shape, padding)
    call = INPUT_GRADIENT, [given, kernel], shape, work, f"input gradient over {', '.join(i)}"
    lies = strides("input gradient", given, kernel, shape)
    writer, array = writer.run(*call, (shape, *_numbers(match, padding, roles)), lies)
    if whole is None:
        crops = [
            (-joint.padding, size + joint.padding - full)
            for joint, size, full in zip(match.joints, match.sizes("i"), sizes, strict=True)
        ]
        writer, array = writer.pad(array, [(0, 0), (0, 0), *crops])
    return _put(match, cover, writer, array, (*roles.b, *roles.group, *roles.a, *i))


def _numbers(match: Match, padding: Sequence[int], roles: Roles) -> tuple[object, ...]:
    """Stride, padding, dilation and groups."""
    stride = tuple(joint.stride for joint in match.joints)
    dilation = tuple(joint.dilation for joint in match.joints)
    return stride, tuple(padding), dilation, match.size(*roles.group)


def _put(
    match: Match, cover: Cover, writer: Writer, array: Strided, legs: tuple[Leg, ...]
) -> Cover:
    writer, split = writer.reshape(array, [match.size(leg) for leg in legs])
    loose = [dim for dim, leg in enumerate(legs) if not cover.needed(leg, *match.covered)]
    writer, split = writer.sum(split, loose)
    legs = tuple(leg for dim, leg in enumerate(legs) if dim not in loose)
    return cover.put(writer, match.covered, Value(split, legs), "native")


def _each(legs: Sequence[Leg]) -> list[tuple[Leg, ...]]:
    return [(leg,) for leg in legs]


def _arrange(writer: Writer, value: Value, *groups: tuple[Leg, ...]) -> tuple[Writer, Strided]:
    """The value with one dimension per group of legs; single positions are nothing to reorder."""
    size = dict(zip(value.legs, value.array.shape, strict=True))
    proper = tuple(leg for leg in value.legs if size[leg] != 1)
    array = value.array.free_reshape([size[leg] for leg in proper])
    assert array is not None
    array = Value(array, proper).arranged(
        [leg for group in groups for leg in group if leg in proper]
    )
    return writer.reshape(array, [prod(size[leg] for leg in group) for group in groups])


def _padded(
    writer: Writer, image: Strided, match: Match, margin: float = inf
) -> tuple[Writer, Strided, list[int]]:
    """Leave padding to the kernel, or pad and crop to just what the windows span.

    Of the last dimension the kernel adds no more than a ``margin``.
    """
    native = match.native_padding
    if native is not None and native[-1] <= margin:
        return writer, image, native
    pads = [
        (joint.padding, full - joint.padding - i)
        for joint, full, i in zip(match.joints, match.full, match.sizes("i"), strict=True)
    ]
    left = [0] * len(pads) if native is None else [*native[:-1], 0]
    pads = [(0, 0) if padding else pad for padding, pad in zip(left, pads, strict=True)]
    writer, image = writer.pad(image, [(0, 0), (0, 0), *pads])
    return writer, image, left
