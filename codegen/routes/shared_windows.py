"""Windows that the halves of a Gram network have in common."""

from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.routes.tap_pairs import Dimension
from tnconv.codegen.routes.window import window_on


def shared_dimension(cover: Cover, at: int) -> tuple[tuple[int, int], Dimension] | None:
    """The tensors that a pattern and its mirror image join, for the first of the two patterns."""
    tn = cover.network
    if (here := window_on(cover.network, at)) is None:
        return None
    tensor, i, steps, padding = here
    for o, k in (tuple(steps), tuple(steps)[::-1]):
        mirrors = [other for other in tn.holders[o] if other != at]
        if o in tn.open_legs or len(mirrors) != 1 or mirrors[0] < at:
            continue
        there = window_on(cover.network, mirrors[0])
        if there is None or there[1] == o or there[0] == tensor:
            continue
        (twin,) = (leg for leg in there[2] if leg != o)
        alike = (steps[o], steps[k], padding, tn.sizes[k])
        if twin != k and alike == (there[2][o], there[2][twin], there[3], tn.sizes[twin]):
            if not {tensor, there[0]} & {*tn.holders[k], *tn.holders[twin]}:
                numbers = (tn.sizes[o], tn.sizes[k], steps[o], steps[k], padding, tn.sizes[i])
                places = ((at, mirrors[0]), (i, there[1]), (k, twin))
                return (tensor, there[0]), Dimension(*places, *numbers)
    return None
