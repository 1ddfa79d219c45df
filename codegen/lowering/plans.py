"""Plans: priced steps that compute a network, and how they compare with what torch does."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from tnconv.codegen.lowering.operations import Operation
from tnconv.codegen.lowering.schedule import Schedule
from tnconv.codegen.lowering.strided import PERMUTE, RESHAPE, UNFOLD, Strided
from tnconv.codegen.lowering.writer import Choices, Step
from tnconv.codegen.prices import cost

CLEARLY = 1.4  # predicted speed-up at which another plan replaces one native kernel (0002, 0011)
SHARED = (
    1.2  # ... at which it replaces a GEMM on several threads, whose time is known better (0008)
)
DENSE = (
    1.3  # predicted speed-up that a plan with a dense pattern needs, as it is mostly zeros (0011)
)
UNMEASURED = 1.3  # ... and one with our own kernel, whose time no device has told yet (0030)


@dataclass(frozen=True, repr=False)
class Plan:
    """Steps that compute ``output``.

    Args:
        form: Which form of the network is covered.
        routes: The routes that cover its patterns.
        steps: What is computed, in order.
        output: The result.
        choices: The choices by which the steps were written, to write them for other sizes.
    """

    form: str
    routes: tuple[str, ...]
    steps: tuple[Step, ...]
    output: Strided
    choices: Choices = field(default=(), compare=False)

    def __repr__(self) -> str:
        steps = f"{len(self.steps)} step{'s' * (len(self.steps) != 1)}"
        return f"<Plan {self.label}; {steps}, predicted {1e6 * self.seconds:,.0f} us>"

    @cached_property
    def seconds(self) -> float:
        return sum(step.kernel.seconds for step in self.steps)

    @property
    def peak(self) -> int:
        """Bytes held at a time in float32: see `Schedule.peak`."""
        return self.peak_of(cost.ITEM)

    def peak_of(self, item: int) -> int:
        """Bytes held at a time for items of this size."""
        if item not in self._peaks:
            self._peaks[item] = Schedule(self.steps, (self.output,)).peak(item)
        return self._peaks[item]

    @cached_property
    def _peaks(self) -> dict[int, int]:
        """Peaks by bytes of an entry; a search asks for them many times."""
        return {}

    @property
    def risk(self) -> float:
        """The predicted speed-up over other plans that it needs in order to be chosen."""
        return risk_of(self.routes)

    @property
    def unfolds(self) -> bool:
        """Whether it copies the windows of all samples, which is an unfolded input (im2col)."""
        copies = [step for step in self.steps if step.kernel.kind == "copy"]
        return "window" in self.routes and reads_through(copies, UNFOLD)

    @property
    def is_torchs(self) -> bool:
        """Whether it is one native kernel on operands as they are, flipped or multiplied."""
        alone = all(step.kernel.kind in ("elementwise", "flip") for step in self.steps[:-1])
        natively = self.routes == ("native",) and alone and self.margin > 1.0
        return natively and not reads_through(self.steps, PERMUTE, RESHAPE)

    @property
    def margin(self) -> float:
        """The predicted speed-up at which another plan replaces this one, if it `is_torchs`.

        Input gradients of 1x1 kernels are plain GEMMs: on one thread their time is predicted as
        reliably as that of any other plan, and no margin is needed.
        """
        if self.steps[-1].kernel.kind != "pointwise input gradient":
            return CLEARLY
        return SHARED if torch.get_num_threads() > 1 else 1.0

    @property
    def label(self) -> str:
        """The form of the network and the routes that cover its patterns."""
        return f"{self.form}: {' + '.join(self.routes) or 'matrix products'}"


def risk_of(routes: Sequence[str]) -> float:
    """The predicted speed-up over other plans that a plan by these routes needs."""
    risky = [DENSE] * ("dense" in routes) + [UNMEASURED] * ("patch gram" in routes)
    return max(risky, default=1.0)


def reads_through(steps: Sequence[Step], *operations: Operation) -> bool:
    """Whether any of the steps reads a tensor through a view of one of these kinds."""
    inputs = (array for step in steps for array in step.value.inputs)
    return any(view.operation in operations for array in inputs for view in array.views)
