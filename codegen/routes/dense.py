"""Dense patterns: 0/1 arrays, which always exist; the other routes have to match their values."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.operations import Operation
from tnconv.codegen.lowering.strided import LIKE
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.prices import cost
from tnconv.diagrams.affine import Pattern

MASKING = 25  # bytes of an entry while a pattern is made: three int64 tensors, and a boolean one
SOURCE = '''def pattern(coefficients, sizes, start, stop, step, like):
    """1 where the sum of coefficient * position is in range(start, stop, step), else 0."""
    total = torch.zeros((), dtype=torch.int64, device=like.device)
    for coefficient, size in zip(coefficients, sizes):
        positions = torch.arange(size, device=like.device)
        total = total.unsqueeze(-1) + coefficient * positions
    inside = (total >= start) & (total < stop) & ((total - start) % step == 0)
    return inside.to(like.dtype)
'''
PATTERN = Operation(
    "pattern",
    lambda like, *numbers: f"pattern({', '.join(map(str, numbers))}, {like})",
    imports=("torch",),
    helper=SOURCE,
)


def dense(cover: Cover) -> Iterator[Cover]:
    """Every pattern becomes a dense 0/1 array: always possible, the others have to match it."""
    while (at := cover.pattern) is not None:
        node = cover.network.nodes[at]
        assert isinstance(node, Pattern)
        sizes = tuple(cover.network.sizes[leg] for leg in node.legs)
        steps, v = tuple(a for _, a in node.terms), node.values
        numbers = steps, sizes, v.start, v.stop, v.step
        kernel = replace(cost.copy(prod(sizes), prod(sizes[-1:])), scratch=MASKING * prod(sizes))
        comment = f"pattern over {', '.join(node.legs)}"
        writer, array = cover.writer.run(PATTERN, [LIKE], sizes, kernel, comment, numbers)
        cover = cover.put(writer, (at,), Value(array, node.legs), "dense")
    yield cover
