"""Which of several complete plans is taken, and in which order the others follow."""

from collections.abc import Callable, Mapping, Sequence
from math import prod

from tnconv.codegen.lowering.plans import Plan
from tnconv.codegen.prices import cost
from tnconv.diagrams.network import TensorNetwork

AS_FAST = 1.1  # a plan that unfolds inputs yields to another within this factor of time (0007),
UNFOLDED = 0.5  # unless it holds less than this share of the memory of each such plan (0015)
NEARLY = 1.05  # if the fastest plan holds more than the operands, a plan within this factor (0007)
LEANER = 0.9  # replaces it, if that holds less than this share of its memory (0008)


def ranked(
    found: list[Plan], forms: Mapping[str, TensorNetwork], fits: Callable[[Plan], bool]
) -> list[Plan]:
    """Plans for the forms of one network, the chosen one first; those that do not fit come last.

    Among plans that are about as fast as the fastest, the one that holds least memory is chosen.
    One native kernel for the whole network is kept unless another plan is clearly faster.
    """
    simplest = list(forms)[::-1]
    found.sort(key=lambda plan: (plan.risk * plan.seconds, simplest.index(plan.form)))
    fastest = found[0]
    near = _within(AS_FAST, found)
    near = _within(NEARLY, _sparing(near))
    lean = min(near, key=lambda plan: plan.peak)
    operands = next(iter(forms.values())).operands.values()
    large = near[0].peak > cost.ITEM * sum(map(prod, operands))
    _prefer(lean if large and lean.peak < LEANER * near[0].peak else near[0], found)
    whole = [plan for plan in found if plan.is_torchs and plan.form == "as given"]
    if whole and whole[0].seconds <= whole[0].margin * fastest.seconds:
        _prefer(whole[0], found)
    return sorted(found, key=lambda plan: not fits(plan))


def _sparing(near: Sequence[Plan]) -> Sequence[Plan]:
    """Without plans that unfold inputs, except those that hold far less memory than the others."""
    others = [plan for plan in near if not plan.unfolds]
    if not others or len(others) == len(near):
        return near
    least = UNFOLDED * min(plan.peak for plan in others)
    return [plan for plan in near if not plan.unfolds or plan.peak < least]


def _within(factor: float, found: Sequence[Plan]) -> list[Plan]:
    """The plans whose predicted time is at most this factor of the first one's."""
    most = factor * found[0].risk * found[0].seconds
    return [plan for plan in found if plan.risk * plan.seconds <= most]


def _prefer(plan: Plan, found: list[Plan]) -> None:
    found.remove(plan)
    found.insert(0, plan)
