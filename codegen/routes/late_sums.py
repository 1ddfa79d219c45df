"""Late sums: a product of two tensors for each position of a leg, which is summed in the end."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.pairs import sum_out
from tnconv.codegen.lowering.plans import Plan
from tnconv.codegen.lowering.strided import PERMUTE
from tnconv.codegen.lowering.values import Value
from tnconv.diagrams.affine import Leg, Tensor, View


@dataclass(frozen=True)
class LateSum:
    """``Σ_n T[n, ..]`` where ``body`` is the network of ``T``, with ``leg`` n before all others."""

    cover: Cover
    leg: Leg

    @property
    def body(self) -> Cover:
        """The network before it is summed; its result holds the open legs, each as a dimension."""
        network = self.cover.network
        result = View.of(network.sizes, self.leg, *self._legs)
        return replace(self.cover, network=network.with_(result=result, scale=1), routes=())

    @property
    def _legs(self) -> tuple[Leg, ...]:
        network = self.cover.network
        return tuple(leg for leg in network.result.legs if network.holders[leg])

    def after(self, plan: Plan) -> Cover:
        """The sum of what a plan for the body gives."""
        writer = replace(self.cover.writer, steps=plan.steps, choices=plan.choices)
        legs = self._legs
        whole = _in_memory(Value(plan.output, (self.leg, *legs)))  # less is left to be reordered
        writer, value = sum_out(writer, whole, legs)
        every = tuple(range(len(self.cover.network.nodes)))
        cover = self.cover.put(writer, every, value, "late sum")
        return replace(cover, routes=(*cover.routes, *plan.routes))


def _in_memory(value: Value) -> Value:
    """A value with its dimensions in the order in which they lie, the innermost last."""
    array, legs = value.array, value.legs
    if array.operation is PERMUTE:
        (before,), (order, _) = array.inputs, array.attributes
        assert isinstance(order, tuple)
        array, legs = before, tuple(legs[order.index(dim)] for dim in range(len(legs)))
    dims = sorted(range(len(legs)), key=lambda dim: -array.strides[dim])
    return Value(array.permute(dims), tuple(legs[dim] for dim in dims))


def late_sums(cover: Cover) -> Iterator[LateSum]:
    """The leg that both of two tensors hold, no pattern holds and the result does not: samples.

    A sum over samples is fastest with the sum inside of the product. If another network needs the
    product for each sample (norms, squares), the sum of these costs next to nothing.
    """
    network = cover.network
    if cover.selection is not None or len(list(network.tensors)) != 2:
        return
    for leg, at in network.holders.items():
        if leg in network.open_legs or len(at) != 2:
            continue
        if all(isinstance(network.nodes[p], Tensor) for p in at):
            yield LateSum(cover, leg)
            return
