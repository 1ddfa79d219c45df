"""Losses that couple samples: their gradient at one sample's output depends on other samples."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tnconv.losses.roots import recognised
from tnconv.models.propagation import LossFunction
from tnconv.models.sample_maps import Owned, SampleMap, along, owners

PART = 0.75  # of another sample's output, in the place of one sample's
DEPTH = 3  # of losses inside losses that are looked at


def kind_of(loss_fn: Any, depth: int = DEPTH) -> object:
    """What losses that couple samples alike have in common: their code, and what it is told.

    Of numbers that is whether they are zero: a step's weight is no other loss.
    """
    if isinstance(loss_fn, partial):
        told: dict[Any, Any] = dict(enumerate(loss_fn.args)) | loss_fn.keywords
        code: object = kind_of(loss_fn.func, depth)
    elif (found := getattr(loss_fn, "__code__", None)) is not None:
        cells = [each.cell_contents for each in loss_fn.__closure__ or () if _is_filled(each)]
        code, told = found, dict(enumerate([*cells, *(loss_fn.__defaults__ or ())]))
    else:
        code, told = type(loss_fn), dict(getattr(loss_fn, "__dict__", {}))
        if isinstance(loss_fn, nn.Module):
            told = {k: v for k, v in told.items() if k[0] != "_"} | loss_fn._modules
    return code, tuple((name, _word(value, depth)) for name, value in told.items())


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _word(value: Any, depth: int) -> object:
    if isinstance(value, str | bool):
        return value
    if isinstance(value, int | float):
        return value != 0
    return kind_of(value, depth - 1) if depth and callable(value) else type(value)


def couples(
    loss_fn: LossFunction, output: Any, targets: Any, maps: Sequence[SampleMap], samples: int
) -> bool:
    """Whether a change of one sample's output changes the gradient at others.

    Known losses do not couple samples. ``maps`` are of the float tensors in the output, in order.
    """
    try:
        recognised(loss_fn)
    except NotImplementedError:
        pass
    else:
        return False
    flat, spec = tree_flatten(output)
    at = [i for i, y in enumerate(flat) if isinstance(y, Tensor) and y.is_floating_point()]
    if len(at) != len(maps):
        return False
    known = {i: m for i, m in zip(at, maps, strict=True) if isinstance(m, Owned)}

    def gradients(change: int | None) -> dict[int, Tensor]:
        given = [y.detach() if isinstance(y, Tensor) else y for y in flat]
        for i, m in known.items():
            given[i] = _changed(given[i], m, change, samples).requires_grad_()
        with torch.enable_grad(), torch.random.fork_rng():
            loss = loss_fn(tree_unflatten(given, spec), targets)
            ends = [given[i] for i in known]
            if not loss.requires_grad:
                return {}
            grads = torch.autograd.grad(loss, ends, allow_unused=True)
        return {i: g for i, g in zip(known, grads, strict=True) if g is not None}

    plain = gradients(None)
    for sample in sorted({0, samples - 1}):
        new = gradients(sample)
        for i, g in plain.items():
            if i not in new:
                continue
            others = _owners(g, known[i], samples) != sample
            limit = torch.finfo(g.dtype).eps ** 0.5 * g.abs().max()
            if bool(((new[i] - g).abs() * others > limit).any()):
                return True
    return False


def _owners(y: Tensor, known: Owned, samples: int) -> Tensor:
    return along(owners(known, tuple(y.shape), samples, y.device), known, tuple(y.shape))


def _changed(y: Tensor, known: Owned, sample: int | None, samples: int) -> Tensor:
    """An output where one sample's is mostly another's."""
    if sample is None:
        return y.clone()
    own = owners(known, tuple(y.shape), samples, y.device)
    new, rows = y.clone(), (own == sample).nonzero()[:, 0]
    other = y.index_select(known.dim, (own == (sample + 1) % samples).nonzero()[:, 0])
    mine = y.index_select(known.dim, rows)
    new.index_copy_(known.dim, rows, (1 - PART) * mine + PART * other)
    return new
