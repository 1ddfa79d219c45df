"""What a step is watched for: the needs of what is measured, less what the model does not allow."""

from collections.abc import Callable, Hashable

from tnconv.monitor.needs import Diagonal, GradientHistogram, JointHistogram, Spectrum
from tnconv.monitor.step_watch import BY_SAMPLE, OF_ALL, SAMPLES
from tnconv.monitor.subject import Subject


def of_samples(need: Hashable) -> bool:
    """Whether a need takes gradients of single samples."""
    return need in BY_SAMPLE or isinstance(need, GradientHistogram | JointHistogram)


def compares(needs: set[Hashable]) -> bool:
    """Whether something takes the gradient for the mean of the samples' gradients."""
    return "gradients" in needs and not needs.isdisjoint(("inner", "squared_norms", "squares"))


def implied(
    needs: set[Hashable], ever: Callable[[Hashable], bool], first: bool = False
) -> set[Hashable]:
    """What others are computed from, or what the step after will need of this one.

    ``ever`` tells whether some measurement needs something at some step. The ``first`` time that
    samples' gradients are compared with their mean, it is seen whether it is their mean.
    """
    more: set[Hashable] = {"inner"} if first and compares(needs) else set()
    if any(isinstance(need, GradientHistogram | JointHistogram) for need in needs):
        more |= {"histograms", "gradient_norms"}
    if any(isinstance(need, JointHistogram) for need in needs):
        more.add("before")
    if needs.intersection(("updates", "along")) or ever("last_updates"):
        more |= {"updates", "before"}
    if "inner" in needs | more or ever("last_gradients"):
        more.add("gradients")
    return more


def possible(subject: Subject, needs: set[Hashable]) -> set[Hashable]:
    """Without what the model's layers do not allow, with one warning if that is missed."""
    if "normalisation" in needs and not subject.normalising:
        needs = needs - {"normalisation"}
    if subject.sharded:
        lost = {n for n in needs if of_samples(n) or isinstance(n, Diagonal | Spectrum)}
        for need in lost:
            reason = "parameters are sharded, and layers compute with others"
            subject.leave_out(SAMPLES if of_samples(need) else need, reason)
        return needs - lost
    if not any(map(of_samples, needs)):
        return needs
    mixing = subject.mixing
    if mixing is None or subject.constants:
        return needs
    if needs.intersection(OF_ALL):
        reason = f"layer {mixing!r} normalises by the batch's statistics, so no sample has a "
        reason += "gradient of its own (batch_statistics_as_constants=True gives them another)"
        subject.leave_out(SAMPLES, reason)
    return {need for need in needs if not of_samples(need)}
