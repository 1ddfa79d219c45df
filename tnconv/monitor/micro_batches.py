"""What a step's losses were of: micro-batches, terms of one loss, or neither."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tnconv.monitor.needs import Diagonal, Spectrum


@dataclass(eq=False)
class Portion:
    """What one call of the loss had: a micro-batch, or a term of one.

    ``arriving`` is the number of a backward pass that is going on and the gradient at the loss in
    it, ``factor`` the sum of those whose passes brought gradients to parameters: the scale of mixed
    precision, the share of a micro-batch, the weight of a term. It is None for a loss that nothing
    went back from.
    """

    loss: Tensor
    samples: int
    call: int | None = None  # of the model, where they are counted: the last before the loss
    factor: float | None = None
    arriving: tuple[int, float] | None = None
    each: Tensor | None = None  # losses of samples
    diagonals: dict[Diagonal, Sequence[Tensor]] = field(default_factory=dict)
    spectra: dict[Spectrum, tuple[float, float, float]] = field(default_factory=dict)

    def arrived(self, task: int) -> bool:
        """Whether a backward pass of autograd, which is over, began at this loss."""
        if self.arriving is None or self.arriving[0] != task:
            return False
        self.factor, self.arriving = (self.factor or 0.0) + self.arriving[1], None
        return True


def micro_batches(
    portions: Sequence[Portion], passes: int, backwards: int, scale: float, mean: bool
) -> list[Portion]:
    """One portion for each micro-batch, from those that gradients came from.

    Where there were several losses for each pass through the model they are terms: their sum is
    weighted so that their largest weight, or the sum of weights that is below, is one.

    Args:
        portions: in the order of the losses.
        passes: through the model that brought gradients, or 0 where they are not known: then those
            count that a loss came after, or backward passes.
        backwards: passes.
        scale: of mixed precision.
        mean: whether a loss is one over samples, or a sum.

    Raises:
        NotImplementedError: it is not clear which losses belong to which passes.
    """
    if not backwards:
        return [*portions]
    found = [each for each in portions if each.factor is not None]
    calls = {each.call for each in found} - {None}
    count = passes or len(calls) or min(backwards, len(found))
    if not found or len(found) == count:
        return found
    if len(found) % count:
        raise NotImplementedError(
            f"{len(found)} losses of {count} passes through the model; expected the same number of "
            "losses for each pass"
        )
    terms = len(found) // count
    groups = [found[at : at + terms] for at in range(0, len(found), terms)]
    total = sum(_factor(each) for each in found)
    most = sum(max(_factor(each) for each in group) for group in groups)
    one = scale if mean else scale * count  # what the factors of micro-batches make together
    unit = total if total <= one * (1 + 1e-6) else max(one, most)
    return [_sum(group, unit / count) for group in groups]


def _factor(portion: Portion) -> float:
    return portion.factor or 0.0


def _sum(terms: Sequence[Portion], unit: float) -> Portion:
    """Terms of one batch together; eigenvalues of a sum are no sums of eigenvalues."""
    weights = [_factor(each) / unit if unit else 0.0 for each in terms]
    pairs = [*zip(weights, terms, strict=True)]
    loss = sum((w * each.loss for w, each in pairs[1:]), pairs[0][0] * pairs[0][1].loss)
    found = Portion(loss, terms[0].samples, terms[0].call, unit)
    if all(each.each is not None and len(each.each) == found.samples for each in terms):
        parts = [w * each.each for w, each in pairs if each.each is not None]
        found.each = sum(parts[1:], parts[0])
    for need in terms[0].diagonals:
        if any(need not in each.diagonals for each in terms):
            continue
        columns = zip(*(each.diagonals[need] for each in terms), strict=True)
        found.diagonals[need] = [
            sum((w * d for w, d in zip(weights[1:], ds[1:], strict=True)), weights[0] * ds[0])
            for ds in columns
        ]
    return found
