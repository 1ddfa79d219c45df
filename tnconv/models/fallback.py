"""Parameters that no diagram explains: found in the graph, computed sample by sample, checked."""

import warnings
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tnconv.models.bare import choose
from tnconv.models.capture import Pass, Watch
from tnconv.models.collector import Collector
from tnconv.models.graph import unexplained
from tnconv.models.samplewise import per_sample_gradients
from tnconv.models.terms import Term
from tnconv.quantities.base import LOSS_GRADIENT


class Fallback:
    """What other parts cannot compute, because a layer has no diagram or a weight no layer.

    A layer without a diagram runs again by itself, sample by sample. For parameters that the model
    uses by other ways than through their own modules, all of it does. Autograd's gradients of the
    parameters concerned are ``expected``, and what was computed must add up to them.
    """

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        self.expected: dict[nn.Parameter, list[Tensor]] = {}
        self._gradients: dict[Pass, dict[int, Tensor]] = defaultdict(dict)

    def prepare(self, watch: Watch, here: Pass, roots: Sequence[Tensor]) -> None:
        """Find the parameters concerned in a pass, and ask for the gradients that they need."""
        names = {p: name for name, p in watch.model.named_parameters() if p.requires_grad}
        choose(here, roots)
        lost = unexplained(roots, here.calls, names)
        calls = [
            c for c in here.calls if not c.described and {p for _, p in c.parameters} - {*lost}
        ]
        alone = [p for call in calls for _, p in call.parameters]
        for parameter in {*lost, *alone} - self.expected.keys():
            self.expected[parameter] = []
            watch.on_gradient(parameter, self.expected[parameter].append)
        self.collector.skipped.update(lost if watch.per_sample else [*lost, *alone])
        if not watch.per_sample:
            return
        if (lost or calls) and self.collector.sources != (LOSS_GRADIENT,):
            what = names[lost[0]] if lost else calls[0].name
            raise NotImplementedError(
                f"{what!r} has no diagram, which quantities beyond the loss's gradient need; "
                "describe its layer with tnconv.models.register_layer"
            )
        for what in dict.fromkeys(f"parameter {names[p]!r}" for p in lost):
            _warn(f"{what} is used where no layer shows how, so that the model")
        for what in dict.fromkeys(
            f"{call.name!r} ({type(call.module).__name__})" for call in calls
        ):
            _warn(f"layer {what} has no diagram, so that it")
        for at, output in enumerate(here.outputs if lost else ()):
            if output.requires_grad:
                watch.on_gradient(output, partial(self._gradients[here].__setitem__, at))

    def finish(self, watch: Watch) -> None:
        """Compute what nothing else computed, and check it.

        Raises:
            RuntimeError: per-sample gradients that do not add up to autograd's.
        """
        names = {p: name for name, p in watch.model.named_parameters()}
        watch.paused = True
        try:
            for here, gradients in self._gradients.items():
                self._run(watch.model, here, gradients, names)
        finally:
            watch.paused = False
        for parameter, expected in self.expected.items():
            dtype = self.collector.dtype_of(parameter)
            if expected and not watch.per_sample:
                self.collector.add(parameter, Term.known(torch.stack(expected).to(dtype)))
            elif expected:
                total = torch.stack(expected).sum(0)
                _check(names[parameter], self.collector.sums[parameter], total)
        self.expected.clear()
        self._gradients.clear()

    def _run(
        self,
        model: nn.Module,
        here: Pass,
        gradients: dict[int, Tensor],
        names: dict[nn.Parameter, str],
    ) -> None:
        lost = {names[p]: p for p in self.expected if p in self.collector.skipped}
        cotangents = [
            gradients[at] if at in gradients else torch.zeros_like(output)
            for at, output in enumerate(here.outputs)
        ]
        found = per_sample_gradients(model, here.args, here.kwargs, cotangents, lost, here.samples)
        for name, each in found.items():
            self.collector.add_known(lost[name], each, here)


def _warn(start: str) -> None:
    warnings.warn(f"{start} runs again, sample by sample", stacklevel=4)


def _check(name: str, found: Tensor, expected: Tensor) -> None:
    error = (found - expected).abs().max()
    if not error <= torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max():
        raise RuntimeError(
            f"the gradients of parameter {name!r}, sample by sample, do not add up to its "
            "gradient; expected layers that are not random and keep samples apart"
        )
