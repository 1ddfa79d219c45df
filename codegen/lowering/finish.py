"""The end of a plan: what is contracted last, where its scale goes, and the view of its result."""

from dataclasses import replace
from fractions import Fraction
from math import inf, isqrt, prod, sqrt

from tnconv.codegen.lowering import layouts
from tnconv.codegen.lowering.contraction import contract
from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.layouts import Layout
from tnconv.codegen.lowering.pairs import sum_out
from tnconv.codegen.lowering.plans import Plan
from tnconv.codegen.lowering.strided import ONE, Strided
from tnconv.codegen.lowering.values import Value, write
from tnconv.codegen.lowering.writer import CONTIGUOUS, SCALE, Writer
from tnconv.codegen.prices import cost
from tnconv.diagrams.affine import Leg, Sizes, View
from tnconv.diagrams.network import TensorNetwork

NUMBER = 16  # bytes of a factor as a tensor, in double precision and in that of the operands


def finished(
    cover: Cover, form: str, optimize: str, layout: Layout, limit: float = inf
) -> Plan | None:
    """Contract the dense tensors that are left, scale, and write the result's view.

    None stands for a plan whose contraction exceeds a ``limit`` of seconds.
    """
    network, values = cover.network, []
    for at in range(len(network.nodes)):
        cover, value = cover.value(at)
        values.append(value)
    wanted = _in_memory(network.result, layout)
    output = [leg for leg in wanted if network.holders[leg]]
    loose = [leg for leg in network.sizes if not network.holders[leg]]
    scale = network.scale * prod(
        network.sizes[leg] for leg in loose if leg not in network.open_legs
    )
    how = output, network.sizes, scale, optimize, limit
    if (contracted := _contract_scaled(cover.writer, values, *how)) is None:
        return None
    writer, value = contracted
    writer, result = write(writer, value, network.result, network.sizes)
    writer, result = _laid_out(writer, result, layout)
    return Plan(form, cover.routes, writer.steps, result, writer.choices)


def _in_memory(result: View, layout: Layout) -> tuple[Leg, ...]:
    """The legs of a result in the order in which it is to lie in memory."""
    if layout != "channels last":
        return result.legs
    axes, of_dims = iter(result.axes), list[list[Leg]]()
    for size in result.shape:
        legs, found = list[Leg](), 1
        while found != size:
            axis = next(axes)
            legs, found = [*legs, *(leg for leg, _ in axis.terms)], found * axis.size
        of_dims.append(legs)
    moved = [leg for dim in layouts.channels_moved(len(of_dims)) for leg in of_dims[dim]]
    return tuple(dict.fromkeys([*moved, *result.legs]))  # of one position: in any order


def _laid_out(writer: Writer, array: Strided, layout: Layout) -> tuple[Writer, Strided]:
    """The array in a layout: a copy, unless it lies so."""
    there = array.channels_moved() if layout == "channels last" else array
    if layout == "any" or there.run == there.size:
        return writer, array
    kernel = cost.copy(there.size, *there.innermost)
    writer, there = writer.run(CONTIGUOUS, [there], there.shape, kernel)
    return writer, there.channels_moved(back=True) if layout == "channels last" else there


def _contract_scaled(
    writer: Writer,
    values: list[Value],
    output: list[Leg],
    sizes: Sizes,
    scale: Fraction,
    optimize: str,
    limit: float,
) -> tuple[Writer, Value] | None:
    """Contract and scale: the result, or one half of a Gram product where that is smaller.

    Both halves are the same array, so that it takes the square root of the scale.
    """
    if not values:
        return _scaled(writer, Value(ONE, ()), scale)
    if len(values) == 2:
        a, b = values
        writer, a = sum_out(writer, a, {*output, *b.legs})
        writer, b = sum_out(writer, b, {*output, *a.legs})
        values = [a, b]
    if len(values) == 2 and values[0].array is values[1].array:
        size = prod(values[0].array.shape)
        small = scale > 0 and size < prod(sizes[leg] for leg in output)
        writer, small = writer.deciding("scaled half", small)
        if small:
            writer, half = _scaled(writer, values[0], sqrt(scale))
            values = [Value(half.array, value.legs) for value in values]
            scale = Fraction(1)
    if (contracted := contract(writer, values, output, sizes, optimize, limit)) is None:
        return None
    return _scaled(*contracted, scale)


def with_scaled_operand(cover: Cover) -> Cover:
    """A Gram network of one operand, whose scale is moved into it if nothing later is smaller.

    The operand enters twice, so that it takes the square root of the scale.
    """
    network = cover.network
    names = [tensor.name for tensor in network.tensors]
    if len(names) != 2 or network.scale <= 0 or any([*cover.arrays] != [name] for name in names):
        return cover
    (name,) = cover.arrays
    array = cover.arrays[name]
    if network.scale == 1:
        return cover
    small = array.size <= min(prod(network.shape), _half(network))
    writer, small = cover.writer.deciding("scaled operand", small)
    if not small:
        return replace(cover, writer=writer)
    writer, value = _scaled(writer, Value(array, ()), sqrt(network.scale))
    return replace(cover, network=network.with_(scale=1), arrays={name: value.array}, writer=writer)


def _half(network: TensorNetwork) -> int:
    """Entries of one half of a Gram network: its shared legs, and its own half of the open ones."""
    kinds = {leg: [type(network.nodes[at]) for at in held] for leg, held in network.holders.items()}
    shared = [leg for leg, held in kinds.items() if len(held) > len({*held})]
    own = prod(network.sizes[leg] for leg in network.open_legs if leg not in shared)
    return prod(network.sizes[leg] for leg in shared) * isqrt(own)


def _scaled(writer: Writer, value: Value, scale: Fraction | float) -> tuple[Writer, Value]:
    if scale == 1:
        return writer, value
    kernel = cost.elementwise(value.array.size, value.array.size)
    kernel = replace(kernel, scratch=NUMBER)
    comment = f"scale {scale}" if isinstance(scale, Fraction) else f"root of scale {scale**2:.6g}"
    array = value.array
    strides = layouts.of_entries(array.shape, [array.strides])
    call = SCALE, [array], array.shape, kernel, comment, (float(scale),)
    writer, array = writer.run(*call, strides)
    return writer, Value(array, value.legs)
