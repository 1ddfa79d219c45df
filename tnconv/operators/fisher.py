"""The Fisher matrix of a whole network as a linear operator: exact, sampled, or empirical."""

from collections.abc import Iterable
from math import sqrt
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tnconv.generators import seed_from
from tnconv.given import instances
from tnconv.losses.reductions import Reduction, divisor
from tnconv.losses.roots import curvature, recognised
from tnconv.models.computing import Inputs
from tnconv.models.modules import mixes_samples
from tnconv.models.output_places import output_places
from tnconv.models.propagation import LossFunction
from tnconv.operators.curvature_operators import GGNOperator, Product
from tnconv.operators.linearization import Graph
from tnconv.operators.parameter_space import Vector

Fisher = Literal["type-2", "mc", "empirical"]


class FisherOperator(GGNOperator):
    """``F = 1/D Σ_n E[∂l_n/∂θ ∂l_n/∂θᵀ]`` with ``L = 1/D Σ_n l_n``, for a sum both without 1/D.

    All rows of the outputs that depend on one sample, such as logits of its positions, are its own,
    wherever they are; the batch is dimension ``batch_dim`` of the inputs.

    D is what the loss's mean divides by: entries for squared errors, weights of labels for
    cross-entropy, samples for losses that are not known. So l is the negative logarithm of the
    loss's likelihood, up to a constant, also where a sample has several outputs, and the three
    Fishers agree where targets have the model's own distribution. It is what curvlinops' operators
    have, too.

    For ``fisher="type-2"`` the targets in l have the model's own distribution, which makes F the
    Gauss-Newton matrix. For ``"mc"`` the mean is over so many ``samples`` of them, the same in
    every product: they come from ``seed``, an integer that is drawn from ``generator``, and the
    batch's number. For ``"empirical"`` targets are those given, and the loss can be any that is a
    sum or a mean over samples.

    >>> model, batch = nn.Linear(3, 4), (torch.rand(8, 3), torch.randint(4, (8,)))
    >>> fisher = FisherOperator(model, nn.CrossEntropyLoss(), [batch], fisher="mc", samples=2)
    >>> weight, bias = fisher @ (torch.rand(4, 3), torch.rand(4))
    >>> weight.shape, bias.shape
    (torch.Size([4, 3]), torch.Size([4]))

    Args:
        model: the network; it stays as it is.
        loss_fn: the loss, a sum or a mean over samples.
        batches: pairs of inputs and targets, which together count as one batch; an iterable that
            can be read once is kept as a list.
        parameters: names of those that count, by default all that learn.
        fisher: "type-2", "mc" or "empirical".
        samples: targets that "mc" draws for each sample.
        generator: where "mc" draws its seed from.
        reduction: "mean" or "sum", where several batches' loss does not say it.
        retain_graph: whether graphs stay until a parameter changes; by default for one batch.
        batch_dim: the dimension of the inputs that samples are in.

    Raises:
        NotImplementedError: a loss without a known distribution where one is needed, or layers
            through which samples see each other.
        ValueError: a ``fisher`` that there is not, fewer than one sample, or no reduction.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Iterable[tuple[Inputs, Any]],
        parameters: Iterable[str] | None = None,
        *,
        fisher: Fisher = "type-2",
        samples: int = 1,
        generator: torch.Generator | None = None,
        reduction: Reduction | None = None,
        retain_graph: bool | None = None,
        batch_dim: int = 0,
    ) -> None:
        if fisher not in get_args(Fisher):
            raise ValueError(f"fisher is {fisher!r}; expected one of {get_args(Fisher)}")
        if samples < 1:
            raise ValueError(f"samples is {samples}; expected at least 1")
        instances(model=model)
        _refuse_batch_statistics(model)
        how: dict[str, Any] = {"reduction": reduction, "retain_graph": retain_graph}
        super().__init__(model, loss_fn, batches, parameters, batch_dim=batch_dim, **how)
        if fisher != "empirical":
            recognised(loss_fn)
        elif self.reduction is None:
            raise ValueError("the loss has no reduction; expected reduction='mean' or 'sum'")
        self.fisher, self.samples = fisher, samples
        seed = seed_from(generator)
        self.seed = seed if fisher == "mc" else 0
        mean = fisher == "empirical" and self.reduction == "mean"
        parts = (divisor(loss_fn, *batch, batch_dim) for batch in self.batches)
        self._factor = sum(parts) if mean else 1.0

    def _product(self, graph: Graph, share: float, batch: int, inputs: Inputs) -> Product:
        if self.fisher == "type-2":
            return super()._product(graph, share, batch, inputs)
        vectors = self._vectors(graph, share, batch)
        own = output_places(self.model, inputs, self.batch_dim)

        def product(vector: Vector) -> Vector:
            (tangent,) = graph.push(vector)
            return graph.pull((_outer(vectors, tangent, own),))

        return product

    def _vectors(self, graph: Graph, share: float, batch: int) -> Tensor:
        """``s[m, *y]``: the matrix's middle is ``Σ_m s[m] s[m]ᵀ`` over the entries of a sample."""
        output = graph.output
        if not isinstance(output, Tensor):
            raise TypeError(f"the model gives a {type(output).__name__}; expected a tensor")
        if self.fisher == "empirical":
            return graph.loss_gradient[0][None] * (share * sqrt(self._factor))
        generator = torch.Generator(output.device).manual_seed(self.seed + batch)
        found = curvature(self.loss_fn, output, graph.targets)
        return found.samples(self.samples, generator) * sqrt(share)


def _outer(vectors: Tensor, tangent: Tensor, own: Tensor) -> Tensor:
    """``Σ_m s[m, n, y] Σ_y' s[m, n, y'] u[n, y']``, with a sample's entries at its ``own`` places.

    Entries are read in the order of the output's dimensions where these have the samples in front.
    """
    s, u = vectors.flatten(1)[:, own], tangent.flatten()[own]
    found = (s * (s * u).sum(2, keepdim=True)).sum(0)
    placed = torch.empty_like(tangent).flatten()
    placed[own.flatten()] = found.flatten()
    return placed.reshape(tangent.shape)


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if mixes_samples(module):
            raise NotImplementedError(
                f"layer {name!r} normalises by the batch's statistics, so samples have no "
                "distributions of their own; expected evaluation mode and running statistics"
            )
