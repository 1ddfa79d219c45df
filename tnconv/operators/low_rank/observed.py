"""Low-rank Gauss-Newton matrices of the batches of a loop of the user's own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tnconv.given import instances
from tnconv.losses.reductions import reduction_of
from tnconv.models.modules import unwrapped
from tnconv.models.propagation import LossFunction
from tnconv.operators.low_rank.batch_parts import positions
from tnconv.operators.low_rank.block import Gradients
from tnconv.operators.low_rank.ggn import LowRankGGN, blocked, parted
from tnconv.operators.low_rank.orders import Orders, check_orders
from tnconv.operators.low_rank.parameter_groups import Groups, partition
from tnconv.operators.low_rank.row_products import Rows
from tnconv.operators.low_rank.rows import JacobianRows, RowsObservation
from tnconv.operators.low_rank.sources import LossGradients, WithGradient
from tnconv.operators.low_rank.within_limit import held_within
from tnconv.quantities.base import Vectors
from tnconv.quantities.second_order import Fisher, columns


class LowRankObservation:
    """What `observe_low_rank` gives."""

    def __init__(
        self,
        observation: RowsObservation,
        sources: tuple[WithGradient, Vectors, LossGradients],
        groups: Groups,
    ) -> None:
        self._observation, self._sources, self._groups = observation, sources, groups

    def __repr__(self) -> str:
        return f"<LowRankObservation of a {type(self._observation.model).__name__}>"

    def ggn(
        self,
        loss_fn: LossFunction,
        output: Tensor,
        targets: Any,
        curvature_samples: Sequence[int] | Tensor | None = None,
        gradient_samples: Sequence[int] | Tensor | None = None,
    ) -> LowRankGGN:
        """The matrix of ``loss_fn(output, targets)`` for the output of the model's last call.

        It is asked for before ``loss.backward()``, or while the graph is retained; gradients of
        parameters stay as they are. Columns of chosen samples go backwards by themselves, through
        the graph of the whole batch, where it is known whose rows each operation works on.

        Args:
            loss_fn: A loss whose Hessian's root is known.
            output: What the model gave.
            targets: The targets of the batch.
            curvature_samples: Positions in the batch that the curvature is made of, all by default.
            gradient_samples: Positions whose gradients are used for slopes and steps.

        Raises:
            NotImplementedError: a loss without a known root, or that couples samples.
            RuntimeError: the model was not called once since the last matrix.
            ValueError: an output of something else, positions outside the batch or repeated, or
                none.
        """
        observation = self._observation
        if (count := observation.calls) != 1:
            raise RuntimeError(
                f"the model was called {count} times since the last matrix; expected once"
            )
        size = observation.size
        curved = positions("curvature_samples", curvature_samples, size)
        used = positions("gradient_samples", gradient_samples, size)
        joined, source, gradient = self._sources
        wanted: dict[Any, tuple[int, ...] | None]
        wanted = {joined: curved} if curved == used else {source: curved, gradient: used}
        given = observation, loss_fn, output, targets
        rows: Rows
        others: list[JacobianRows]
        if observation.memory_limit is None:
            observation.propagate(loss_fn, output, targets, chosen=wanted)
            rows, *others = observation.taken(wanted)
        else:
            rows, *others = held_within(observation.memory_limit, wanted, *given)
        if others:
            scale = torch.ones(rows.vectors, rows.samples).to(rows.device, rows.dtype)
            gradients = Gradients(others[0], torch.ones(1).to(scale))
        else:
            rows, scale, gradients = parted(rows, joined, curved)
        names = partition([*rows.like], self._groups)
        ratios = [1.0 if each is None else size / len(each) for each in (curved, used)]
        averages = reduction_of(loss_fn) == "mean"
        return blocked(names, rows, scale, gradients, averages, *ratios)


@contextmanager
def observe_low_rank(
    model: nn.Module,
    *,
    fisher: Fisher = "type-2",
    samples: int = 1,
    generator: torch.Generator | None = None,
    groups: Groups = "network",
    memory_limit: int | None = None,
    order: Orders = "auto",
) -> Iterator[LowRankObservation]:
    """`tnconv.low_rank_ggn` of the batches that the user's own code runs, from the same passes.

    Subsets of samples are chosen batch by batch, and share the batch's forward pass.

    Args:
        model: Any model that `tnconv.compute` takes; its layers must keep samples apart.
        fisher: ``"type-2"`` columns of the root, or ``"mc"``, which are sampled.
        samples: The number of sampled columns for each sample of the batch.
        generator: Where they are drawn; torch's default generator where it is None.
        groups: Blocks of parameters, as for `low_rank_ggn`.
        memory_limit: How many bytes vectors after all layers, which are to take one half of it,
            and products of one parameter may hold beside what autograd does. Vectors of
            `low_rank_ggn`, which runs the model itself, take less.
        order: How Gram matrices are contracted, as for `low_rank_ggn`.

    >>> model, loss_fn = nn.Linear(3, 4), nn.CrossEntropyLoss()
    >>> with observe_low_rank(model) as observation:
    ...     for _ in range(2):
    ...         output, targets = model(torch.rand(8, 3)), torch.randint(4, (8,))
    ...         ggn = observation.ggn(loss_fn, output, targets)
    ...         loss_fn(output, targets).backward()
    >>> ggn.gram.shape
    torch.Size([24, 24])

    Raises:
        NotImplementedError: a layer that mixes samples, or one that has no diagram.
        ValueError: repeated or foreign names in groups, an unknown order.
    """
    instances(model=model)
    named = dict(unwrapped(model).named_parameters())
    partition([name for name, p in named.items() if p.requires_grad], groups)  # checks it
    check_orders(order, named)
    source = columns(fisher, samples, generator)
    sources = WithGradient(source, fisher == "type-2"), source, LossGradients()
    observation = RowsObservation(model, sources, memory_limit, order=order, keep=True)
    with observation.watched():
        yield LowRankObservation(observation, sources, groups)
