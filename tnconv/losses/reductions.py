"""What the mean in a loss divides by, so that batches can be put together exactly."""

from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tnconv.losses.roots import recognised

Reduction = Literal["mean", "sum"]


def reduction_of(loss_fn: Callable[..., Tensor]) -> Reduction | None:
    """``"mean"`` or ``"sum"``, where a loss is known or has a ``reduction``; None where not.

    Raises:
        ValueError: a reduction that gives no number.
    """
    try:
        given = recognised(loss_fn)[1].get("reduction", "mean")
    except NotImplementedError:
        given = getattr(loss_fn, "reduction", None)
    known: dict[str | None, Reduction | None] = {"mean": "mean", "sum": "sum", None: None}
    if given not in known:
        raise ValueError(f"the loss has reduction {given!r}; expected 'mean' or 'sum'")
    return known[given]


def divisor(loss_fn: Callable[..., Tensor], inputs: Any, targets: Any, batch_dim: int = 0) -> float:
    """What a loss with a mean divides the sum over a batch by: weights of labels, entries, or,
    for a loss that is not known, samples.

    >>> from torch import nn, tensor, zeros
    >>> divisor(nn.CrossEntropyLoss(ignore_index=2), zeros(4, 3), tensor([0, 1, 2, 2]))
    2.0

    Args:
        loss_fn: the loss.
        inputs: of the model, whose samples are counted where the loss is not known.
        targets: as the loss takes them.
        batch_dim: the dimension of the inputs that samples are in.
    """
    try:
        function, settings = recognised(loss_fn)
    except NotImplementedError:
        return batch_size(inputs, batch_dim)
    if function is not F.cross_entropy:
        return float(targets.numel())
    if targets.is_floating_point():
        return float(targets.numel() / targets.shape[1])
    labels, weight = targets[targets != settings.get("ignore_index", -100)], settings.get("weight")
    return float(len(labels) if weight is None else weight[labels].sum())


def batch_size(inputs: Any, batch_dim: int = 0) -> int:
    """The size of the batch's dimension in the first tensor among a model's inputs that has it.

    Raises:
        ValueError: there is none.
    """
    for given in tree_leaves(inputs):
        if isinstance(given, Tensor) and given.dim() > batch_dim:
            return given.shape[batch_dim]
    raise ValueError("the model's inputs hold no tensor; expected one with a batch dimension")
