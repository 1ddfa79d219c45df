"""What tells that a backward pass went by, apart from the hooks after layers.

A layer's hook can be lost: someone takes it off, or a view that the layer gave is changed in place,
which moves the graph. Then its gradient was there, and nobody saw it.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from functools import partial

from torch import Tensor, nn
from torch.autograd.graph import Node

from tnconv.models.calls import Call, Pass
from tnconv.models.capture import Watch
from tnconv.models.graph import missed


class Evidence:
    """The outputs of a model, and its parameters, that gradients arrived at.

    ``counts`` tells whether the backward pass that is going on is one of the user's own.
    """

    def __init__(self, counts: Callable[[], bool]) -> None:
        self.counts = counts
        self.parameters: set[nn.Parameter] = set()
        self._followed: set[nn.Parameter] = set()
        self._returned: dict[Pass, list[tuple[Tensor, Node | None]]] = defaultdict(list)
        self._reached: set[Tensor] = set()

    def follow(self, watch: Watch, here: Pass) -> None:
        """Look out for gradients at what a pass gave, and at the parameters that it used."""
        for output in here.outputs:
            if output.requires_grad:
                self._returned[here].append((output, output.grad_fn))
                watch.on_gradient(output, partial(self._arrived, output))
        for parameter in here.uses.keys() - self._followed:
            self._followed.add(parameter)
            watch.on_gradient(parameter, partial(self._learned, parameter))

    def roots(self, here: Pass) -> list[Tensor]:
        """The outputs from which gradients went backwards; where the graph moved, that is open."""
        given = self._returned[here]
        return [y for y, node in given if y in self._reached or y.grad_fn is not node]

    def _arrived(self, output: Tensor, grad: Tensor) -> None:
        if self.counts():
            self._reached.add(output)

    def _learned(self, parameter: nn.Parameter, grad: Tensor) -> None:
        self.parameters.add(parameter)


def expect(roots: Sequence[Tensor], here: Pass, parameters: Collection[nn.Parameter]) -> None:
    """Check that all layers between roots and parameters were reached.

    Raises:
        RuntimeError: a gradient that was not seen.
    """
    for call in missed(roots, here.calls, parameters):
        raise unseen(call)


def unseen(call: Call) -> RuntimeError:
    """What to raise where a gradient passed a call without its hook."""
    return RuntimeError(
        f"no gradient was seen after layer {call.name!r}, which was on its way; expected hooks to "
        "stay on the layer's output, and a view that the model gave not to change in place"
    )
