"""The losses of single samples, from the very loss that is used."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tnconv.losses.reductions import divisor, reduction_of
from tnconv.losses.roots import recognised

LossFunction = Callable[..., Tensor]


@torch.no_grad()
def sample_losses(
    loss_fn: LossFunction,
    output: Any,
    targets: Any,
    samples: int,
    index: Tensor | None = None,
) -> Tensor:
    """``(n,)`` losses whose mean is the loss of the batch, or whose sum where that is a sum.

    Known losses are asked for no reduction; others run on batches of one, all at once if they can.

    Args:
        loss_fn: the loss.
        output: of the model: a tensor, or several, with samples in dimension 0.
        targets: of the loss.
        samples: how many there are: dimension 0 can hold several rows of each.
        index: the samples that are wanted, by default all.
    """
    output = tree_map_only(Tensor, Tensor.detach, output)
    try:
        function, settings = recognised(loss_fn)
    except NotImplementedError:
        return _one_by_one(loss_fn, output, targets, samples, index)
    each = function(output, targets, **(settings | {"reduction": "none"}))
    found = each.reshape(samples, -1).sum(1)
    if reduction_of(loss_fn) == "mean":
        found = found * (samples / divisor(loss_fn, output, targets))
    return found if index is None else found[index]


@contextmanager
def unchanged(loss_fn: LossFunction) -> Iterator[None]:
    """Attributes and buffers of a loss that is a module are as before at the end."""
    modules = [*loss_fn.modules()] if isinstance(loss_fn, nn.Module) else []
    held = [(m, dict(m.__dict__), dict(m._buffers)) for m in modules]
    values = [(b, b.clone()) for m in modules for b in m._buffers.values() if b is not None]
    try:
        yield
    finally:
        for module, own, buffers in held:
            module.__dict__.clear()
            module.__dict__.update(own)
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, value in values:
            buffer.copy_(value)


def _one_by_one(
    loss_fn: LossFunction, output: Any, targets: Any, samples: int, index: Tensor | None
) -> Tensor:
    given = [t for t in tree_leaves((output, targets)) if isinstance(t, Tensor)]
    if not given or any(not t.dim() or len(t) % samples for t in given):
        raise NotImplementedError(
            "not all outputs and targets of the loss have rows of each sample"
        )

    def of(n: int) -> tuple[Any, Any]:
        rows = lambda t: t.reshape(samples, -1, *t.shape[1:])[n]  # noqa: E731
        found: tuple[Any, Any] = tree_map_only(Tensor, rows, (output, targets))
        return found

    which = range(samples) if index is None else index.tolist()
    with torch.random.fork_rng(devices=[]), unchanged(loss_fn):
        return torch.stack([loss_fn(*of(n)) for n in which])
