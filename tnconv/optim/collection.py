"""Collecting Kronecker factors while a training loop of the user's own runs."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any
from weakref import WeakMethod, finalize

import torch
from torch import Tensor, nn

from tnconv.losses.roots import recognised
from tnconv.models.capture import Call, Inert, Pass, Watch
from tnconv.models.graph import sources
from tnconv.models.modules import unwrapped
from tnconv.optim.ekfac import Basis, MomentCollector
from tnconv.optim.inverses import wide
from tnconv.quantities.kronecker_factors import KFAC

LossFunction = Callable[[Any, Any], Tensor]
LossScale = Callable[[], float | Tensor]


class FactorWatch:
    """What the layers of a model in training mode add to their Kronecker factors, between steps.

    Each parameter has ``sums``: of its inputs' factor, of the samples it is an average over, and of
    its output gradients' factor. Passes count as micro-batches of one batch; several losses of one
    pass add up. A vanished watch leaves no hooks.
    """

    def __init__(
        self,
        model: nn.Module,
        kfac: KFAC,
        loss_fn: LossFunction | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.kfac, self.loss_fn, self.loss_scale = kfac, loss_fn, loss_scale
        self.parameters: Collection[nn.Parameter] = ()
        self.sums: dict[Tensor, dict[str, Tensor]] = {}
        self.passes = set[Pass]()
        self.bases: Mapping[Tensor, Basis] = {}
        self._columns: dict[Call, list[Tensor]] | None = None
        self._open()
        self.watch = Watch(unwrapped(model), _nothing, _weak(self._receive), loose=True)
        chosen = WeakMethod(self._wants)
        self.watch.wanted = lambda module, p: (wants := chosen()) is not None and wants(module, p)
        self.watch.start()
        self._stops = [finalize(self, self.watch.stop)]
        if isinstance(loss_fn, nn.Module) and kfac.fisher in ("type-2", "mc"):
            hook = Inert(_weak(self._loss_called))
            handle = loss_fn.register_forward_hook(hook, with_kwargs=True)
            self._stops.append(finalize(self, handle.remove))

    def stop(self) -> None:
        """Remove all hooks."""
        for each in self._stops:
            each()

    @property
    def samples(self) -> int:
        """How many samples the sums are of."""
        return sum(here.samples for here in self.passes)

    @property
    def averages(self) -> bool:
        """Whether the loss is a mean over samples: then so are the factors of output gradients."""
        if self.loss_fn is None or self.kfac.fisher == "empirical":
            return self.kfac.reduction == "mean"
        return bool(recognised(self.loss_fn)[1].get("reduction", "mean") == "mean")

    def forget(self) -> None:
        """Start afresh, after a step."""
        self.clear()
        self.watch.forget()

    def clear(self) -> None:
        """Drop what was collected, not the passes that are under way."""
        self.sums.clear()
        self.passes.clear()
        self._open()

    def found(self) -> Mapping[Tensor, Mapping[str, Tensor]]:
        """The sums since the last step; those of output gradients times samples, for a mean.

        Raises:
            RuntimeError: passes whose loss was not seen.
        """
        self._close()
        if self.kfac.fisher == "forward-only":
            for here in self.watch.passes:
                nothing = {call: call.x.new_zeros(0, *call.output_shape) for call in here.calls}
                self._merge(here, nothing, 0, 1)
        needs_loss = self.kfac.fisher in ("type-2", "mc")
        if needs_loss and not self.passes and any(here.calls for here in self.watch.passes):
            raise RuntimeError(
                f"fisher is {self.kfac.fisher!r}, but no loss of the model's output was seen; call "
                "the loss_fn that the optimizer was given (a module), or optimizer.propagate(output"
                ", targets), before loss.backward()"
            )
        if self.kfac.fisher == "empirical" and self.averages:
            for sums in self.sums.values():
                for name in {"grad_output", "moments"} & sums.keys():
                    sums[name] = sums[name] * self.samples**2
        return self.sums

    def propagate(self, output: Tensor, targets: Any) -> None:
        """Send the columns of the loss's curvature backwards through the passes under way."""
        passes = [here for here in self.watch.passes if here.calls]
        if not passes or not output.requires_grad or not torch.is_grad_enabled():
            return
        assert self.loss_fn is not None
        exact = output.detach().to(wide(output))
        columns = self.kfac.vectors.columns(self.loss_fn, exact, targets)
        scale = max(1, len(output)) ** 0.5  # of order one also in half precision
        ends = sources([call for here in passes for call in here.calls])
        self._columns = defaultdict(list)
        try:
            for column in columns:
                vector = (scale * column).to(output.dtype)
                torch.autograd.grad(output, ends, vector, retain_graph=True, allow_unused=True)
            found = {call: _stacked(each) for call, each in self._columns.items()}
        finally:
            self._columns = None
        for here in passes:
            weight = here.samples if self.averages else 1
            self._merge(here, found, len(columns), weight / scale**2)

    def _loss_called(
        self, loss_fn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any
    ) -> None:
        given = dict(zip(("input", "target"), args, strict=False)) | kwargs
        self.propagate(given["input"], given["target"])

    def _wants(self, module: nn.Module, parameter: nn.Parameter) -> bool:
        return module.training and parameter in self.parameters

    def _receive(self, here: Pass, call: Call, grad_output: Tensor) -> None:
        if self._columns is not None:
            self._columns[call].append(grad_output)
        elif self.kfac.fisher == "empirical":
            if call in self._seen:  # another loss of the same pass
                self._close()
            self._seen.add(call)
            if self.loss_scale is not None:
                grad_output = grad_output.to(wide(grad_output)) / self.loss_scale()
            self._collector.receive(here, call, grad_output)

    def _merge(self, here: Pass, found: Mapping[Call, Tensor], vectors: int, weight: float) -> None:
        collector = self._collector_for_one()
        for call in here.calls:
            if call in found:
                collector.receive(here, call, found[call], self.kfac.vectors, vectors)
        self._add(collector, weight)

    def _open(self) -> None:
        self._seen = set[Call]()
        self._collector = self._collector_for_one()

    def _close(self) -> None:
        self._add(self._collector, 1)
        self._open()

    def _collector_for_one(self) -> MomentCollector:
        statistics = tuple(self.kfac.statistics().values())
        return MomentCollector(statistics, torch.float32, kept=True, bases=self.bases)

    @torch.no_grad()
    def _add(self, collector: MomentCollector, weight: float) -> None:
        collector.finish()
        self.passes |= collector.passes
        for parameter in collector.found:
            totals = collector.totals(parameter)
            new = {name: totals[each] for name, each in self.kfac.statistics().items()}
            new["grad_output"] = weight * new["grad_output"]
            if parameter in collector.moments:
                new["moments"] = weight * collector.moments[parameter]
            old = self.sums.setdefault(parameter, {})
            for name, value in new.items():
                value = value.to(new["grad_output"])
                old[name] = old[name] + value if name in old else value


def _nothing(here: Pass) -> None:
    """A pass is complete: its loss is still to come."""


def _stacked(columns: list[Tensor]) -> Tensor:
    """All columns, without a copy of a single one."""
    return columns[0].unsqueeze(0) if len(columns) == 1 else torch.stack(columns)


def _weak(method: Callable[..., None]) -> Callable[..., None]:
    """A method that does nothing once its object is gone."""
    reference = WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> None:
        if (found := reference()) is not None:
            found(*args, **kwargs)

    return call
