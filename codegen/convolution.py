"""Torch's native convolution kernels, recognised as two tensors that index patterns join."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, permutations
from math import inf, prod

import torch

from tnconv.codegen import cost
from tnconv.codegen.arrays import Array, Writer
from tnconv.codegen.covers import Cover
from tnconv.codegen.native_shapes import Convolution, Shape
from tnconv.codegen.onednn import MARGIN, NARROWEST, by_vectors
from tnconv.codegen.scratch import is_small, scratch
from tnconv.codegen.views import Value
from tnconv.diagrams.affine import Leg, Pattern, Tensor, Terms

MOST_DIMENSIONS = 3
MOST_REPEATED = 4  # channels that read the same one; each has a copy of it


@dataclass(frozen=True)
class Joint:
    """One dimension: ``i = s·o + d·k - p`` with its legs, whoever holds them."""

    at: int
    i: Leg
    o: Leg
    k: Leg
    stride: int
    dilation: int
    padding: int

    def swapped(self) -> "Joint":
        """The same pattern with the roles of kernel and output exchanged."""
        return Joint(self.at, self.i, self.k, self.o, self.dilation, self.stride, self.padding)

    def mirrored(self, taps: int) -> "Joint":
        """Of unit stride, and a kernel in reverse, with the roles of input and output exchanged."""
        reach = (taps - 1) * self.dilation
        return Joint(self.at, self.o, self.i, self.k, 1, self.dilation, reach - self.padding)


@dataclass(frozen=True)
class Match:
    """Tensors ``a`` and ``b`` joined by patterns, and the roles of their other legs."""

    cover: Cover
    a: int
    b: int
    joints: tuple[Joint, ...]

    @property
    def covered(self) -> tuple[int, ...]:
        return (self.a, self.b, *(joint.at for joint in self.joints))

    def size(self, *legs: Leg) -> int:
        return prod(self.cover.network.sizes[leg] for leg in legs)

    def sizes(self, name: str) -> list[int]:
        """The sizes of all joints' legs of one name: i, o or k."""
        return [self.size(getattr(joint, name)) for joint in self.joints]

    def values(self, apart: bool = False) -> tuple[Cover, Value, Value, "Roles"]:
        """Both tensors as dense values without legs that only they hold, and the legs' roles.

        If ``apart``, all shared legs are kept, those that are to be summed as well.
        """
        cover, a = self.cover.value(self.a)
        cover, b = cover.value(self.b)
        spatial = {leg for joint in self.joints for leg in (joint.i, joint.o, joint.k)}
        writer, dense = cover.writer, []
        for own, other in ((a, b), (b, a)):
            alone = [
                dim
                for dim, leg in enumerate(own.legs)
                if leg not in {*spatial, *other.legs} and not cover.needed(leg, *self.covered)
            ]
            writer, array = writer.sum(own.array, alone)
            legs = tuple(leg for dim, leg in enumerate(own.legs) if dim not in alone)
            dense.append(Value(array, legs))
        first, second = ([leg for leg in v.legs if leg not in spatial] for v in dense)
        shared = [leg for leg in first if leg in second]
        needed = [leg for leg in shared if apart or cover.needed(leg, *self.covered)]
        roles = Roles(
            tuple(needed),
            tuple(leg for leg in shared if leg not in needed),
            tuple(leg for leg in first if leg not in shared),
            tuple(leg for leg in second if leg not in shared),
        )
        return replace(cover, writer=writer), dense[0], dense[1], roles


@dataclass(frozen=True)
class Roles:
    """Legs beside the spatial ones: shared and kept, shared and summed, of a only, of b only."""

    group: tuple[Leg, ...]
    summed: tuple[Leg, ...]
    a: tuple[Leg, ...]
    b: tuple[Leg, ...]


def native(cover: Cover) -> Iterator[Cover]:
    """Forward convolution, weight gradient, or input gradient, for every pair that matches."""
    tensors = [at for at, node in enumerate(cover.network.nodes) if isinstance(node, Tensor)]
    for a, b in permutations(tensors, 2):
        if joints := _joints(cover, a, b, "i of a"):
            match = Match(cover, a, b, joints)
            yield _forward(match)
            yield from _depthwise(match)
            swapped = tuple(joint.swapped() for joint in joints)
            yield _weight_gradient(Match(cover, a, b, swapped))
        if joints := _joints(cover, a, b, "i open"):
            match = Match(cover, a, b, joints)
            if prod(match.sizes("k")) <= prod(match.sizes("o")):
                yield _input_gradient(match)
                yield from _mirrored(match)


def _joints(cover: Cover, a: int, b: int, role: str) -> tuple[Joint, ...]:
    """Up to three patterns between two tensors, the first uncovered one among them.

    ``"i of a"``: a holds i, b holds k. ``"i open"``: a holds k, b holds o.
    """
    if cover.pattern is None or _joint(cover, cover.pattern, a, b, role) is None:
        return ()
    found = (_joint(cover, at, a, b, role) for at, _ in cover.network.patterns)
    return tuple(islice(filter(None, found), MOST_DIMENSIONS))


def _joint(cover: Cover, at: int, a: int, b: int, role: str) -> Joint | None:
    tn, pattern = cover.network, cover.network.nodes[at]
    assert isinstance(pattern, Pattern)
    if len(pattern.terms) != 3 or (value := pattern.value) is None:
        return None
    terms: Terms = pattern.terms
    negative = [leg for leg, x in terms if x < 0]
    if len(negative) == 2:
        terms, value = tuple((leg, -x) for leg, x in terms), -value
        negative = [leg for leg, x in terms if x < 0]
    if len(negative) != 1 or (steps := dict(terms))[negative[0]] != -1:
        return None
    held = {leg: [p for p in tn.holders[leg] if p != at] for leg in pattern.legs}
    closed = {leg: held[leg][0] for leg in held if len(held[leg]) == 1 and leg not in tn.open_legs}
    of_a, of_b = ([leg for leg, p in closed.items() if p == which] for which in (a, b))
    if len(of_a) != 1 or len(of_b) != 1:
        return None
    (third,) = (leg for leg in pattern.legs if leg not in (of_a[0], of_b[0]))
    if a in held[third] or b in held[third]:
        return None
    i = negative[0]
    o, k = (third, of_b[0]) if role == "i of a" else (of_b[0], of_a[0])
    if i != (of_a[0] if role == "i of a" else third):
        return None
    return Joint(at, i, o, k, steps[o], steps[k], value)


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
    vectors of channels, and take longer if depthwise.
    """
    *_, roles = match.values()
    if any(joint.stride > 1 for joint in match.joints):
        return
    summed, kept = match.size(*roles.summed), match.size(*roles.a)
    joints = (joint.mirrored(match.size(joint.k)) for joint in match.joints)
    convolution = Match(match.cover, match.b, match.a, tuple(joints))
    if summed == kept == 1 if roles.group else summed < cost.CHANNELS:
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
    options = _options(match, padding=padding, groups=match.size(*roles.group))
    shape = (image.shape[0], kernel.shape[0], *match.sizes("o"))
    code = f"F.conv{len(i)}d({image.code}, {kernel.code}{options})"
    work = _work(match, roles, "convolution", image, kernel, shape, padding)
    writer, array = writer.run(code, shape, work, f"convolution over {', '.join(i)}")
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
    like = f"{given.code}.new_empty({', '.join(map(str, shape))})"
    code = _backward(match, given.code, image.code, like, padding, match.size(*roles.group), 1)
    work = _work(match, roles, "weight gradient", image, given, shape, padding)
    writer, array = writer.run(code, shape, work, f"weight gradient over {', '.join(i)}")
    return _put(match, cover, writer, array, (*roles.group, *roles.b, *roles.a, *k))


def _input_gradient(match: Match) -> Cover:
    """``dx[b, group·a, i] = Σ_{summed,o,k} w[group·summed, a, k] v[b, group·summed, o]``."""
    cover, w, v, roles = match.values()
    i, o, k = (tuple(getattr(joint, name) for joint in match.joints) for name in "iok")
    writer, kernel = _arrange(cover.writer, w, roles.group + roles.summed, roles.a, *_each(k))
    writer, given = _arrange(writer, v, roles.b, roles.group + roles.summed, *_each(o))
    whole = _native_padding(match)
    padding = whole or [0] * len(i)
    sizes = match.sizes("i") if whole is not None else _full(match)
    shape = (given.shape[0], match.size(*roles.group, *roles.a), *sizes)
    like = f"{given.code}.new_empty({', '.join(map(str, shape))})"
    groups = match.size(*roles.group)
    code = _backward(match, given.code, like, kernel.code, padding, groups, 0)
    work = _work(match, roles, "input gradient", given, kernel, shape, padding)
    writer, array = writer.run(code, shape, work, f"input gradient over {', '.join(i)}")
    if whole is None:
        crops = [
            (-joint.padding, size + joint.padding - full)
            for joint, size, full in zip(match.joints, match.sizes("i"), sizes, strict=True)
        ]
        writer, array = writer.pad(array, [(0, 0), (0, 0), *crops])
    return _put(match, cover, writer, array, (*roles.b, *roles.group, *roles.a, *i))


def _put(match: Match, cover: Cover, writer: Writer, array: Array, legs: tuple[Leg, ...]) -> Cover:
    writer, split = writer.reshape(array, [match.size(leg) for leg in legs])
    loose = [dim for dim, leg in enumerate(legs) if not cover.needed(leg, *match.covered)]
    writer, split = writer.sum(split, loose)
    legs = tuple(leg for dim, leg in enumerate(legs) if dim not in loose)
    return cover.put(writer, match.covered, Value(split, legs), "native")


def _each(legs: Sequence[Leg]) -> list[tuple[Leg, ...]]:
    return [(leg,) for leg in legs]


def _arrange(writer: Writer, value: Value, *groups: tuple[Leg, ...]) -> tuple[Writer, Array]:
    """The value with one dimension per group of legs; single positions are nothing to reorder."""
    size = dict(zip(value.legs, value.array.shape, strict=True))
    proper = tuple(leg for leg in value.legs if size[leg] != 1)
    array = value.array.free_reshape([size[leg] for leg in proper])
    assert array is not None
    array = Value(array, proper).arranged(
        [leg for group in groups for leg in group if leg in proper]
    )
    return writer.reshape(array, [prod(size[leg] for leg in group) for group in groups])


def _full(match: Match) -> list[int]:
    """How many padded inputs the windows span: (O - 1)·s + (K - 1)·d + 1 per dimension."""
    return [
        (o - 1) * joint.stride + (k - 1) * joint.dilation + 1
        for joint, o, k in zip(match.joints, match.sizes("o"), match.sizes("k"), strict=True)
    ]


def _native_padding(match: Match) -> list[int] | None:
    """The paddings with which torch's own size formula gives every output size, if it does."""
    for joint, full, i in zip(match.joints, _full(match), match.sizes("i"), strict=True):
        rest = i + 2 * joint.padding - full
        if joint.padding < 0 or not 0 <= rest < joint.stride:
            return None
    return [joint.padding for joint in match.joints]


def _padded(
    writer: Writer, image: Array, match: Match, margin: float = inf
) -> tuple[Writer, Array, list[int]]:
    """Leave padding to the kernel, or pad and crop to just what the windows span.

    Of the last dimension the kernel adds no more than a ``margin``.
    """
    native = _native_padding(match)
    if native is not None and native[-1] <= margin:
        return writer, image, native
    pads = [
        (joint.padding, full - joint.padding - i)
        for joint, full, i in zip(match.joints, _full(match), match.sizes("i"), strict=True)
    ]
    left = [0] * len(pads) if native is None else [*native[:-1], 0]
    pads = [(0, 0) if padding else pad for padding, pad in zip(left, pads, strict=True)]
    writer, image = writer.pad(image, [(0, 0), (0, 0), *pads])
    return writer, image, left


def _options(match: Match, padding: Sequence[int], groups: int) -> str:
    """The keyword arguments that differ from torch's defaults."""
    parts = {
        "stride": [joint.stride for joint in match.joints],
        "padding": list(padding),
        "dilation": [joint.dilation for joint in match.joints],
    }
    default = {"stride": 1, "padding": 0, "dilation": 1}
    texts = [
        f"{name}={values[0] if len(set(values)) == 1 else tuple(values)}"
        for name, values in parts.items()
        if set(values) != {default[name]}
    ]
    texts += [f"groups={groups}"] if groups > 1 else []
    return "".join(f", {text}" for text in texts)


def _backward(
    match: Match,
    given: str,
    image: str,
    kernel: str,
    padding: Sequence[int],
    groups: int,
    output: int,
) -> str:
    """Torch's gradient kernel; what its output mask leaves out is only looked at for its shape."""
    stride, dilation = ([getattr(j, name) for j in match.joints] for name in ("stride", "dilation"))
    mask = [output == 0, output == 1, False]
    zeros = [0] * len(match.joints)
    return (
        f"torch.ops.aten.convolution_backward({given}, {image}, {kernel}, None, {stride}, "
        f"{list(padding)}, {dilation}, False, {zeros}, {groups}, {mask})[{output}]"
    )


def _work(
    match: Match,
    roles: Roles,
    kind: str,
    first: Array,
    second: Array,
    shape: tuple[int, ...],
    padding: Sequence[int],
) -> cost.Kernel:
    """The price of one kernel: every channel pair of a group meets at every (o, k).

    Operands in another order are copied first.
    """
    legs = (*roles.group, *roles.summed, *roles.a, *roles.b)
    flops = 2 * match.size(*legs) * prod(match.sizes("o")) * prod(match.sizes("k"))
    channels = {
        "convolution": (roles.summed, roles.b),
        "weight gradient": (roles.a, roles.b),
        "input gradient": (roles.summed, roles.a),
    }[kind]
    layer = _layer(match, roles, kind, (first.shape, second.shape), shape, padding)
    kernel = cost.convolution(
        kind,
        flops,
        (match.size(*channels[0]), match.size(*channels[1])),
        match.size(*roles.group),
        prod(match.sizes("k")),
        first.size + second.size + prod(shape),
        prod(shape),
        by_vectors(kind, layer),
    )
    copies = [cost.copy(x.size, *x.innermost).seconds for x in (first, second) if x.run < x.size]
    seconds = sum(copies) + _longer(layer, kind, bool(copies)) * kernel.seconds
    if is_small(layer):
        entries = match.size(*roles.summed, *roles.a) * prod(layer.o) * prod(layer.k)
        seconds += cost.copy(entries, layer.o[-1]).seconds
    else:
        seconds += cost.now().primitive
        seconds += cost.now().weight_entry * prod(shape) if kind == "weight gradient" else 0.0
    copied = sum(array.size for array in (first, second) if array.run < array.size)
    held = cost.item() * copied + scratch(kind, layer, cost.item(), torch.get_num_threads())
    return replace(kernel, seconds=seconds, scratch=held)


def _longer(layer: Convolution, kind: str, copied: bool) -> float:
    """How many times as long as its flops a kernel takes.

    A kernel with more positions than outputs takes torch's slow paths; with a single output it is a
    matrix product, if nothing is in the way. Gradients of windows that lie apart skip what lies
    between.
    """
    outputs, taps = prod(layer.o), prod(layer.k)
    in_the_way = outputs > 1 or layer.dilated or copied
    if taps > outputs and in_the_way and layer.channels != (1, 1):
        return 5.0
    far = all(stride >= size for stride, size in zip(layer.strides, layer.k, strict=True))
    return 1.2 if far and layer.strided and kind != "convolution" else 1.0


def _layer(
    match: Match,
    roles: Roles,
    kind: str,
    operands: tuple[Shape, Shape],
    result: Shape,
    padding: Sequence[int],
) -> Convolution:
    """The shapes of image, kernel and output, of which two are operands."""
    first, second = operands
    x, w, y = {
        "convolution": (first, second, result),
        "weight gradient": (first, result, second),
        "input gradient": (result, second, first),
    }[kind]
    strides = tuple(joint.stride for joint in match.joints)
    dilations = tuple(joint.dilation for joint in match.joints)
    return Convolution(x, w, y, match.size(*roles.group), strides, dilations, tuple(padding))
