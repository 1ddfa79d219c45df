"""Low-rank Gauss-Newton matrices of the batches of a loop of the user's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tnconv.given import instances
from tnconv.losses.reductions import reduction_of
from tnconv.models.modules import unwrapped
from tnconv.models.propagation import LossFunction
from tnconv.operators.low_rank.ggn import Groups, LowRankGGN, blocked, parted, partition
from tnconv.operators.low_rank.orders import Orders, check_orders
from tnconv.operators.low_rank.rows import RowsObservation
from tnconv.operators.low_rank.sources import WithGradient
from tnconv.quantities.second_order import Fisher, columns


class LowRankObservation:
    """What `observe_low_rank` gives."""

    def __init__(
        self, observation: RowsObservation, source: WithGradient, groups: Groups, order: Orders
    ) -> None:
        self._observation, self._source = observation, source
        self._groups, self._order = groups, order

    def ggn(self, loss_fn: LossFunction, output: Tensor, targets: Any) -> LowRankGGN:
        """The matrix of ``loss_fn(output, targets)`` for the output of the model's last call.

        It is asked for before ``loss.backward()``, or while the graph is retained; gradients of
        parameters stay as they are.

        Raises:
            NotImplementedError: a loss without a known root, or that couples samples.
            RuntimeError: the model was not called once since the last matrix.
            ValueError: an output of something else.
        """
        observation = self._observation
        if (count := observation.calls) != 1:
            raise RuntimeError(
                f"the model was called {count} times since the last matrix; expected once"
            )
        observation.propagate(loss_fn, output, targets)
        rows, scale, gradients = parted(observation.taken(self._order), self._source)
        names = partition(unwrapped(observation.model), self._groups)
        return blocked(names, rows, scale, gradients, reduction_of(loss_fn) == "mean")


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

    All samples of a batch are used: subsets are `low_rank_ggn`'s, whose passes are its own.

    Args:
        model: Any model that `tnconv.compute` takes; its layers must keep samples apart.
        fisher: ``"type-2"`` columns of the root, or ``"mc"``, which are sampled.
        samples: The number of sampled columns for each sample of the batch.
        generator: Where they are drawn; torch's default generator where it is None.
        groups: Blocks of parameters, as for `low_rank_ggn`.
        memory_limit: How many bytes the products of one parameter may hold at a time.
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
    partition(unwrapped(model), groups)  # checks it
    check_orders(order, dict(unwrapped(model).named_parameters()))
    source = WithGradient(columns(fisher, samples, generator), fisher == "type-2")
    observation = RowsObservation.of(model, source, memory_limit)
    with observation.watched():
        yield LowRankObservation(observation, source, groups, order)
