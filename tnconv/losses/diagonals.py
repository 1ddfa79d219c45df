"""The diagonal of a loss's Hessian in the model's outputs, where recursions over networks start."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnconv.losses.roots import Bernoulli, Curvature, Gaussian, Softmax, curvature, recognised

Method = Literal["hesscale", "gn", "bl89", "hesscale+"]
METHODS: tuple[Method, ...] = get_args(Method)
LossFunction = Callable[[Any, Any], Tensor]


class TwiceDifferentiable(Protocol):
    """A loss module that knows its second derivatives in single outputs."""

    def second_derivatives(self, output: Tensor, targets: Any) -> Tensor:
        """``∂²L / ∂y²`` of every output y, in the output's shape."""


class Derivatives(NamedTuple):
    """A loss, and its derivatives in the outputs.

    The Hessian's diagonal is ``diagonal - Σ_m columns[m]²``; where there are columns, the Hessian
    is ``diag(diagonal) - Σ_m columns[m] columns[m]ᵀ``.
    """

    loss: Tensor
    gradient: Tensor
    diagonal: Tensor
    columns: Tensor | None = None


def output_derivatives(
    loss_fn: LossFunction, output: Tensor, targets: Any, method: Method = "hesscale"
) -> Derivatives:
    """The loss's gradient and the diagonal of its Hessian in detached outputs.

    Losses are those of `tnconv.losses.curvature` and modules that are `TwiceDifferentiable`.
    Columns are for cross-entropy by "hesscale+". ``method="bl89"`` takes cross-entropy for a
    function of single probabilities, as Becker & LeCun 1989 go backwards through softmax: with the
    targets' weights ``τ = a π - g``, where g is the loss's gradient and a its factor, it is
    ``τ (π - π²)``.

    Raises:
        NotImplementedError: another loss.
        ValueError: a loss that is no scalar.
    """
    known = getattr(loss_fn, "second_derivatives", None)
    if known is None and method in ("hesscale", "gn") and (how := _plain(loss_fn, output, targets)):
        with torch.no_grad():
            return _of_labels(output, targets, *how)
    end = output.detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_fn(end, targets)
    if loss.dim():
        raise ValueError(f"the loss has shape {tuple(loss.shape)}; expected a scalar")
    (gradient,) = torch.autograd.grad(loss, end)
    with torch.no_grad():
        if known is not None:
            return Derivatives(loss.detach(), gradient, known(output, targets))
        found = curvature(loss_fn, output, targets)
        return Derivatives(loss.detach(), gradient, *_diagonal(found, gradient, method))


def _diagonal(found: Curvature, gradient: Tensor, method: Method) -> tuple[Tensor, Tensor | None]:
    """The diagonal of a loss's Hessian, and columns, in the output's shape."""
    columns = None
    match found:
        case Softmax(y=y, factor=factor):
            p, a = y.softmax(1), factor.unsqueeze(1)
            if method == "bl89":
                s = (a * p - gradient.reshape(y.shape)) * (p - p * p)
            elif method == "hesscale+":
                s, columns = a * p, _columns(a.sqrt() * p, found.shape)
            else:
                s = a * (p - p * p)
        case Bernoulli(y=y, factor=factor):
            sigma = y.sigmoid()
            s = factor.unsqueeze(1) * (sigma - sigma * sigma)
        case Gaussian(factor=factor):
            s = factor.unsqueeze(1)
        case _:
            s = found.root().square().sum(2)
    return s.reshape(found.shape), columns


def _plain(loss_fn: LossFunction, output: Tensor, targets: Any) -> tuple[int, str] | None:
    """Of cross-entropy of labels without weights: the label that is ignored, and the reduction."""
    function, settings = recognised(loss_fn)
    if function is not F.cross_entropy or targets.is_floating_point():
        return None
    if settings.get("weight") is not None or settings.get("label_smoothing"):
        return None
    reduction = settings.get("reduction", "mean")
    fits = output.dim() > 1 and targets.shape == output.shape[:1] + output.shape[2:]
    return (settings.get("ignore_index", -100), reduction) if fits and reduction != "none" else None


def _of_labels(output: Tensor, targets: Tensor, ignored: int, reduction: str) -> Derivatives:
    """``g = a (π - onehot)`` and ``s = a (π - π²)``: the most usual loss, without a graph of it."""
    logarithms = output.log_softmax(1)
    loss = F.nll_loss(logarithms, targets, ignore_index=ignored, reduction=reduction)
    p, count = logarithms.exp(), targets != ignored
    a = (count / count.sum() if reduction == "mean" else count.to(p.dtype)).unsqueeze(1)
    labels = targets.where(count, 0).unsqueeze(1)
    g = p.scatter_add(1, labels, p.new_full((), -1).expand_as(labels)).mul_(a)
    return Derivatives(loss, g, torch.addcmul(p, p, p, value=-1).mul_(a))


def is_nll(loss_fn: LossFunction) -> bool:
    """Whether a loss is the negative log-likelihood of log-probabilities."""
    inner = getattr(loss_fn, "func", loss_fn)
    own = isinstance(loss_fn, nn.NLLLoss) and type(loss_fn).forward is nn.NLLLoss.forward
    return own or inner is F.nll_loss


def cross_entropy_of(loss_fn: LossFunction) -> LossFunction:
    """The cross-entropy that, of logits, is this negative log-likelihood of ``log_softmax``."""
    if isinstance(loss_fn, nn.NLLLoss):
        ignored, reduction = loss_fn.ignore_index, loss_fn.reduction
        return nn.CrossEntropyLoss(loss_fn.weight, ignore_index=ignored, reduction=reduction)
    return partial(F.cross_entropy, **getattr(loss_fn, "keywords", {}))


def _columns(u: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``(n, c, p)`` as one column ``(*shape)`` for every position p, zero at the others."""
    apart = torch.diag_embed(u)  # (n, c, p, p)
    return apart.permute(3, 0, 1, 2).reshape(-1, *shape)
