"""What a quantity is: diagrams over what a layer saw, and how they add up to a result.

Everything starts from the per-sample gradients ``J[m, n, θ] = Σ_o v[m, n, o] ∂y[n, o] / ∂θ`` of a
parameter θ, where v is the gradient of the loss after the layer's output, or another set of
vectors that flows backwards. A `Quantity` names its `Statistic`s, tensors that a diagram makes of a
layer's x and v and that add up over micro-batches (or line up, where they have a sample dimension),
and says what is made of them at the end. It never sees a layer type, a hook or a loop.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor

from tnconv.diagrams import Expression

Parts = Literal["sum", "same", "rows"]
R = TypeVar("R", covariant=True)
Diagram = Callable[..., Expression]
"""From a layer's network, a parameter's name and the number of vectors: see `Statistic`."""


@dataclass(frozen=True)
class Vectors:
    """Where v comes from; equal sources are propagated backwards once, for all quantities.

    Sources ``by_sample`` get the samples of the output's entries, as ``owners`` of the output's
    shape, where these are not the rows of dimension 0: each of their vectors has one position of
    every sample.
    """

    by_sample: ClassVar[bool] = False

    def columns(
        self, loss_fn: Callable[[Any, Any], Tensor], output: Tensor, targets: Any
    ) -> Tensor:
        """The vectors ``(m, *output)`` after the model's output, with the loss's own factor.

        Raises:
            NotImplementedError: a loss for which there are none.
        """
        raise NotImplementedError(f"{type(self).__name__} has no columns")

    def parts(
        self, loss_fn: Callable[[Any, Any], Tensor], output: Tensor, targets: Any, size: int
    ) -> Iterator[Tensor]:
        """The columns, so many at a time; if there are none at all, once nothing.

        Args:
            loss_fn: the loss.
            output: what the model gave.
            targets: the targets of the batch.
            size: how many columns each part has at most.

        Raises:
            NotImplementedError: a loss for which there are none.
        """
        yield from torch.split(self.columns(loss_fn, output, targets), size)


@dataclass(frozen=True)
class LossGradient(Vectors):
    """The loss's own gradient, with its reduction's factor: one vector v[n, o] per sample.

    It needs no columns: autograd runs backwards through the loss itself.
    """


LOSS_GRADIENT = LossGradient()


@dataclass(frozen=True)
class Statistic:
    """``diagram(network, operand, vectors, *arguments)``, a tensor made of a layer's x and v.

    ``network`` is linear in ``x`` and in the parameter ``operand``, and has leg n; ``vectors`` is
    the size of leg m in ``grad_output`` of shape ``(m, n, *o)``, or None where it is ``(n, *o)``.
    The diagram's operands can be ``x`` and ``grad_output``. Equal statistics of several quantities
    are contracted once, so ``diagram`` is a function of a module, no lambda.

    ``samples`` is the dimension of the result that leg n has: micro-batches line up along it; where
    it is None they add up. ``joint`` statistics relate samples to each other: they wait for the
    last micro-batch, and are made of the per-sample gradients of all. ``factored`` ones read x and
    v apart, so that calls of one parameter on several sizes are unfolded, not differentiated.

    ``parts`` says what becomes of the vectors' parts: the "sum" of the statistic for each of them,
    the "same" for all, where it does not depend on v, or its "rows" one after the other, which who
    collects them has to keep. By default it needs all vectors at once.

    Args:
        diagram: a function of a module, see above.
        arguments: its further arguments, hashable.
        samples: the result's dimension of samples, or None.
        joint: whether it relates samples to each other.
        factored: whether it reads x and v apart.
        parts: what becomes of parts of the vectors.
        vectors: where v comes from.
    """

    diagram: Diagram
    arguments: tuple[Any, ...] = ()
    samples: int | None = None
    joint: bool = False
    factored: bool = False
    parts: Parts | None = None
    vectors: Vectors = field(default=LOSS_GRADIENT)


class Quantity(ABC, Generic[R]):
    """One tensor, or a few, per parameter. Subclasses are frozen dataclasses: equal, same result.

    >>> from tnconv.diagrams import gradient_norms
    >>> @dataclass(frozen=True)
    ... class Norms(Quantity[Tensor]):
    ...     def statistics(self):
    ...         return {"squares": Statistic(gradient_norms, samples=0)}
    ...     def result(self, found, samples):
    ...         return found["squares"].sqrt()
    """

    apart = True
    """Whether samples must not see each other, as they do in a batch normalisation that trains."""
    counts: ClassVar[Literal["samples", "divisor"]] = "samples"
    """What `result` is told: the number of samples, or what the loss's mean divides by."""

    @abstractmethod
    def statistics(self) -> Mapping[str, Statistic]:
        """The statistics by names of the quantity's own."""

    @abstractmethod
    def result(self, found: Mapping[str, Tensor], samples: int) -> R:
        """What is made of the statistics' values over all samples, for one parameter."""
