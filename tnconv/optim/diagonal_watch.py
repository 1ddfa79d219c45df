"""Collecting Hessian diagonals while a training loop of the user's own runs."""

from collections.abc import Sequence
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from tnconv.losses.diagonals import LossFunction, Method
from tnconv.losses.reductions import reduction_of
from tnconv.models.capture import Inert
from tnconv.models.modules import tensors, unwrapped, weak
from tnconv.optim.workers import Workers
from tnconv.recursions import check_method, diagonals
from tnconv.recursions.naming import describing


class DiagonalWatch:
    """What losses of a model in training mode add to its parameters' diagonals, between steps.

    Several losses of one pass add up; passes count as micro-batches of one batch, so that the sum
    is divided by their number, unless the loss is a sum over samples. A vanished watch leaves no
    hooks.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction | None, method: Method) -> None:
        check_method(method)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
        self.model, self.loss_fn, self.method = unwrapped(model), loss_fn, method
        self.parameters: Sequence[Tensor] = ()
        self.paused = False
        self._sums: dict[Tensor, Tensor] = {}
        self._passes: dict[Node, int] = {}
        self._seen = set[int]()
        self._count, self._busy = 0, False
        hook = Inert(weak(self._returned))
        self._stops = [finalize(self, self.model.register_forward_hook(hook).remove)]
        if isinstance(loss_fn, nn.Module):
            hook = Inert(weak(self._loss_called))
            handle = loss_fn.register_forward_hook(hook, with_kwargs=True)
            self._stops.append(finalize(self, handle.remove))

    def stop(self) -> None:
        """Remove all hooks."""
        for each in self._stops:
            each()

    def clear(self) -> None:
        """Start afresh, after a step."""
        self._sums.clear()
        self._passes.clear()
        self._seen.clear()

    def found(self, workers: Workers) -> dict[Tensor, Tensor]:
        """The diagonals since the last step, of the parameters that a loss reached."""
        mean = self.loss_fn is None or reduction_of(self.loss_fn) != "sum"
        passes = max(1, len(self._seen)) if mean else 1
        found = {p: s if passes == 1 else s / passes for p, s in self._sums.items()}
        if workers.count > 1:
            own = [found[p] if p in found else torch.zeros_like(p) for p in self.parameters]
            pairs = zip(self.parameters, workers.sums(own), strict=True)
            found = {p: s / workers.count for p, s in pairs}  # as gradients are averaged
        return found

    def propagate(
        self, output: Tensor, targets: Any, factor: float = 1.0, gradients: bool = False
    ) -> tuple[Tensor, dict[Tensor, Tensor | None]]:
        """Add the diagonal of ``factor * loss_fn(output, targets)``; the loss, and gradients.

        Raises:
            ValueError: no loss.
        """
        if self.loss_fn is None:
            raise ValueError("the optimizer was made without loss_fn; expected one to propagate")
        self._busy = True
        try:
            loss, flows = diagonals(
                *(self.loss_fn, output, targets, self.parameters, self.method),
                factor=factor,
                gradients=gradients,
                describe=describing(self.model),
            )
        finally:
            self._busy = False
        if flows:
            self._seen.add(self._pass_of(output))
        for p, flow in flows.items():
            held = self._sums.get(p)
            self._sums[p] = flow.diagonal if held is None else held + flow.diagonal
        return loss, {p: flow.gradient for p, flow in flows.items()}

    def _loss_called(
        self, loss_fn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any
    ) -> None:
        given = dict(zip(("input", "target"), args, strict=False)) | kwargs
        output = given.get("input", args[0] if args else None)
        live = isinstance(output, Tensor) and output.requires_grad and torch.is_grad_enabled()
        if live and not (self._busy or self.paused) and self.model.training:
            assert isinstance(output, Tensor)
            self.propagate(output, given.get("target", args[1] if len(args) > 1 else None))

    def _returned(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note which pass the model's outputs are of."""
        self._count += 1
        for each in tensors(output):
            if each.grad_fn is not None and not self.paused:
                self._passes[each.grad_fn] = self._count

    def _pass_of(self, output: Tensor) -> int:
        """The pass of the nearest output of the model that an output depends on."""
        waiting = [output.grad_fn]
        seen = set(waiting)
        while waiting:
            node = waiting.pop(0)
            if node in self._passes:
                return self._passes[node]
            below = [n for n, _ in node.next_functions if n not in seen] if node else []
            seen.update(below)
            waiting += below
        self._count += 1
        return self._count
