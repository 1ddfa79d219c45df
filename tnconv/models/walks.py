"""Quantities of an observation that come from walks over the autograd graph, not from layers."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tnconv.diagrams import Expression, diagonal_vjp
from tnconv.losses.diagonals import LossFunction
from tnconv.models.calls import Call, Pass
from tnconv.models.contracted import values
from tnconv.models.sample_maps import Shared, Silent
from tnconv.models.terms import Arrival
from tnconv.quantities.base import Quantity, Statistic
from tnconv.quantities.hesscale import HesScale
from tnconv.recursions import Flow, diagonals
from tnconv.recursions.naming import describing

Found = dict[Tensor, dict[Pass | None, Tensor]]


def diagonal_by_sample(layer: Expression, operand: str, vectors: int | None) -> Expression:
    """``d[n, θ] = Σ_o h[n, o] (∂y[n, o] / ∂θ)²``."""
    return diagonal_vjp(layer, operand, per_sample=True)


BY_SAMPLE = Statistic(diagonal_by_sample, samples=0)
CLOSE = 1e-3  # relative: what samples and their sum may differ by


class Walks:
    """What the walks of some quantities found; hooks of layers are to be left alone while busy."""

    def __init__(self, quantities: Iterable[Quantity[Any]]) -> None:
        self.quantities = [each for each in quantities if isinstance(each, HesScale)]
        self.passes = set[Pass]()
        self.busy = False
        self._found: dict[HesScale, Found] = {q: defaultdict(dict) for q in self.quantities}

    def run(
        self,
        model: nn.Module,
        calls: Mapping[Call, Pass],
        loss_fn: LossFunction,
        output: Tensor,
        targets: Any,
        factor: float,
    ) -> None:
        """Walk from an output, once per quantity.

        Args:
            model: the parameters' owner.
            calls: those of layers that the output depends on, with their passes.
            loss_fn: the loss, times ``factor``.
            output: what the model gave.
            targets: the loss's.
            factor: positive.

        Raises:
            NotImplementedError: an operation or loss without a rule, or parameters whose diagonals
                cannot be told apart by sample.
        """
        reached = {call: call.reached for call in calls}
        self.busy = True
        try:
            for quantity in self.quantities:
                self._run(quantity, model, calls, loss_fn, output, targets, factor)
        finally:
            self.busy = False
            for call, was in reached.items():
                call.reached = was
        self.passes.update(calls.values())

    def _run(
        self,
        quantity: HesScale,
        model: nn.Module,
        calls: Mapping[Call, Pass],
        loss_fn: LossFunction,
        output: Tensor,
        targets: Any,
        factor: float,
    ) -> None:
        learned = [p for p in model.parameters() if p.requires_grad]
        how: dict[str, Any] = {"factor": factor, "describe": describing(model)}
        arrived: dict[Call, Tensor] = {}
        if quantity.per_sample:
            note = partial(_note, arrived)
            ends = {call: call.edge for call in calls if call.edge is not None}
            how["taps"] = {(e.node, e.output_nr): partial(note, call) for call, e in ends.items()}
        _, flows = diagonals(loss_fn, output, targets, learned, quantity.method, **how)
        found, totals = self._found[quantity], {p: flow.diagonal for p, flow in flows.items()}
        if not quantity.per_sample:
            for p, value in totals.items():
                found[p][None] = found[p][None] + value if None in found[p] else value
            return
        names = {p: name for name, p in model.named_parameters()}
        for p, by_pass in _by_sample(arrived, calls, totals, names).items():
            for here, value in by_pass.items():
                found[p][here] = found[p][here] + value if here in found[p] else value

    def values(self, names: Mapping[str, Tensor]) -> dict[Quantity[Any], dict[str, Tensor]]:
        """Each quantity by parameter name; passes line up, those without a parameter give 0."""
        return {
            quantity: {name: self._lined_up(found[p], p) for name, p in names.items() if p in found}
            for quantity, found in self._found.items()
        }

    def _lined_up(self, parts: Mapping[Pass | None, Tensor], parameter: Tensor) -> Tensor:
        if None in parts:
            return parts[None]
        like = next(iter(parts.values()))
        return torch.cat(
            [
                parts[here] if here in parts else like.new_zeros(here.samples, *parameter.shape)
                for here in sorted(self.passes, key=lambda here: here.at)
            ]
        )


def _note(arrived: dict[Call, Tensor], call: Call, flow: Flow) -> None:
    arrived[call] = flow.diagonal


@torch.no_grad()
def _by_sample(
    arrived: Mapping[Call, Tensor],
    calls: Mapping[Call, Pass],
    totals: Mapping[Tensor, Tensor],
    names: Mapping[Any, str],
) -> dict[Tensor, dict[Pass | None, Tensor]]:
    """The diagonals of layers' parameters by sample, whose sums are the totals.

    Raises:
        NotImplementedError: they are not.
    """
    found: dict[Tensor, dict[Pass | None, Tensor]] = defaultdict(dict)
    for call, s in arrived.items():
        if not call.described or isinstance(call.map, Shared | Silent):
            continue
        operation, read, after = Arrival(call, s, None, calls[call].samples).described
        for name, p in call.parameters:
            shape = operation.networks[name].shape
            operands = {key: array.to(s.dtype) for key, array in read.items()}
            operands["diagonal"] = after.reshape(shape)
            (value,) = values([BY_SAMPLE], operation, name, operands)
            held = found[p]
            here = calls[call]
            held[here] = held[here] + value if here in held else value
    for leaf, total in totals.items():
        summed = _sum(found[leaf].values()) if leaf in found else None
        if summed is None or (summed - total).abs().max() > CLOSE * total.abs().max():
            raise NotImplementedError(
                f"parameter {names[leaf]!r} is used in other ways than by a layer with a diagram, "
                "so that its diagonal has no parts by sample; expected per_sample=False for it"
            )
    return found


def _sum(parts: Collection[Tensor]) -> Tensor:
    first, *others = [part.sum(0) for part in parts]
    return sum(others, first)
